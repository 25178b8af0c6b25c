// Blocks that work together, in one host thread: a cluster of a launch, most often of one block.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../cuda/hopper.cuh"
#include "block.h"
#include "clocks.h"

namespace hgfast::cuda::emulator {

class Cluster {
 public:
  // What all clusters of a launch share.
  struct Context {
    const Launch& launch;
    GlobalMemory& memory;
    Cache* cache;  // or null
    uint64_t seed;
  };

  // Runs cluster `index` to its end, or to its first mistake. True where there was none; report()
  // tells it otherwise.
  bool run(const Context&, int64_t index);
  const char* report() const { return report_; }
  // Since the last call.
  Counters take_counters();

  // ---- For its blocks ----

  int size() const { return size_; }
  Block& block(int rank) { return *blocks_[rank]; }
  Clocks& clocks() { return clocks_; }

  // The first of so many agents that nobody else is.
  static constexpr int kMoreAgents = 96;  // for a block: barriers, and threads that store tiles
  int agent_of(int rank, int thread) const { return rank * threads_ + thread; }
  int agent_of_warp(int rank, int warp) const {
    return size_ * threads_ + rank * (threads_ / 32) + warp;
  }
  int previous_kernel() const { return agents_ - 1; }
  int new_agent() { return next_agent_ < agents_ - 1 ? next_agent_++ : -1; }
  // Of an agent that is a thread.
  int rank_of(uint32_t agent) const { return static_cast<int>(agent) / threads_; }

  // The block that goes on, and its thread. Null: all have ended, or nobody can.
  Block* choose(Block& from, int& thread);
  bool all_ended() const;

  // A copy into a block's shared memory that a barrier there will count.
  struct Copy {
    int rank;
    uint32_t to, barrier;
    const char* from;  // so many bytes; null: the box of a map
    uint32_t bytes;
    TensorMap map;  // itself: the thread whose parameters have it may end before
    int at[4];
    Stamp by;
  };
  void begin_copy(const Copy& copy) { copies_.push_back(copy); }
  const Copy* copy_to(int rank) const;  // one that is under way, or null

  // The barrier of the cluster.
  struct Gate {
    int arrived = 0;
    uint32_t phase = 0;
    Clocks::Gathered gathered;
    int clock = Clocks::kNothing;
  };
  Gate gate;

  Fiber scheduler;
  char* report_buffer() { return report_; }
  static constexpr size_t kReport = 4096;

 private:
  void deliver(size_t number);
  uint32_t random();

  Clocks clocks_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Copy> copies_;  // under way
  int size_ = 0, threads_ = 0, agents_ = 0, next_agent_ = 0;
  uint64_t random_ = 0;  // 0: in order
  char report_[kReport];
};

}  // namespace hgfast::cuda::emulator
