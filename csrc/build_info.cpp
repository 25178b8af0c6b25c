#include "build_info.h"

// hgfast/_native.py looks for this line in the file before it loads it: a module built for
// another torch may load and then crash.
extern const char hgfast_built_for[];
const char hgfast_built_for[] = "hgfast was built for torch=" HGFAST_TORCH_VERSION ";";

namespace hgfast {

std::map<std::string, std::string> build_info() {
  const std::string line = hgfast_built_for;
  const size_t from = line.find('=') + 1;
  return {
      {"version", HGFAST_VERSION},       {"torch", line.substr(from, line.size() - 1 - from)},
      {"compiler", HGFAST_COMPILER},     {"build_type", HGFAST_BUILD_TYPE},
      {"isa", HGFAST_ISA_SETS},          {"cuda", HGFAST_CUDA_STATE},
      {"nvcc", HGFAST_CUDA_VERSION},     {"cuda_archs", HGFAST_CUDA_ARCHS},
  };
}

}  // namespace hgfast
