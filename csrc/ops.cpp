// Registers the operators' schemas.
#include "schemas.h"

TORCH_LIBRARY(hgfast, m) {
  m.set_python_module("hgfast.ops");  // where the fake kernels are registered
  hgfast::define_ops(m);
}
