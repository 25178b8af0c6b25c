#include "launch.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "block.h"

namespace hgfast::cuda::emulator {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kMostShared = 227 * 1024;  // of Hopper, the largest there is

std::atomic<uint64_t> seed{0};
std::atomic<int> host_threads{0};
std::atomic<bool> memory_modelled{false};

thread_local Counters counters_of_last;
thread_local std::string report_of_last;

// Blocks keep their fibers' stacks and records, to be used again: one for each host thread that has
// been busy at the same time.
class Pool {
 public:
  std::unique_ptr<Block> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) return std::make_unique<Block>();
    auto block = std::move(idle_.back());
    idle_.pop_back();
    return block;
  }
  void give_back(std::unique_ptr<Block> block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(block));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> idle_;
};

Pool& pool() {
  static Pool pool;
  return pool;
}

void add(Counters& sum, const Counters& part) {
  for (const auto counter :
       {&Counters::block_barriers, &Counters::warp_barriers, &Counters::shuffles,
        &Counters::multiply_adds, &Counters::flops, &Counters::load_matrices,
        &Counters::store_matrices, &Counters::matrix_conflicts, &Counters::shared_bytes_loaded,
        &Counters::shared_bytes_stored, &Counters::async_bytes, &Counters::global_bytes_loaded,
        &Counters::global_bytes_stored})
    sum.*counter += part.*counter;
}

std::string mistake(const Launch& launch, const GlobalMemory& memory) {
  if (launch.threads <= 0 || launch.threads > kMostThreads || launch.threads % kLanes)
    return std::to_string(launch.threads) + " threads in a block: not 32 to 1024 in whole warps";
  if (launch.shared_bytes < 0 || launch.shared_bytes > kMostShared)
    return std::to_string(launch.shared_bytes) + " bytes of shared memory: more than 227 KiB";
  return memory.mistake();
}

// Runs all blocks; returns the report of the first one, by number, that made a mistake. Blocks are
// handed out in order, so all before that one run to their end, and the answer does not depend on
// the number of host threads.
std::string run_blocks(const Launch& launch, const Block::Context& context, int threads,
                       Counters& counters) {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> failed{launch.blocks};
  std::string report;
  std::mutex mutex;
  const auto work = [&] {
    auto block = pool().take();
    for (int64_t index; (index = next.fetch_add(1)) < failed.load();) {
      if (block->run(context, index)) continue;
      const std::lock_guard<std::mutex> lock(mutex);
      if (index >= failed.load()) continue;
      failed.store(index);
      report = block->report();
    }
    const std::lock_guard<std::mutex> lock(mutex);
    add(counters, block->take_counters());
    pool().give_back(std::move(block));
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
  return report;
}

}  // namespace

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
