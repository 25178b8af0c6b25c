// What this module was built from and for.
#pragma once

#include <map>
#include <string>

namespace hgfast {

// version, torch, compiler, build_type, isa (space-separated instruction sets), cuda (state of the
// device code; empty: there is none), nvcc (its version), cuda_archs (space-separated).
std::map<std::string, std::string> build_info();

}  // namespace hgfast
