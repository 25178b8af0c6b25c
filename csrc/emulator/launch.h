// Launching a kernel on the emulator, and what it counts.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace hgfast::cuda::emulator {

// An array of global memory that a launch may touch.
struct Array {
  const char* begin;
  int64_t bytes;
  bool written;  // every byte once, and read by nobody; else only read
};

template <class Params>
std::vector<Array> arrays_of(const Params& params) {
  std::vector<Array> arrays;
  visit_arrays(params, [&](const void* begin, int64_t bytes, bool written) {
    if (begin && bytes) arrays.push_back({static_cast<const char*>(begin), bytes, written});
  });
  return arrays;
}

// Of one launch, over all its blocks.
struct Counters {
  std::string name;
  int64_t blocks = 0;
  int threads = 0;       // of a block
  int shared_bytes = 0;  // of a block

  int64_t block_barriers = 0;  // each counted once for a block
  int64_t warp_barriers = 0;   // each counted once for a warp, as all below that warps do
  int64_t shuffles = 0;
  int64_t multiply_adds = 0;
  int64_t flops = 0;  // of these
  int64_t load_matrices = 0;
  int64_t store_matrices = 0;
  int64_t matrix_conflicts = 0;  // wavefronts that these two take more than their four each

  int64_t shared_bytes_loaded = 0;  // by load_shared, all threads together
  int64_t shared_bytes_stored = 0;  // by store_shared
  int64_t async_bytes = 0;          // that copy_async brought to shared memory, zeros too
  int64_t global_bytes_loaded = 0;  // asked of global memory by load_global and copy_async
  int64_t global_bytes_stored = 0;
  int64_t minimum_bytes = 0;  // all arrays, once

  bool memory_modelled = false;
  int64_t dram_bytes_read = 0;  // of the modelled DRAM, see cache.h
  int64_t dram_bytes_written = 0;
};

// Settings of the process. A seed other than 0 shuffles the order in which threads take turns.
void set_seed(uint64_t);
// Host threads that run blocks; 0: as many as the machine has.
void set_threads(int);
// Whether to put global memory behind a model of the last-level cache, with one host thread.
void model_memory(bool);

// Of this host thread.
const Counters& last_counters();
const std::string& last_report();

struct Launch {
  const char* name;
  int64_t blocks;
  int threads;
  int shared_bytes;
  std::vector<Array> arrays;
  void (*run_thread)(const void* kernel);
  const void* kernel;
};

// cudaSuccess, or cudaErrorLaunchFailure and a report.
cudaError_t run(const Launch&);

template <class Kernel>
cudaError_t launch(const char* name, int64_t blocks, int threads, int shared_bytes,
                   std::vector<Array> arrays, const Kernel& kernel) {
  return run({name, blocks, threads, shared_bytes, std::move(arrays),
              [](const void* self) { (*static_cast<const Kernel*>(self))(); }, &kernel});
}

}  // namespace hgfast::cuda::emulator
