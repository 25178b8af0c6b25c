// One block at work: a fiber for each of its threads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../cuda/hopper.cuh"
#include "cache.h"
#include "clocks.h"
#include "fiber.h"
#include "global_memory.h"
#include "launch.h"
#include "place.h"
#include "shared_memory.h"

namespace hgfast::cuda::emulator {

constexpr int kLanes = 32;

class Cluster;

class Block {
 public:
  // The block whose thread is running.
  static Block& current();
  static void set_current(Block*);

  Counters& counters() { return counters_; }

  // ---- For the cluster ----

  void start(Cluster&, const Launch&, GlobalMemory&, Cache*, uint64_t seed, int64_t cluster,
             int rank);
  // A thread that could go on, or -1.
  int next_thread();
  Fiber& fiber(int thread) { return thread_states_[thread].fiber; }
  void set_thread(int thread) { thread_ = thread; }
  int ended() const { return ended_; }
  bool failed() const { return failed_; }
  bool asks_for_a_turn();  // of another block, at random
  // What a copy brings, to a barrier of this block.
  void deliver(uint32_t to, const char* bytes, const TensorMap*, const int* at, uint32_t count,
               uint32_t barrier, Stamp by);

  // ---- What a thread of the block asks for. Each returns only if all was well. ----

  int thread() const { return thread_; }
  int64_t index() const { return index_; }
  int rank() const { return rank_; }
  int grid_size() const { return static_cast<int>(launch_->blocks); }

  void sync_block(Place);
  void sync_some(int number, int threads, Place);

  // All lanes of a warp bring an argument to the same call; the last one computes for all.
  using Compute = void (*)(Block&, Place, void* const (&arguments)[kLanes]);
  void collective(const char* function, Place, void* argument, Compute);
  void sync_warp(Place);

  void load_shared(void* to, uint32_t from, uint32_t bytes, Place);
  void store_shared(uint32_t to, const void* from, uint32_t bytes, Place);
  void store_remote(uint32_t to, int rank, const void* from, uint32_t bytes, Place);
  void load_global(void* to, const void* from, uint32_t bytes, Place);
  void store_global(void* to, const void* from, uint32_t bytes, Place);

  void copy_async(uint32_t to, const void* from, bool valid, Place);
  void commit_copies();
  void wait_copies(int pending);

  void init_barrier(uint32_t barrier, int arrivals, Place);
  void fence_barriers();
  void arrive(uint32_t barrier, int rank, int bytes, const char* function, Place);
  void wait_barrier(uint32_t barrier, int parity, Place);

  void fence_async();
  void load_tile(uint32_t to, const TensorMap&, uint32_t barrier, const int (&at)[4], Place);
  void load_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier, uint32_t ranks,
                 const char* function, Place);
  void store_tile(const TensorMap&, uint32_t from, const int (&at)[4], Place);
  void commit_stores();
  void wait_stores(int pending);

  void arrive_cluster(Place);
  void wait_cluster(Place);
  void set_registers(int registers, bool raise, Place);
  void wait_for_previous_kernel();

  // Of one collective, which gives rows of 16 bytes: a thread's address, checked, or the four words
  // that belong to the lanes 4 * row ... 4 * row + 3.
  enum class Direction { load, store };
  void move_matrices(Direction, const uint32_t (&rows)[kLanes],
                     uint32_t* const (&fragments)[kLanes], Place);

  // Of one collective, each: products of a warp, as part of its warpgroup's.
  struct Product {
    float* d;
    int n;
    const uint32_t* a;  // null: in shared memory
    uint64_t a_operand, b;
    bool accumulate;
  };
  using Multiply = void (*)(float* d, int n, const uint32_t (&a)[16][8], const uint32_t* const* b);
  void add_product(const Product* const (&lanes)[kLanes], Multiply, Place);
  void begin_products(Place);
  void commit_products(Place);
  void wait_products(int pending, Place);
  const char* warpgroup_only(const char* function, Place);  // the same, for whole warpgroups alone

 private:
  struct Copy {
    uint32_t to;
    const void* from;  // null: zeros
    Stamp by;
    uint32_t group;
  };
  struct Store {
    TensorMap map;
    uint32_t from;
    int at[4];
    Stamp by;
    uint32_t group;
  };
  struct Thread {
    Fiber fiber;
    const char* waits_in;  // null: it does not
    Place waits_at;
    int64_t waits_for;         // of a barrier: its byte offset; else -1
    std::vector<Copy> copies;  // not yet delivered from `delivered` on
    size_t delivered;
    uint32_t groups;  // closed by commit_copies
    std::vector<Store> stores;
    uint32_t store_groups;
    int store_agent;  // -1: it stored no tile yet
    // What it knows of others, see clocks.h; its own time; until when it has fenced.
    int clock;
    uint32_t time, fenced;
    bool at_gate;          // of the cluster: arrived, and has not waited yet
    bool in_gate;          // and waits now
    bool stored_remotely;  // since the last barrier of the cluster
    uint32_t gate_phase;
  };
  // Sums of a warp, from the first of its products until the last one is over.
  struct Sums {
    float* d[kLanes];
    int n, open;
    uint32_t begins;            // of the warp, when its last product was over
    std::vector<float> values;  // (16, n)
  };
  struct Pending {
    int sums, n;
    bool in_registers;
    uint32_t a[kLanes][4];
    uint64_t a_operand, b;
    bool accumulate;
    Multiply multiply;
    uint32_t group;
    Place place;
  };
  struct Warp {
    uint32_t ready;  // a bit for each lane that could go on
    // The collective that some lanes have reached.
    uint32_t arrived;
    const char* function;
    Place place;
    void* arguments[kLanes];
    // Its products.
    bool products_begun;      // since all of them were over
    uint32_t begins;          // so many times
    uint32_t product_groups;  // closed
    size_t products;          // issued
    std::vector<Pending> pending;
    std::vector<Sums> sums;
    int registers;   // of a thread
    size_t changes;  // of these, so many
    int wanted;      // and how many it waits for; 0: it does not
  };
  struct SomeBarrier {
    int arrived = 0, threads = 0;
    Place place{};
    std::vector<int> who;
    Clocks::Gathered gathered;
  };
  struct BarrierState {
    uint32_t address;
    uint32_t agent;
    int arrivals, missing;
    int64_t bytes;   // that it expects and that have not come
    uint32_t phase;  // how many are over
    uint32_t made_by, made_at;
    Clocks::Gathered gathered;
    int clock;    // of the phases that are over
    bool fenced;  // by fence_barriers, at made_at
    // The last copy that it counted, and in which phase; 0: none.
    uint32_t brought_in, brought_to;
    Stamp brought_by;
    std::vector<int> waiting;
  };
  struct Issued {  // a product of a warpgroup, as its first warp wanted it
    uint64_t a, b;
    int n;
    bool in_registers, accumulate;
    Place place;
  };

  struct Change {  // of a warpgroup's registers, as its first warp wanted it
    int registers;
    bool raise;
    Place place;
  };
  struct Remote {  // the last access of another block's thread to this one's shared memory
    uint32_t agent, time;
    Stamp by;
    const char* function;
  };

  static void thread_main();
  void end_thread();
  void check_nobody_comes();
  void check_warpgroups();
  void note_remote(const Asker&, const char* function);

  // Whoever waits for whatever: wait() returns after another thread's wake().
  void wait(const char* function, Place, int64_t barrier = -1);
  void wake(int warp, uint32_t lanes);
  void switch_to_next();
  [[noreturn]] void leave();  // this fiber, for good
  [[noreturn]] void deadlock();
  void describe_waiting(std::string& all);

  [[noreturn]] void fail(const char* kind, int thread, const char* format, ...)
      __attribute__((format(printf, 4, 5)));
  void check_shared(const char* function, uint32_t address, uint32_t bytes, uint32_t alignment,
                    int thread, Place);
  // `memory`: this block's, or another's of the cluster.
  [[noreturn]] void fail_shared(Fault, const char* function, bool writes, uint32_t address,
                                int thread, Place, const Block& memory);
  int check_global(const char* function, const void* address, uint32_t bytes, bool writes,
                   uint32_t alignment, Place);
  void write_global(const char* function, char* to, const void* from, uint32_t bytes, Stamp by);
  void deliver(const Copy&);
  void deliver(const Store&);
  Block& other_block(const char* function, int rank, Place);
  BarrierState& barrier_at(Block& owner, const char* function, uint32_t address, Place);
  void complete_if_over(BarrierState&);
  bool is_over(const BarrierState& barrier, int parity) const {
    return static_cast<int>(barrier.phase & 1) != parity;
  }
  void check_tile(const char* function, const TensorMap&, uint32_t address, Place);
  template <class Visit>
  void visit_box(const TensorMap&, const int* at, Visit&&);
  void run_product(Warp&, int warp, Pending&);

  uint32_t random();
  Stamp stamp(int thread, Place);
  uint32_t agent(int thread) const;
  Asker asker(int thread, Place place);
  void learn(Thread&, int clock);              // takes the reference
  void gather(Clocks::Gathered&, int thread);  // tells what the thread knows and did
  int distinct_askers(Asker (&askers)[kLanes], Place);

  Cluster* cluster_ = nullptr;
  const Launch* launch_ = nullptr;
  GlobalMemory* global_ = nullptr;
  Cache* cache_ = nullptr;
  int64_t index_ = 0;
  int rank_ = 0;
  int threads_ = 0;

  Stacks stacks_;
  std::vector<Thread> thread_states_;
  std::vector<Warp> warps_;
  uint32_t ready_warps_ = 0;  // a bit for each with a lane that could go on
  int thread_ = 0;            // the running one
  int ended_ = 0;
  int at_barrier_ = 0;
  Place barrier_{};
  Clocks::Gathered gathered_, warp_gathered_;
  SomeBarrier some_[16];
  std::vector<BarrierState> barriers_;
  std::vector<Remote> remote_;
  std::vector<std::vector<Issued>> issued_;   // by warpgroup
  std::vector<std::vector<Change>> changes_;  // likewise
  int free_registers_ = 0;
  uint64_t random_ = 0;  // 0: in order

  SharedMemory shared_;
  int last_array_ = 0;
  const char* last_file_ = nullptr;
  uint32_t last_file_number_ = 0;

  Counters counters_;
  bool failed_ = false;
};

}  // namespace hgfast::cuda::emulator
