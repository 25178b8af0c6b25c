// Kernels that Python runs by name, on arrays of its own: for tests of the emulator itself.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "../cuda/hopper.cuh"
#include "../cuda/launch.cuh"

namespace hgfast::cuda::emulator {

struct ProbeParams {
  static constexpr int kMost = 4;
  const char* input[kMost];
  int64_t input_bytes[kMost];
  bool input_constant[kMost];  // no kernel before can have written it
  char* output[kMost];
  int64_t output_bytes[kMost];
  int64_t value[kMost];
  TensorMap map[kMost];  // of any of the arrays
};

template <class Visit>
void visit_arrays(const ProbeParams& p, Visit&& visit) {
  for (int i = 0; i < ProbeParams::kMost; ++i)
    visit(p.input[i], p.input_bytes[i], false, p.input_constant[i]);
  for (int i = 0; i < ProbeParams::kMost; ++i) visit(p.output[i], p.output_bytes[i], true);
}

using ProbeLauncher = cudaError_t (*)(const char* name, const Grid&, const ProbeParams&);

template <auto kernel>
cudaError_t launch_probe(const char* name, const Grid& grid, const ProbeParams& params) {
  return hgfast::cuda::launch<kernel>(name, grid, nullptr, params);
}

inline std::map<std::string, ProbeLauncher>& probes() {
  static std::map<std::string, ProbeLauncher> probes;
  return probes;
}

// As a constant of namespace scope: `const Probe probe{"name", launch_probe<kernel>};`
struct Probe {
  Probe(const char* name, ProbeLauncher launcher) { probes()[name] = launcher; }
};

}  // namespace hgfast::cuda::emulator
