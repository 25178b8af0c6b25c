// One block at work: a fiber for each of its threads, all in one host thread.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cache.h"
#include "fiber.h"
#include "global_memory.h"
#include "launch.h"
#include "place.h"
#include "shared_memory.h"

namespace hgfast::cuda::emulator {

constexpr int kLanes = 32;

class Block {
 public:
  // What all blocks of a launch share.
  struct Context {
    const Launch& launch;
    GlobalMemory& memory;
    Cache* cache;  // or null
    uint64_t seed;
  };

  // Runs block `index` to its end, or to its first mistake. True where there was none; report()
  // tells it otherwise.
  bool run(const Context&, int64_t index);
  const char* report() const { return report_; }

  // Since the last call.
  Counters take_counters();

  // The block whose thread is running.
  static Block& current();

  // ---- What a thread of the block asks for. Each returns only if all was well. ----

  int thread() const { return thread_; }
  int64_t index() const { return index_; }

  void sync_block(Place);

  // All lanes of a warp bring an argument to the same call; the last one computes for all.
  using Compute = void (*)(Block&, Place, void* const (&arguments)[kLanes]);
  void collective(const char* function, Place, void* argument, Compute);
  void sync_warp(Place);

  void load_shared(void* to, uint32_t from, uint32_t bytes, Place);
  void store_shared(uint32_t to, const void* from, uint32_t bytes, Place);
  void load_global(void* to, const void* from, uint32_t bytes, Place);
  void store_global(void* to, const void* from, uint32_t bytes, Place);

  void copy_async(uint32_t to, const void* from, bool valid, Place);
  void commit_copies();
  void wait_copies(int pending);

  // Of one collective, which gives rows of 16 bytes: a thread's address, checked, or the four words
  // that belong to the lanes 4 * row ... 4 * row + 3.
  enum class Direction { load, store };
  void move_matrices(Direction, const uint32_t (&rows)[kLanes],
                     uint32_t* const (&fragments)[kLanes], Place);

  Counters& counters() { return counters_; }

 private:
  struct Copy {
    uint32_t to;
    const void* from;  // null: zeros
    Stamp by;
    uint32_t group;
  };
  struct Thread {
    Fiber fiber;
    const char* waits_in;  // null: it does not
    Place waits_at;
    std::vector<Copy> copies;  // not yet delivered from `delivered` on
    size_t delivered;
    uint32_t groups;  // closed by commit_copies
  };
  struct Warp {
    uint32_t ready;  // a bit for each lane that could go on
    uint32_t clock;  // barriers of this warp; never goes back
    // The collective that some lanes have reached.
    uint32_t arrived;
    const char* function;
    Place place;
    void* arguments[kLanes];
  };

  static void thread_main();
  void start(const Context&, int64_t index);

  // Whoever waits for whatever: wait() returns after another thread's wake().
  void wait(const char* function, Place);
  void wake(int warp, uint32_t lanes);
  void switch_to_next();
  int next_thread();
  [[noreturn]] void leave();  // this fiber, for good
  [[noreturn]] void deadlock();

  [[noreturn]] void fail(const char* kind, int thread, const char* format, ...)
      __attribute__((format(printf, 4, 5)));
  void check_shared(const char* function, uint32_t address, uint32_t bytes, uint32_t alignment,
                    int thread, Place);
  [[noreturn]] void fail_shared(Fault, const char* function, bool writes, uint32_t address,
                                int thread, Place);
  int check_global(const char* function, const void* address, uint32_t bytes, bool writes, Place);
  void deliver(const Copy&);

  uint32_t random();
  Stamp stamp(int thread, Place);
  Access access(int thread, Place place) {
    return {stamp(thread, place), warps_[thread / kLanes].clock};
  }

  const Launch* launch_ = nullptr;
  GlobalMemory* global_ = nullptr;
  Cache* cache_ = nullptr;
  int64_t index_ = 0;
  int threads_ = 0;

  Fiber scheduler_;
  Stacks stacks_;
  std::vector<Thread> thread_states_;
  std::vector<Warp> warps_;
  uint32_t ready_warps_ = 0;  // a bit for each with a lane that could go on
  int thread_ = 0;            // the running one
  int ended_ = 0;
  int at_barrier_ = 0;
  Place barrier_{};
  uint64_t random_ = 0;  // 0: in order

  SharedMemory shared_;
  int last_array_ = 0;
  const char* last_file_ = nullptr;
  uint32_t last_file_number_ = 0;

  Counters counters_;
  bool failed_ = false;
  char report_[2048];
};

}  // namespace hgfast::cuda::emulator
