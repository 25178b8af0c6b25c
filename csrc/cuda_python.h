#pragma once

#include <torch/csrc/utils/pybind.h>

#include "cuda_binding.h"
#include "cuda_hopper.h"
#include "cuda_latency.h"

namespace hgfast {

void bind_cuda(pybind11::module_& m);

}  // namespace hgfast
