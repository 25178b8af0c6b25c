#include "launch.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "cluster.h"

namespace hgfast::cuda::emulator {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kMostShared = 227 * 1024;  // of Hopper, the largest there is
constexpr int kMostBlocks = 16;          // of a cluster there
constexpr int kRegisters = 65536;        // of a multiprocessor

std::atomic<uint64_t> seed{0};
std::atomic<int> host_threads{0};
std::atomic<bool> memory_modelled{false};

thread_local Counters counters_of_last;
thread_local std::string report_of_last;

// Clusters keep their fibers' stacks and records, to be used again: one for each host thread that
// has been busy at the same time.
class Pool {
 public:
  std::unique_ptr<Cluster> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) return std::make_unique<Cluster>();
    auto cluster = std::move(idle_.back());
    idle_.pop_back();
    return cluster;
  }
  void give_back(std::unique_ptr<Cluster> cluster) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(cluster));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Cluster>> idle_;
};

Pool& pool() {
  static Pool pool;
  return pool;
}

std::string mistake(const Launch& launch, const GlobalMemory& memory) {
  if (launch.threads <= 0 || launch.threads > kMostThreads || launch.threads % kLanes)
    return std::to_string(launch.threads) + " threads in a block: not 32 to 1024 in whole warps";
  if (launch.shared_bytes < 0 || launch.shared_bytes > kMostShared)
    return std::to_string(launch.shared_bytes) + " bytes of shared memory: more than 227 KiB";
  if (launch.cluster < 1 || launch.cluster > kMostBlocks || launch.blocks % launch.cluster)
    return std::to_string(launch.blocks) + " blocks in clusters of " +
           std::to_string(launch.cluster) + ": not whole clusters of 1 to 16";
  if (launch.registers * launch.threads > kRegisters)
    return std::to_string(launch.registers) + " registers for each of " +
           std::to_string(launch.threads) + " threads: more than " + std::to_string(kRegisters);
  return memory.mistake();
}

// Runs all clusters; returns the report of the first, by number, that made a mistake. They are
// handed out in order, so all before that one run to their end, and the answer does not depend on
// the number of host threads.
std::string run_blocks(const Launch& launch, const Cluster::Context& context, int threads,
                       Counters& counters) {
  std::atomic<int64_t> next{0};
  const int64_t clusters = launch.blocks / launch.cluster;
  std::atomic<int64_t> failed{clusters};
  std::string report;
  std::mutex mutex;
  const auto work = [&] {
    auto cluster = pool().take();
    for (int64_t index; (index = next.fetch_add(1)) < failed.load();) {
      if (cluster->run(context, index)) continue;
      const std::lock_guard<std::mutex> lock(mutex);
      if (index >= failed.load()) continue;
      failed.store(index);
      report = cluster->report();
    }
    const std::lock_guard<std::mutex> lock(mutex);
    add(counters, cluster->take_counters());
    pool().give_back(std::move(cluster));
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
  return report;
}

}  // namespace

void add(Counters& sum, const Counters& part) {
  for (const auto counter : {&Counters::block_barriers,
                             &Counters::warp_barriers,
                             &Counters::shuffles,
                             &Counters::multiply_adds,
                             &Counters::flops,
                             &Counters::load_matrices,
                             &Counters::store_matrices,
                             &Counters::matrix_conflicts,
                             &Counters::shared_bytes_loaded,
                             &Counters::shared_bytes_stored,
                             &Counters::async_bytes,
                             &Counters::global_bytes_loaded,
                             &Counters::global_bytes_stored,
                             &Counters::partial_barriers,
                             &Counters::cluster_barriers,
                             &Counters::barrier_phases,
                             &Counters::warpgroup_products,
                             &Counters::operand_bytes,
                             &Counters::tile_bytes,
                             &Counters::stored_tile_bytes,
                             &Counters::bulk_bytes,
                             &Counters::remote_bytes})
    sum.*counter += part.*counter;
}

void set_seed(uint64_t value) { seed = value; }
void set_threads(int count) { host_threads = count; }
void model_memory(bool on) { memory_modelled = on; }

const Counters& last_counters() { return counters_of_last; }
const std::string& last_report() { return report_of_last; }

cudaError_t run(const Launch& launch) {
  Counters counters;
  counters.name = launch.name;
  counters.blocks = launch.blocks;
  counters.threads = launch.threads;
  counters.shared_bytes = launch.shared_bytes;
  for (const Array& array : launch.arrays) counters.minimum_bytes += array.bytes;
  counters.memory_modelled = memory_modelled;

  GlobalMemory memory(launch.arrays);
  const auto named = [&](const char* kind, const std::string& text) {
    return text.empty() ? text : std::string(kind) + ": kernel " + launch.name + ": " + text;
  };
  std::string report = named("bad launch", mistake(launch, memory));
  if (report.empty()) {
    const auto cache = counters.memory_modelled ? std::make_unique<Cache>() : nullptr;
    int threads = host_threads;
    if (threads <= 0) threads = std::max(1u, std::thread::hardware_concurrency());
    if (cache) threads = 1;  // or its contents would depend on who comes first
    threads = static_cast<int>(std::min<int64_t>(threads, launch.blocks));
    report = run_blocks(launch, {launch, memory, cache.get(), seed}, threads, counters);
    if (cache) {
      cache->write_back();
      counters.dram_bytes_read = cache->bytes_read();
      counters.dram_bytes_written = cache->bytes_written();
    }
  }
  if (report.empty()) report = named("never written", memory.never_written());
  counters_of_last = std::move(counters);
  report_of_last = std::move(report);
  return report_of_last.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace hgfast::cuda::emulator

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorLaunchFailure:
      return hgfast::cuda::emulator::last_report().c_str();
    case cudaErrorNotSupported:
      return "operation not supported";
  }
  return "unrecognized error code";
}
