// Noticing, within microseconds, that a module is no longer what its weights were packed from.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace hgfast {

// Registers the class Watch with the Python module.
void bind_watch(pybind11::module_& m);

}  // namespace hgfast
