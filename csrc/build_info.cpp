#include "build_info.h"

// hgfast/_native.py looks for this line in the file before it loads it: a module built for
// another torch may load and then crash. Nothing here reads it: copied around, the compiler may
// put parts of it elsewhere in the file a second time.
extern const char hgfast_built_for[];
[[gnu::used]] const char hgfast_built_for[] =
    "hgfast was built for torch=" HGFAST_TORCH_VERSION ";";

namespace hgfast {

std::map<std::string, std::string> build_info() {
  return {
      {"version", HGFAST_VERSION},   {"torch", HGFAST_TORCH_VERSION},
      {"compiler", HGFAST_COMPILER}, {"build_type", HGFAST_BUILD_TYPE},
      {"isa", HGFAST_ISA_SETS},      {"cuda", HGFAST_CUDA_STATE},
      {"nvcc", HGFAST_CUDA_VERSION}, {"cuda_archs", HGFAST_CUDA_ARCHS},
  };
}

}  // namespace hgfast
