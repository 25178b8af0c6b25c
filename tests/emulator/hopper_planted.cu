// Kernels with one mistake each in what only Hopper has, and the same without it, for
// tests/test_emulator_hopper.py; see planted.cu for HERE, THERE and BRANCH. Most have their
// barriers from byte 4096 of shared memory on, and operands of 64 rows at 0 (a) and 2048 (b).
#include "cuda/hopper.cuh"
#include "planted.h"

namespace hgfast::cuda {
namespace {

HGFAST_DEVICE Barrier barrier(int number) { return shared_memory() + 4096 + 8 * number; }
HGFAST_DEVICE void make_barriers(int count, int arrivals) {
  if (thread_index() == 0) {
    for (int i = 0; i < count; ++i) init_barrier(barrier(i), arrivals);
    fence_barriers();
  }
  sync_block();
}
constexpr int kPart = 2048;  // bytes of 64 rows of 16 elements
HGFAST_DEVICE uint64_t part(int offset) { return operand(shared_memory() + offset, 1024, 128); }
// Ones everywhere, so that all sums are 16; for 128 threads.
HGFAST_DEVICE void write_operands() {
  for (int i = thread_index() % kWarpgroup; i < 2 * kPart / 16; i += kWarpgroup) {
    const uint32_t ones = 0x3f803f80u;
    store_shared(shared_memory() + 16 * i, uint4{ones, ones, ones, ones});
  }
}
HGFAST_DEVICE uint32_t text(float value) { return static_cast<uint32_t>(value); }

// ---- Barriers that count ----

template <bool right>
__global__ void stage_read_early(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index(), bytes = 4 * static_cast<int>(p.value[0]);
  make_barriers(1, 1);
  if (thread == 0) {
    arrive_expecting(barrier(0), bytes);
    load_bulk(shared_memory(), p.input[0], bytes, barrier(0));  // THERE
  }
  sync_block();
  if constexpr (right) wait_barrier(barrier(0), 0);
  put(p, load_shared<uint32_t>(shared_word(thread)));  // HERE
  wait_barrier(barrier(0), 0);
}

template <bool right>
__global__ void wrong_parity(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index(), bytes = 4 * static_cast<int>(p.value[0]);
  make_barriers(1, 1);
  if (thread == 0) {
    arrive_expecting(barrier(0), bytes);
    load_bulk(shared_memory(), p.input[0], bytes, barrier(0));
  }
  sync_block();
  wait_barrier(barrier(0), right ? 0 : 1);  // a deadlock, where the copy has come already
  put(p, load_shared<uint32_t>(shared_word(thread)));
}

// The first thread arrives for itself and for somebody else: the phase ends too early for one.
template <bool right>
__global__ void arrives_twice(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index(), threads = static_cast<int>(p.value[0]);
  store_shared(shared_word(thread), 0u);
  make_barriers(1, threads);
  store_shared(shared_word(thread), mine(p));  // BRANCH
  arrive(barrier(0));
  if (!right && thread == 0) arrive(barrier(0));
  wait_barrier(barrier(0), 0);
  uint32_t sum = 0;
  for (int i = 0; i < threads; ++i) sum += load_shared<uint32_t>(shared_word(i));  // BRANCH
  put(p, sum);
}

template <bool right>
__global__ void too_many_arrivals(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index(), bytes = 4 * static_cast<int>(p.value[0]);
  make_barriers(1, 1);
  if (thread == 0) arrive_expecting(barrier(0), bytes);
  sync_block();
  if (!right && thread == 5) arrive(barrier(0));  // HERE
  sync_block();
  if (thread == 0) load_bulk(shared_memory(), p.input[0], bytes, barrier(0));
  wait_barrier(barrier(0), 0);
  put(p, load_shared<uint32_t>(shared_word(thread)));
}

template <bool right>
__global__ void bytes_that_never_come(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index(), bytes = 4 * static_cast<int>(p.value[0]);
  make_barriers(1, 1);
  if (thread == 0) {
    arrive_expecting(barrier(0), right ? bytes : bytes + 64);
    load_bulk(shared_memory(), p.input[0], bytes, barrier(0));
  }
  wait_barrier(barrier(0), 0);  // HERE
  put(p, load_shared<uint32_t>(shared_word(thread)));
}

template <bool right>
__global__ void arrival_missing(const __grid_constant__ ProbeParams p) {
  make_barriers(2, static_cast<int>(p.value[0]));
  if (right || thread_index() != 7) arrive(barrier(1));
  wait_barrier(barrier(1), 0);  // HERE
  put(p, mine(p));
}

template <bool right>
__global__ void barrier_used_unordered(const __grid_constant__ ProbeParams p) {
  if (thread_index() == 0) {
    init_barrier(barrier(0), static_cast<int>(p.value[0]));
    fence_barriers();
  }
  if constexpr (right) sync_block();
  arrive(barrier(0));  // HERE
  wait_barrier(barrier(0), 0);
  put(p, mine(p));
}

template <bool right>
__global__ void barrier_not_fenced(const __grid_constant__ ProbeParams p) {
  if (thread_index() == 0) {
    init_barrier(barrier(0), static_cast<int>(p.value[0]));
    if constexpr (right) fence_barriers();
  }
  sync_block();
  arrive(barrier(0));  // HERE
  wait_barrier(barrier(0), 0);
  put(p, mine(p));
}

template <bool right>
__global__ void store_onto_barrier(const __grid_constant__ ProbeParams p) {
  make_barriers(1, 1);
  if (thread_index() == 3) store_shared(right ? barrier(1) : barrier(0), 0u);  // HERE
  put(p, mine(p));
}

// The next round's bytes go to a stage of which nobody says that it has been read.
template <bool right>
__global__ void stage_not_released(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index(), threads = static_cast<int>(p.value[0]);
  make_barriers(1, 1);
  uint32_t sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (thread == 0) {
      arrive_expecting(barrier(0), 4 * threads);
      load_bulk(shared_memory(), p.input[0], 4 * threads, barrier(0));  // BRANCH
    }
    wait_barrier(barrier(0), round);
    sum += load_shared<uint32_t>(shared_word(thread));  // BRANCH
    if constexpr (right) sync_block();
  }
  put(p, sum);
}

template <bool right>
__global__ void loaded_twice(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index(), bytes = 4 * static_cast<int>(p.value[0]);
  make_barriers(1, 1);
  if (thread == 0) {
    arrive_expecting(barrier(0), right ? 2 * bytes : bytes + 16);
    load_bulk(shared_memory(), p.input[0], bytes, barrier(0));                         // THERE
    load_bulk(shared_memory() + (right ? bytes : 16), p.input[0], right ? bytes : 16,  // HERE
              barrier(0));
  }
  wait_barrier(barrier(0), 0);
  put(p, load_shared<uint32_t>(shared_word(thread)));
}

// The copy engine does not see in which order threads wrote before it.
template <bool right>
__global__ void load_over_unfenced(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index(), bytes = 4 * static_cast<int>(p.value[0]);
  store_shared(shared_word(thread), 0u);  // THERE
  if constexpr (right) fence_async();
  make_barriers(1, 1);
  if (thread == 0) {
    arrive_expecting(barrier(0), bytes);
    load_bulk(shared_memory(), p.input[0], bytes, barrier(0));  // HERE
  }
  wait_barrier(barrier(0), 0);
  put(p, load_shared<uint32_t>(shared_word(thread)));
}

template <bool right>
__global__ void load_never_waited_for(const __grid_constant__ ProbeParams p) {
  const int bytes = 4 * static_cast<int>(p.value[0]);
  make_barriers(1, 1);
  if (thread_index() == 0) {
    arrive_expecting(barrier(0), bytes);
    load_bulk(shared_memory(), p.input[0], bytes, barrier(0));  // HERE
    if constexpr (right) wait_barrier(barrier(0), 0);
  }
  put(p, mine(p));
}

template <bool right>
__global__ void sync_some_of_other_counts(const __grid_constant__ ProbeParams p) {
  sync_some(3, right || thread_index() < kWarp ? 64 : 32);  // HERE
  put(p, mine(p));
}

template <bool right>
__global__ void sync_some_without_all(const __grid_constant__ ProbeParams p) {
  if (right || thread_index() < kWarp) sync_some(3, 64);  // HERE
  put(p, mine(p));
}

// Two barriers of some threads order nothing between their threads.
template <bool right>
__global__ void sync_some_for_others(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index(), warp = thread / kWarp;
  store_shared(shared_word(thread), 0u);
  sync_block();
  store_shared(shared_word(thread), mine(p));  // BRANCH
  sync_some(right ? 1 : 1 + warp, right ? 64 : 32);
  put(p, load_shared<uint32_t>(shared_word(63 - thread)));  // BRANCH
}

// ---- Products of a warpgroup ----

template <bool right>
__global__ void operand_not_fenced(const __grid_constant__ ProbeParams p) {
  write_operands();
  if constexpr (right) fence_async();
  sync_block();
  float d[32] = {};
  begin_products();
  add_product<BFloat16>(d, part(0), part(kPart));  // HERE
  commit_products();
  wait_products<0>();
  put(p, text(d[0]));
}

template <bool right>
__global__ void fence_behind_barrier(const __grid_constant__ ProbeParams p) {
  write_operands();
  if constexpr (right) fence_async();
  sync_block();
  if constexpr (!right) fence_async();
  float d[32] = {};
  begin_products();
  add_product<BFloat16>(d, part(0), part(kPart));  // HERE
  commit_products();
  wait_products<0>();
  put(p, text(d[0]));
}

template <bool right>
__global__ void operand_never_written(const __grid_constant__ ProbeParams p) {
  write_operands();
  fence_async();
  sync_block();
  float d[32] = {};
  begin_products();
  add_product<BFloat16>(d, part(0), part(right ? kPart : kPart + 16));  // HERE
  commit_products();
  wait_products<0>();
  put(p, text(d[0]));
}

template <bool right>
__global__ void misaligned_operand(const __grid_constant__ ProbeParams p) {
  write_operands();
  fence_async();
  sync_block();
  float d[32] = {};
  begin_products();
  add_product<BFloat16>(d, part(right ? 0 : 8), part(kPart));  // HERE
  commit_products();
  wait_products<0>();
  put(p, text(d[0]));
}

template <bool right>
__global__ void products_not_begun(const __grid_constant__ ProbeParams p) {
  write_operands();
  fence_async();
  sync_block();
  float d[32] = {};
  if constexpr (right) begin_products();
  add_product<BFloat16>(d, part(0), part(kPart));  // HERE
  commit_products();
  wait_products<0>();
  put(p, text(d[0]));
}

// Two sums in turn: one is touched while the other's product goes on, and used again.
template <bool right>
__global__ void touched_since_begun(const __grid_constant__ ProbeParams p) {
  write_operands();
  fence_async();
  sync_block();
  float d[32] = {}, e[32] = {};
  begin_products();
  add_product<BFloat16>(d, part(0), part(kPart));
  commit_products();
  add_product<BFloat16>(e, part(0), part(kPart));
  commit_products();
  wait_products<1>();
  for (float& value : d) value += 1;
  if constexpr (right) begin_products();
  add_product<BFloat16>(d, part(0), part(kPart));  // HERE
  commit_products();
  wait_products<0>();
  put(p, text(d[0] + e[0]));
}

// No report: the sums are NaN until the wait.
template <bool right>
__global__ void sums_read_early(const __grid_constant__ ProbeParams p) {
  write_operands();
  fence_async();
  sync_block();
  float d[32] = {};
  begin_products();
  add_product<BFloat16>(d, part(0), part(kPart));
  commit_products();
  if constexpr (right) wait_products<0>();
  uint32_t numbers = 0;
  for (const float value : d) numbers += value == value;
  wait_products<0>();
  put(p, numbers);
}

template <bool right>
__global__ void products_never_waited_for(const __grid_constant__ ProbeParams p) {
  write_operands();
  fence_async();
  sync_block();
  float d[32] = {};
  begin_products();
  add_product<BFloat16>(d, part(0), part(kPart));  // HERE
  if constexpr (right) commit_products();
  wait_products<0>();
  put(p, 0);
}

template <bool right>
__global__ void divergent_lanes(const __grid_constant__ ProbeParams p) {
  write_operands();
  fence_async();
  sync_block();
  float d[32] = {};
  begin_products();
  add_product<BFloat16>(d, part(0), part(!right && thread_index() == 70 ? 0 : kPart));  // HERE
  commit_products();
  wait_products<0>();
  put(p, text(d[0]));
}

template <bool right>
__global__ void divergent_warps(const __grid_constant__ ProbeParams p) {
  write_operands();
  fence_async();
  sync_block();
  float d[32] = {};
  begin_products();
  add_product<BFloat16>(d, part(0), part(kPart), right || thread_index() >= kWarp);  // HERE
  commit_products();
  wait_products<0>();
  put(p, text(d[0]));
}

template <bool right>
__global__ void divergent_operands(const __grid_constant__ ProbeParams p) {
  write_operands();
  fence_async();
  sync_block();
  float d[32] = {};
  begin_products();
  add_product<BFloat16>(d, part(0), part(right || thread_index() >= kWarp ? kPart : 0));  // HERE
  commit_products();
  wait_products<0>();
  put(p, text(d[0]));
}

template <bool right>
__global__ void product_left_out(const __grid_constant__ ProbeParams p) {
  write_operands();
  fence_async();
  sync_block();
  float d[32] = {};
  begin_products();
  if (right || thread_index() / kWarp != 2) add_product<BFloat16>(d, part(0), part(kPart));  // HERE
  commit_products();
  wait_products<0>();
  put(p, text(d[0]));
}

template <bool right>
__global__ void product_of_half_a_group(const __grid_constant__ ProbeParams p) {
  if (!right || thread_index() < kWarpgroup) begin_products();  // HERE
  put(p, mine(p));
}

// A warpgroup multiplies what another warp loads, and gives the stage back.
enum class Release { at_once, early, one_for_all };
template <Release release>
HGFAST_DEVICE void products_of_stage(const ProbeParams& p) {
  const int thread = thread_index();
  const bool all = release != Release::one_for_all;
  if (thread == 0) {
    init_barrier(barrier(0), 1);
    init_barrier(barrier(1), all ? kWarpgroup : 1);
    fence_barriers();
  }
  sync_block();
  if (thread >= kWarpgroup) {
    if (thread > kWarpgroup) return put(p, 0);
    for (int round = 0; round < 2; ++round) {
      if (round) wait_barrier(barrier(1), 0);
      arrive_expecting(barrier(0), 2 * kPart);
      load_bulk(shared_memory(), p.input[0], 2 * kPart, barrier(0));
    }
    return put(p, 0);
  }
  float d[32] = {};
  for (int round = 0; round < 2; ++round) {
    wait_barrier(barrier(0), round);
    begin_products();
    add_product<BFloat16>(d, part(0), part(kPart));
    commit_products();
    if constexpr (release == Release::early) arrive(barrier(1));
    wait_products<0>();
    if constexpr (release == Release::at_once) arrive(barrier(1));
    if (!all && thread == 0) arrive(barrier(1));
  }
  put(p, text(d[0]));
}
template <bool right>
__global__ void released_before_the_products(const __grid_constant__ ProbeParams p) {
  products_of_stage<right ? Release::at_once : Release::early>(p);
}
template <bool right>
__global__ void one_arrives_for_all(const __grid_constant__ ProbeParams p) {
  products_of_stage<right ? Release::at_once : Release::one_for_all>(p);
}

// A thread reads part of an operand, and tells it to the first lane of each warp alone.
template <bool right>
__global__ void told_to_one_lane(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index(), lane = thread % kWarp;
  make_barriers(3, 1);
  if (thread == 0) {
    init_barrier(barrier(3), 4);
    fence_barriers();
  }
  if (thread < kWarpgroup) write_operands();
  fence_async();
  sync_block();
  uint32_t value = 0;
  if (thread == kWarpgroup) {
    value = load_shared<uint32_t>(shared_word(0));  // THERE
    arrive(barrier(0));
  } else if (thread == kWarpgroup + 1) {
    wait_barrier(barrier(3), 0);
    arrive_expecting(barrier(1), 16);
    load_bulk(shared_memory(), p.input[0], 16, barrier(1));  // HERE
    wait_barrier(barrier(1), 0);
  } else if (thread < kWarpgroup) {
    if (lane == 0) wait_barrier(barrier(0), 0);
    float d[32] = {};
    begin_products();
    add_product<BFloat16>(d, part(0), part(kPart));
    commit_products();
    wait_products<0>();
    value = text(d[0]);
    if (lane == (right ? 0 : 5)) arrive(barrier(3));
  }
  put(p, value);
}

// ---- Tiles ----

// A box of four pixels of eight channels; map[0] is of the output, map[1] of the input.
template <bool right>
__global__ void tile_not_fenced(const __grid_constant__ ProbeParams p) {
  store_shared(shared_word(thread_index()), mine(p));  // THERE
  if constexpr (right) fence_async();
  sync_block();
  if (thread_index() == 0) {
    store_tile(p.map[0], shared_memory(), 0, 0, 0, 0);  // HERE
    commit_stores();
    wait_stores<0>();
  }
}

template <bool right>
__global__ void tile_overwritten(const __grid_constant__ ProbeParams p) {
  store_shared(shared_word(thread_index()), mine(p));
  fence_async();
  sync_block();
  if (thread_index() == 0) {
    store_tile(p.map[0], shared_memory(), 0, 0, 0, 0);  // THERE
    commit_stores();
    if constexpr (right) wait_stores<0>();
    store_shared(shared_word(0), 0u);  // HERE
    wait_stores<0>();
  }
}

// The wait is of the thread that stored, and the others know of it behind a barrier alone.
template <bool right>
__global__ void tile_overwritten_by_others(const __grid_constant__ ProbeParams p) {
  const uint32_t value = mine(p);
  store_shared(shared_word(thread_index()), value);
  fence_async();
  sync_block();
  if (thread_index() == 0) {
    store_tile(p.map[0], shared_memory(), 0, 0, 0, 0);  // BRANCH
    commit_stores();
    wait_stores<0>();
  }
  if constexpr (right) sync_block();
  if (thread_index() == 20) store_shared(shared_word(4), value);  // BRANCH
}

template <bool right>
__global__ void tile_never_waited_for(const __grid_constant__ ProbeParams p) {
  store_shared(shared_word(thread_index()), mine(p));
  fence_async();
  sync_block();
  if (thread_index() == 0) {
    store_tile(p.map[0], shared_memory(), 0, 0, 0, 0);  // HERE
    commit_stores();
    if constexpr (right) wait_stores<0>();
  }
}

template <bool right>
__global__ void tile_not_committed(const __grid_constant__ ProbeParams p) {
  store_shared(shared_word(thread_index()), mine(p));
  fence_async();
  sync_block();
  if (thread_index() == 0) {
    store_tile(p.map[0], shared_memory(), 0, 0, 0, 0);  // HERE
    if constexpr (right) commit_stores();
    wait_stores<0>();
  }
}

template <bool right>
__global__ void tile_stored_twice(const __grid_constant__ ProbeParams p) {
  store_shared(shared_word(thread_index()), mine(p));
  fence_async();
  sync_block();
  if (thread_index() == 0) {
    store_tile(p.map[0], shared_memory(), 0, 0, 0, 0);              // THERE
    store_tile(p.map[0], shared_memory(), 0, right ? 4 : 3, 0, 0);  // HERE
    commit_stores();
    wait_stores<0>();
  }
}

template <bool right>
__global__ void misaligned_tile(const __grid_constant__ ProbeParams p) {
  make_barriers(1, 1);
  const Shared to = shared_memory() + (right ? 128 : 64);
  if (thread_index() == 0) {
    arrive_expecting(barrier(0), 64);
    load_tile(to, p.map[1], barrier(0), 0, 0, 0, 0);  // HERE
  }
  wait_barrier(barrier(0), 0);
  put(p, load_shared<uint32_t>(to + 4 * (thread_index() % 16)));
}

// Zeros are bytes, too.
template <bool right>
__global__ void bytes_without_zeros(const __grid_constant__ ProbeParams p) {
  make_barriers(1, 1);
  if (thread_index() == 0) {
    arrive_expecting(barrier(0), right ? 64 : 32);
    load_tile(shared_memory(), p.map[1], barrier(0), 0, -2, 0, 0);
  }
  wait_barrier(barrier(0), 0);  // HERE
  const uint32_t value = load_shared<uint32_t>(shared_word(thread_index() % 16));
  put(p, value);
}

// ---- Clusters of two blocks ----

template <bool right>
__global__ void barrier_of_other_block(const __grid_constant__ ProbeParams p) {
  sync_cluster();
  make_barriers(1, static_cast<int>(p.value[0]));
  if constexpr (right) sync_cluster();
  arrive_at(barrier(0), cluster_rank() ^ 1);  // HERE
  wait_barrier(barrier(0), 0);
  put(p, mine(p));
  sync_cluster();
}

template <bool right>
__global__ void block_not_begun(const __grid_constant__ ProbeParams p) {
  if constexpr (right) sync_cluster();
  store_remote(shared_word(thread_index()), cluster_rank() ^ 1, mine(p));  // HERE
  sync_cluster();
  put(p, load_shared<uint32_t>(shared_word(thread_index())));
}

template <bool right>
__global__ void remote_not_ordered(const __grid_constant__ ProbeParams p) {
  store_shared(shared_word(thread_index()), 0u);
  sync_cluster();
  store_remote(shared_word(thread_index()), cluster_rank() ^ 1, mine(p));  // BRANCH
  if constexpr (right)
    sync_cluster();
  else
    sync_block();
  put(p, load_shared<uint32_t>(shared_word(thread_index())));  // BRANCH
  sync_cluster();
}

// An arrival at another block's barrier orders no writes.
template <bool right>
__global__ void remote_told_by_arrival(const __grid_constant__ ProbeParams p) {
  make_barriers(1, static_cast<int>(p.value[0]));
  sync_cluster();
  store_remote(shared_word(thread_index()), cluster_rank() ^ 1, mine(p));
  if constexpr (right) sync_cluster();
  arrive_at(barrier(0), cluster_rank() ^ 1);  // HERE
  wait_barrier(barrier(0), 0);
  put(p, load_shared<uint32_t>(shared_word(thread_index())));
  sync_cluster();
}

// What is done between the two steps is ordered by neither.
template <bool right>
__global__ void between_the_steps(const __grid_constant__ ProbeParams p) {
  store_shared(shared_word(thread_index()), 0u);
  sync_cluster();
  if constexpr (!right) arrive_cluster();
  store_remote(shared_word(thread_index()), cluster_rank() ^ 1, mine(p));  // BRANCH
  if constexpr (right) arrive_cluster();
  wait_cluster();
  put(p, load_shared<uint32_t>(shared_word(thread_index())));  // BRANCH
  sync_cluster();
}

template <bool right>
__global__ void wait_without_arrival(const __grid_constant__ ProbeParams p) {
  if constexpr (right) arrive_cluster();
  wait_cluster();  // HERE
  put(p, mine(p));
}

// One lane takes another way to the same barrier.
template <bool right>
__global__ void lanes_apart_at_cluster(const __grid_constant__ ProbeParams p) {
  if (right || thread_index() != 9)
    sync_cluster();  // BRANCH
  else
    sync_cluster();  // BRANCH
  put(p, mine(p));
}

template <bool right>
__global__ void no_such_block(const __grid_constant__ ProbeParams p) {
  sync_cluster();
  store_remote(shared_word(thread_index()), cluster_rank() + (right ? 0 : 1), 7u);  // HERE
  put(p, mine(p));
  sync_cluster();
}

template <bool right>
__global__ void ends_before_an_arrival(const __grid_constant__ ProbeParams p) {
  make_barriers(1, static_cast<int>(p.value[0]));
  sync_cluster();
  put(p, mine(p));
  if (cluster_rank() == 1) arrive_at(barrier(0), 0);  // HERE
  if (right && cluster_rank() == 0) wait_barrier(barrier(0), 0);
}

template <bool right>
__global__ void ends_before_a_store(const __grid_constant__ ProbeParams p) {
  sync_cluster();
  put(p, mine(p));
  if (cluster_rank() == 1) store_remote(shared_word(thread_index()), 0, 7u);  // HERE
  if constexpr (right) sync_cluster();
}

template <bool right>
__global__ void ends_before_a_copy(const __grid_constant__ ProbeParams p) {
  const int bytes = 4 * static_cast<int>(p.value[0]);
  make_barriers(1, 1);
  if (thread_index() == 0) arrive_expecting(barrier(0), bytes);
  sync_cluster();
  put(p, mine(p));
  if (cluster_rank() == 1 && thread_index() == 0)
    load_bulk_multicast(shared_memory(), p.input[0], bytes, barrier(0), 3);  // HERE
  if (right || cluster_rank() == 1) wait_barrier(barrier(0), 0);
}

// The second copy goes to what the other block still reads.
template <bool right>
__global__ void multicast_over_readers(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index(), bytes = 4 * static_cast<int>(p.value[0]);
  make_barriers(1, 1);
  sync_cluster();
  uint32_t sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (thread == 0) {
      arrive_expecting(barrier(0), bytes);
      if (cluster_rank() == 0)
        load_bulk_multicast(shared_memory(), p.input[0], bytes, barrier(0), 3);
    }
    wait_barrier(barrier(0), round);
    sum += load_shared<uint32_t>(shared_word(thread));
    if constexpr (right)
      sync_cluster();
    else
      sync_block();
  }
  put(p, sum);
  sync_cluster();
}

// ---- Registers, and the kernel before ----

template <bool right>
__global__ void registers_never_free(const __grid_constant__ ProbeParams p) {
  if (thread_index() < kWarpgroup)
    lower_registers<40>();
  else
    raise_registers<right ? 216 : 224>();  // HERE
  put(p, mine(p));
}

template <bool right>
__global__ void raised_below(const __grid_constant__ ProbeParams p) {
  raise_registers<right ? 128 : 120>();  // HERE
  put(p, mine(p));
}

template <bool right>
__global__ void registers_of_one_warp(const __grid_constant__ ProbeParams p) {
  if (right || thread_index() / kWarp != 3) lower_registers<40>();  // HERE
  put(p, mine(p));
}

template <bool right>
__global__ void read_too_early(const __grid_constant__ ProbeParams p) {
  if constexpr (right) wait_for_previous_kernel();
  const uint32_t value = mine(p);  // of planted.h, where the report finds it
  wait_for_previous_kernel();
  put(p, value);
}

template <bool right>
__global__ void written_too_early(const __grid_constant__ ProbeParams p) {
  const auto value =
      load_global<uint32_t>(word(p.input[1], block_index() * p.value[0] + thread_index()));
  if (right || thread_index() != 33) wait_for_previous_kernel();
  store_global(word(p.output[0], block_index() * p.value[0] + thread_index()), value);  // HERE
}

template <bool right>
__global__ void tile_too_early(const __grid_constant__ ProbeParams p) {
  make_barriers(1, 1);
  if (thread_index() == 0) {
    if constexpr (right) wait_for_previous_kernel();
    arrive_expecting(barrier(0), 64);
    load_tile(shared_memory(), p.map[1], barrier(0), 0, 0, 0, 0);  // HERE
  }
  wait_barrier(barrier(0), 0);
  put(p, load_shared<uint32_t>(shared_word(thread_index() % 16)));
}

const Probe probes[] = {
    HGFAST_PLANTED(stage_read_early),
    HGFAST_PLANTED(wrong_parity),
    HGFAST_PLANTED(arrives_twice),
    HGFAST_PLANTED(too_many_arrivals),
    HGFAST_PLANTED(bytes_that_never_come),
    HGFAST_PLANTED(arrival_missing),
    HGFAST_PLANTED(barrier_used_unordered),
    HGFAST_PLANTED(barrier_not_fenced),
    HGFAST_PLANTED(store_onto_barrier),
    HGFAST_PLANTED(stage_not_released),
    HGFAST_PLANTED(loaded_twice),
    HGFAST_PLANTED(load_over_unfenced),
    HGFAST_PLANTED(load_never_waited_for),
    HGFAST_PLANTED(sync_some_of_other_counts),
    HGFAST_PLANTED(sync_some_without_all),
    HGFAST_PLANTED(sync_some_for_others),
    HGFAST_PLANTED(operand_not_fenced),
    HGFAST_PLANTED(fence_behind_barrier),
    HGFAST_PLANTED(operand_never_written),
    HGFAST_PLANTED(misaligned_operand),
    HGFAST_PLANTED(products_not_begun),
    HGFAST_PLANTED(touched_since_begun),
    HGFAST_PLANTED(sums_read_early),
    HGFAST_PLANTED(products_never_waited_for),
    HGFAST_PLANTED(divergent_lanes),
    HGFAST_PLANTED(divergent_warps),
    HGFAST_PLANTED(divergent_operands),
    HGFAST_PLANTED(product_left_out),
    HGFAST_PLANTED(product_of_half_a_group),
    HGFAST_PLANTED(released_before_the_products),
    HGFAST_PLANTED(one_arrives_for_all),
    HGFAST_PLANTED(told_to_one_lane),
    HGFAST_PLANTED(tile_not_fenced),
    HGFAST_PLANTED(tile_overwritten),
    HGFAST_PLANTED(tile_overwritten_by_others),
    HGFAST_PLANTED(tile_never_waited_for),
    HGFAST_PLANTED(tile_not_committed),
    HGFAST_PLANTED(tile_stored_twice),
    HGFAST_PLANTED(misaligned_tile),
    HGFAST_PLANTED(bytes_without_zeros),
    HGFAST_PLANTED(barrier_of_other_block),
    HGFAST_PLANTED(block_not_begun),
    HGFAST_PLANTED(remote_not_ordered),
    HGFAST_PLANTED(remote_told_by_arrival),
    HGFAST_PLANTED(between_the_steps),
    HGFAST_PLANTED(wait_without_arrival),
    HGFAST_PLANTED(lanes_apart_at_cluster),
    HGFAST_PLANTED(no_such_block),
    HGFAST_PLANTED(ends_before_an_arrival),
    HGFAST_PLANTED(ends_before_a_store),
    HGFAST_PLANTED(ends_before_a_copy),
    HGFAST_PLANTED(multicast_over_readers),
    HGFAST_PLANTED(registers_never_free),
    HGFAST_PLANTED(raised_below),
    HGFAST_PLANTED(registers_of_one_warp),
    HGFAST_PLANTED(read_too_early),
    HGFAST_PLANTED(written_too_early),
    HGFAST_PLANTED(tile_too_early),
};

}  // namespace
}  // namespace hgfast::cuda
