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
  // Of the arrays that are read: whether no kernel before this one can have written it, so that it
  // may be read before that one has ended.
  bool constant;
};

template <class Params>
std::vector<Array> arrays_of(const Params& params) {
  std::vector<Array> arrays;
  visit_arrays(params, [&](const void* begin, int64_t bytes, bool written, bool constant = false) {
    if (begin && bytes)
      arrays.push_back({static_cast<const char*>(begin), bytes, written, constant});
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

  int64_t partial_barriers = 0;    // of sync_some
  int64_t cluster_barriers = 0;    // each counted once for a cluster
  int64_t barrier_phases = 0;      // of all barriers in shared memory
  int64_t warpgroup_products = 0;  // whose FLOPs are among `flops`
  int64_t operand_bytes = 0;       // that these read of shared memory
  int64_t tile_bytes = 0;          // that load_tile brought to shared memory, zeros too
  int64_t stored_tile_bytes = 0;   // that store_tile brought to global memory
  int64_t bulk_bytes = 0;          // that load_bulk brought, counted in each block it came to
  int64_t remote_bytes = 0;        // stored into other blocks' shared memory

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

void add(Counters& sum, const Counters& part);

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
  int cluster;        // blocks that work together
  int registers;      // of a thread when it begins; 0: the kernel never changes them
  bool programmatic;  // may begin before the kernel in front of it has ended
  std::vector<Array> arrays;
  void (*run_thread)(const void* kernel);
  const void* kernel;
};

// cudaSuccess, or cudaErrorLaunchFailure and a report.
cudaError_t run(const Launch&);

// A launch without arrays and kernel.
template <class Kernel>
cudaError_t launch(Launch launch, std::vector<Array> arrays, const Kernel& kernel) {
  launch.arrays = std::move(arrays);
  launch.run_thread = [](const void* self) { (*static_cast<const Kernel*>(self))(); };
  launch.kernel = &kernel;
  return run(launch);
}

}  // namespace hgfast::cuda::emulator
