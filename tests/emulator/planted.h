// What the kernels with mistakes have in common: planted.cu, hopper_planted.cu. value[0] is the
// number of threads of a block; arrays are of 32-bit words.
#pragma once

#include "cuda/device.cuh"
#include "emulator/registry.h"

namespace hgfast::cuda {
namespace {

using emulator::launch_probe;
using emulator::Probe;
using emulator::ProbeParams;

HGFAST_DEVICE const void* word(const char* array, int64_t index) { return array + 4 * index; }
HGFAST_DEVICE void* word(char* array, int64_t index) { return array + 4 * index; }
HGFAST_DEVICE Shared shared_word(int index) { return shared_memory() + 4 * index; }

// The word of this thread, of all blocks.
HGFAST_DEVICE uint32_t mine(const ProbeParams& p) {
  return load_global<uint32_t>(word(p.input[0], block_index() * p.value[0] + thread_index()));
}
HGFAST_DEVICE void put(const ProbeParams& p, uint32_t value) {
  store_global(word(p.output[0], block_index() * p.value[0] + thread_index()), value);
}

}  // namespace
}  // namespace hgfast::cuda

#define HGFAST_PLANTED(name) \
  {#name, launch_probe<name<false>>}, { #name "_mended", launch_probe<name<true>> }
