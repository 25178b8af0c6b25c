// One small kernel for each part of csrc/cuda/hopper.cuh, for tests/test_emulator_hopper.py.
#include "cuda/hopper.cuh"
#include "emulator/registry.h"

namespace hgfast::cuda {
namespace {

using emulator::launch_probe;
using emulator::Probe;
using emulator::ProbeParams;

HGFAST_DEVICE uint32_t word(const char* array, int64_t index) {
  return load_global<uint32_t>(array + 4 * index);
}
HGFAST_DEVICE int number(const char* array, int64_t index) {
  return static_cast<int>(word(array, index));
}
HGFAST_DEVICE void put(char* array, int64_t index, uint32_t value) {
  store_global(array + 4 * index, value);
}
// So many bytes, a multiple of 16, by so many threads.
HGFAST_DEVICE void copy_in(Shared to, const char* from, int bytes, int threads) {
  for (int i = 16 * thread_index(); i < bytes; i += 16 * threads)
    store_shared(to + i, load_global<uint4>(from + i));
}
HGFAST_DEVICE void copy_out(char* to, Shared from, int bytes, int threads) {
  for (int i = 16 * thread_index(); i < bytes; i += 16 * threads)
    store_global(to + i, load_shared<uint4>(from + i));
}
// Barriers from an address on, all of so many arrivals. Behind it, the block may use them.
HGFAST_DEVICE void make_barriers(Barrier first, int count, int arrivals) {
  if (thread_index() == 0) {
    for (int i = 0; i < count; ++i) init_barrier(first + 8 * i, arrivals);
    fence_barriers();
  }
  sync_block();
}

// Products of a warpgroup. input[0]: value[0] bytes of shared memory; input[1]: for each of
// value[1] products the start, columns and rows of a and of b, whether it accumulates, to which of
// two sums it goes, and how many groups close behind it; input[2]: the two sums before, (2, 64, 2 *
// n) float32; input[3]: for a from registers, (products, 64, 16). output[0]: the first sums, when
// at most one group is under way, and then the second ones.
template <class T, int n, bool from_registers>
__global__ void products_probe(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index(), lane = thread % kWarp, warp = thread / kWarp;
  const Shared memory = shared_memory();
  copy_in(memory, p.input[0], static_cast<int>(p.value[0]), kWarpgroup);
  fence_async();
  sync_block();
  float d[2][n];
  const auto at = [&](int which, int i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    return ((which * 64 + row) * 2 * n + column) * 4;
  };
  for (int which = 0; which < 2; ++which)
    for (int i = 0; i < n; ++i) d[which][i] = load_global<float>(p.input[2] + at(which, i));
  begin_products();
  for (int64_t i = 0; i < p.value[1]; ++i) {
    const auto entry = [&](int j) { return number(p.input[1], i * 9 + j); };
    const auto part = [&](int j) { return operand(memory + entry(j), entry(j + 1), entry(j + 2)); };
    if constexpr (from_registers) {
      uint32_t a[4];
      for (int j = 0; j < 4; ++j)
        a[j] = word(p.input[3],
                    (i * 64 + warp * 16 + lane / 4 + j % 2 * 8) * 8 + lane % 4 + j / 2 * 4);
      add_product<T>(d[entry(7)], a, part(3), entry(6) != 0);
    } else {
      add_product<T>(d[entry(7)], part(0), part(3), entry(6) != 0);
    }
    for (int j = 0; j < entry(8); ++j) commit_products();
  }
  wait_products<1>();
  for (int i = 0; i < n; ++i) store_global(p.output[0] + at(0, i), d[0][i]);
  wait_products<0>();
  for (int i = 0; i < n; ++i) store_global(p.output[0] + at(1, i), d[1][i]);
}

// Boxes of map[0], input[1], one after the other. input[0]: value[0] rows (channel, x, y, image);
// output[0]: the value[1] bytes of each box as they lie in shared memory from value[2] on.
__global__ void load_tile_probe(const __grid_constant__ ProbeParams p) {
  const int bytes = static_cast<int>(p.value[1]);
  const Shared to = shared_memory() + static_cast<int>(p.value[2]);
  const Barrier full = to + bytes;
  make_barriers(full, 1, 1);
  for (int64_t i = 0; i < p.value[0]; ++i) {
    if (thread_index() == 0) {
      arrive_expecting(full, bytes);
      load_tile(to, p.map[0], full, number(p.input[0], 4 * i), number(p.input[0], 4 * i + 1),
                number(p.input[0], 4 * i + 2), number(p.input[0], 4 * i + 3));
    }
    wait_barrier(full, static_cast<int>(i & 1));
    copy_out(p.output[0] + i * bytes, to, bytes, kWarp);
    sync_block();
  }
}

// The way back: input[1] has the boxes as they lie in shared memory, map[0] is of output[0].
__global__ void store_tile_probe(const __grid_constant__ ProbeParams p) {
  const int bytes = static_cast<int>(p.value[1]);
  for (int64_t i = 0; i < p.value[0]; ++i) {
    const Shared from = shared_memory() + static_cast<int>(i % 2) * bytes;
    if (thread_index() == 0) wait_stores<1>();
    sync_block();
    copy_in(from, p.input[1] + i * bytes, bytes, kWarp);
    fence_async();
    sync_block();
    if (thread_index() == 0) {
      store_tile(p.map[0], from, number(p.input[0], 4 * i), number(p.input[0], 4 * i + 1),
                 number(p.input[0], 4 * i + 2), number(p.input[0], 4 * i + 3));
      commit_stores();
    }
  }
  if (thread_index() == 0) wait_stores<0>();
}

// The thread that asks for a box ends before it comes: its parameters are no longer there.
__global__ void brief_producer_probe(const __grid_constant__ ProbeParams p) {
  const int bytes = static_cast<int>(p.value[0]);
  const Barrier full = shared_memory() + bytes;
  make_barriers(full, 1, 1);
  if (thread_index() >= kWarp) {
    if (thread_index() == kWarp) {
      arrive_expecting(full, bytes);
      load_tile(shared_memory(), p.map[0], full, 0, 0, 0, 0);
    }
    return;
  }
  wait_barrier(full, 0);
  copy_out(p.output[0], shared_memory(), bytes, kWarp);
}

// value[0] bytes of input[0] for each block to value[1].
__global__ void load_bulk_probe(const __grid_constant__ ProbeParams p) {
  const int bytes = static_cast<int>(p.value[0]);
  const Shared to = shared_memory() + 16 + static_cast<int>(p.value[1]);
  make_barriers(shared_memory(), 1, 1);
  if (thread_index() == 0) {
    arrive_expecting(shared_memory(), bytes);
    load_bulk(to, p.input[0] + int64_t{block_index()} * bytes, bytes, shared_memory());
  }
  wait_barrier(shared_memory(), 0);
  copy_out(p.output[0] + int64_t{block_index()} * bytes, to, bytes, kWarp);
}

// Every block brings its value[0] bytes of input[0] to all blocks whose bits stand in input[1] at
// its rank, value[1] times. output[0]: (rounds, blocks, value[2] ranks, bytes), what came from each
// rank; of a rank that brought nothing, what lay there: ones.
__global__ void multicast_probe(const __grid_constant__ ProbeParams p) {
  const int bytes = static_cast<int>(p.value[0]), ranks = static_cast<int>(p.value[2]);
  const int rank = cluster_rank(), rounds = static_cast<int>(p.value[1]);
  const Barrier full = shared_memory();
  const Shared parts = shared_memory() + 16;
  int expected = 0;
  for (int from = 0; from < ranks; ++from)
    expected += (word(p.input[1], from) >> rank & 1) ? bytes : 0;
  for (int i = 16 * thread_index(); i < ranks * bytes; i += 16 * kWarp)
    store_shared(parts + i, uint4{~0u, ~0u, ~0u, ~0u});
  fence_async();
  make_barriers(full, 1, 1);
  for (int round = 0; round < rounds; ++round) {
    sync_cluster();
    const uint32_t to = word(p.input[1], rank);
    if (thread_index() == 0) {
      arrive_expecting(full, expected);
      const char* const from = p.input[0] + (int64_t{round} * p.value[3] + block_index()) * bytes;
      if (to) load_bulk_multicast(parts + rank * bytes, from, bytes, full, to);
    }
    wait_barrier(full, round & 1);
    copy_out(p.output[0] + (int64_t{round} * p.value[3] + block_index()) * ranks * bytes, parts,
             ranks * bytes, kWarp);
  }
  sync_cluster();
}

// A ring of value[1] stages of 16 bytes for each thread of value[2] consuming warps, value[0]
// rounds; the warp behind them produces. input[0]: (blocks, rounds, consumers) of 16 bytes.
// output[0]: (blocks, rounds, consumers), each read by the thread that stands across.
__global__ void ring_probe(const __grid_constant__ ProbeParams p) {
  const int rounds = static_cast<int>(p.value[0]), stages = static_cast<int>(p.value[1]);
  const int warps = static_cast<int>(p.value[2]), consumers = warps * kWarp,
            thread = thread_index();
  const int64_t first = int64_t{block_index()} * rounds * consumers * 16;
  const Barrier full = shared_memory(), empty = full + 8 * stages;
  const Shared ring = shared_memory() + 16 * stages;
  if (thread == 0)
    for (int i = 0; i < stages; ++i) init_barrier(full + 8 * i, 1);
  if (thread == kWarp - 1)
    for (int i = 0; i < stages; ++i) init_barrier(empty + 8 * i, warps);
  fence_barriers();
  sync_block();
  for (int round = 0; round < rounds; ++round) {
    const int stage = round % stages, time = round / stages;
    const Shared at = ring + stage * consumers * 16;
    if (thread >= consumers) {
      if (thread > consumers) break;
      if (time > 0) wait_barrier(empty + 8 * stage, (time - 1) & 1);
      // The second half of the bytes is announced when the first half may have come already.
      arrive_expecting(full + 8 * stage, consumers * 16);
      for (int half = 0; half < 2; ++half)
        load_bulk(at + half * consumers * 8,
                  p.input[0] + first + (int64_t{round} * 2 + half) * consumers * 8, consumers * 8,
                  full + 8 * stage);
      continue;
    }
    wait_barrier(full + 8 * stage, time & 1);
    const int other = consumers - 1 - thread;
    store_global(p.output[0] + first + (int64_t{round} * consumers + other) * 16,
                 load_shared<uint4>(at + 16 * other));
    sync_warp();
    if (thread % kWarp == 0) arrive(empty + 8 * stage);
  }
}

// Every block writes to the next one of its cluster of value[0], first words, then sixteen bytes.
// By barriers, too: each tells the one before that it has read them, which then writes a word more.
// input[0]: (blocks, 32, 8) words; output[0]: the same, from the block before.
template <bool by_barrier>
__global__ void remote_probe(const __grid_constant__ ProbeParams p) {
  const int ranks = static_cast<int>(p.value[0]), thread = thread_index();
  const int next = (cluster_rank() + 1) % ranks;
  const Shared memory = shared_memory() + 16;
  const int64_t first = (int64_t{block_index()} * kWarp + thread) * 32;
  if (thread == 0) {
    init_barrier(shared_memory(), kWarp);
    fence_barriers();
  }
  sync_cluster();
  for (int i = 0; i < 4; ++i)
    store_remote(memory + 32 * thread + 4 * i, next, word(p.input[0] + first, i));
  store_remote(memory + 32 * thread + 16, next, load_global<uint4>(p.input[0] + first + 16));
  arrive_cluster();
  wait_cluster();
  const int other = kWarp - 1 - thread;
  for (int i = 0; i < 2; ++i)
    store_global(p.output[0] + (int64_t{block_index()} * kWarp + other) * 32 + 16 * i,
                 load_shared<uint4>(memory + 32 * other + 16 * i));
  if constexpr (by_barrier) {
    arrive_at(shared_memory(), (cluster_rank() + ranks - 1) % ranks);
    wait_barrier(shared_memory(), 0);
    store_remote(memory + 32 * thread, next, 0u);  // over what all of that block have read
  }
  sync_cluster();
}

// Work between the two steps of the cluster's barrier, value[0] rounds: a block's own words.
__global__ void split_barrier_probe(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index(), rounds = static_cast<int>(p.value[0]);
  const int other = cluster_rank() ^ 1;
  const Shared theirs = shared_memory(), mine = shared_memory() + 4 * kWarp;
  uint32_t sum = word(p.input[0], block_index() * kWarp + thread);
  sync_cluster();
  for (int round = 0; round < rounds; ++round) {
    store_remote(theirs + 4 * thread, other, sum);
    arrive_cluster();
    store_shared(mine + 4 * thread, sum);
    sync_warp();
    sum = 3 * load_shared<uint32_t>(mine + 4 * (kWarp - 1 - thread));
    wait_cluster();
    sum += load_shared<uint32_t>(theirs + 4 * thread);
    sync_cluster();
  }
  put(p.output[0], block_index() * kWarp + thread, sum);
}

// Two teams of 64 threads hand words to and fro, value[0] rounds, and each among itself.
__global__ void sync_some_probe(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index(), team = thread / 64, rounds = static_cast<int>(p.value[0]);
  const auto at = [&](int who) { return shared_memory() + 4 * who; };
  uint32_t value = word(p.input[0], thread);
  for (int round = 0; round < rounds; ++round) {
    store_shared(at(thread), value);
    sync_some(1 + team, 64);
    value += load_shared<uint32_t>(at(team * 64 + (thread + 33) % 64));
    sync_some(15, 128);
    value = 5 * value + load_shared<uint32_t>(at(127 - thread));
    sync_some(15, 128);
  }
  put(p.output[0], thread, value);
}

// The first warpgroup gives registers to the others, which wait for them. output[0]: input[0].
__global__ void registers_probe(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index();
  if (thread < kWarpgroup)
    lower_registers<24>();
  else
    raise_registers<176>();
  put(p.output[0], thread, word(p.input[0], thread));
}

// input[0] is constant; input[1] may still be written when this kernel begins.
__global__ void programmatic_probe(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index();
  const uint32_t constant = word(p.input[0], thread);
  if (thread == 0) wait_for_previous_kernel();
  sync_block();
  let_next_kernel_begin();
  put(p.output[0], thread, constant + word(p.input[1], thread));
}

// A random program: input[0] holds for each of value[1] steps what each of value[0] threads does,
// what | which << 3 | value << 8: 0 nothing; 1 a read, 2 a write of word `value`; 3 arrives at
// barrier `which`; 4 waits for its phase `value`, 5 sync_some of barrier `which` for `value`
// threads; 6 sync_block. input[1]: for each of value[3] barriers, its arrivals. value[2]: words.
__global__ void hopper_program_probe(const __grid_constant__ ProbeParams p) {
  const int threads = static_cast<int>(p.value[0]), thread = thread_index();
  const int words = static_cast<int>(p.value[2]), barriers = static_cast<int>(p.value[3]);
  const Shared first = shared_memory() + 8 * barriers;
  if (thread == 0) {
    for (int i = 0; i < barriers; ++i) init_barrier(shared_memory() + 8 * i, number(p.input[1], i));
    fence_barriers();
  }
  for (int i = thread; i < words; i += threads) store_shared(first + 4 * i, 0u);
  sync_block();
  uint32_t sum = 0;
  for (int64_t step = 0; step < p.value[1]; ++step) {
    const uint32_t action = word(p.input[0], step * threads + thread);
    const int which = action >> 3 & 31, value = static_cast<int>(action >> 8);
    if ((action & 7) == 1) sum += load_shared<uint32_t>(first + 4 * value);
    if ((action & 7) == 2) store_shared(first + 4 * value, sum);
    if ((action & 7) == 3) arrive(shared_memory() + 8 * which);
    if ((action & 7) == 4) wait_barrier(shared_memory() + 8 * which, value & 1);
    if ((action & 7) == 5) sync_some(which, value);
    if ((action & 7) == 6) sync_block();
  }
  put(p.output[0], thread, sum);
}

const Probe probes[] = {
    {"products_bfloat16_64", launch_probe<products_probe<BFloat16, 32, false>>},
    {"products_bfloat16_128", launch_probe<products_probe<BFloat16, 64, false>>},
    {"products_float16_64", launch_probe<products_probe<Float16, 32, false>>},
    {"products_float16_128", launch_probe<products_probe<Float16, 64, false>>},
    {"products_bfloat16_64_registers", launch_probe<products_probe<BFloat16, 32, true>>},
    {"products_bfloat16_128_registers", launch_probe<products_probe<BFloat16, 64, true>>},
    {"products_float16_64_registers", launch_probe<products_probe<Float16, 32, true>>},
    {"products_float16_128_registers", launch_probe<products_probe<Float16, 64, true>>},
    {"load_tile", launch_probe<load_tile_probe>},
    {"store_tile", launch_probe<store_tile_probe>},
    {"brief_producer", launch_probe<brief_producer_probe>},
    {"load_bulk", launch_probe<load_bulk_probe>},
    {"multicast", launch_probe<multicast_probe>},
    {"ring", launch_probe<ring_probe>},
    {"remote_by_barrier", launch_probe<remote_probe<true>>},
    {"remote_by_cluster", launch_probe<remote_probe<false>>},
    {"split_barrier", launch_probe<split_barrier_probe>},
    {"sync_some", launch_probe<sync_some_probe>},
    {"registers", launch_probe<registers_probe>},
    {"programmatic", launch_probe<programmatic_probe>},
    {"hopper_program", launch_probe<hopper_program_probe>},
};

}  // namespace
}  // namespace hgfast::cuda
