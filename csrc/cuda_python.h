#pragma once

#include <torch/csrc/utils/pybind.h>

#include "cuda_binding.h"
#include "cuda_hopper_bottleneck.h"
#include "cuda_hopper_latency.h"

namespace hgfast {

void bind_cuda(pybind11::module_& m);

}  // namespace hgfast
