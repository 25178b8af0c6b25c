// Kernels with one mistake each, and the same without it, for tests/test_emulator.py. HERE marks
// the line where the report must find it, THERE the earlier one of two that collide, BRANCH both of
// two of which either may be first.
#include "planted.h"

namespace hgfast::cuda {
namespace {

// The second warp reads what the first one wrote.
template <bool right>
__global__ void read_after_write(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index();
  store_shared(shared_word(thread), mine(p));  // THERE
  if constexpr (right) sync_block();
  put(p, load_shared<uint32_t>(shared_word(thread % kWarp)));  // HERE
}

// The first warp writes again what the second one may still have to read.
template <bool right>
__global__ void write_after_read(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index();
  store_shared(shared_word(thread), mine(p));
  sync_block();
  uint32_t value = 0;
  if (thread >= kWarp) value = load_shared<uint32_t>(shared_word(thread - kWarp));  // THERE
  if constexpr (right) sync_block();
  store_shared(shared_word(thread), value + 1);  // HERE
  put(p, value);
}

// The second warp writes what the first one wrote.
template <bool right>
__global__ void write_after_write(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index();
  store_shared(shared_word(thread), mine(p));  // THERE
  if constexpr (right) sync_block();
  if (thread >= kWarp) store_shared(shared_word(thread - kWarp), 7u);  // HERE
  sync_block();
  put(p, load_shared<uint32_t>(shared_word(thread)));
}

// Every other lane reads what its neighbour wrote.
template <bool right>
__global__ void missing_sync_warp(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index();
  store_shared(shared_word(thread), mine(p));  // THERE
  if constexpr (right) sync_warp();
  put(p, load_shared<uint32_t>(shared_word(thread & ~1)));  // HERE
}

// A barrier of the warp where the word comes from another warp.
template <bool right>
__global__ void sync_warp_for_block(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index();
  store_shared(shared_word(thread), mine(p));  // THERE
  if constexpr (right)
    sync_block();
  else
    sync_warp();
  put(p, load_shared<uint32_t>(shared_word(thread % kWarp)));  // HERE
}

// Each lane writes a row, and a matrix takes its parts from all of them. A shuffle is no barrier.
template <bool right>
__global__ void matrices_without_barrier(const __grid_constant__ ProbeParams p) {
  const int lane = thread_index();
  const Shared row = shared_memory() + 16 * lane;
  store_shared(row, load_global<uint4>(p.input[0] + 16 * lane));  // THERE
  (void)shuffle_xor(0u, 1);
  if constexpr (right) sync_warp();
  uint32_t part[4];
  load_matrices(part, row);  // HERE
  store_global(p.output[0] + 16 * lane, uint4{part[0], part[1], part[2], part[3]});
}

// The sum of a word and its neighbours: one too far on the right edge.
template <bool right>
__global__ void wrong_halo(const __grid_constant__ ProbeParams p) {
  const int64_t last = p.input_bytes[0] / 4 - 1;
  const int64_t i = block_index() * p.value[0] + thread_index();
  uint32_t sum = load_global<uint32_t>(word(p.input[0], i));
  if (i > 0) sum += load_global<uint32_t>(word(p.input[0], i - 1));
  if (i < (right ? last : last + 1)) sum += load_global<uint32_t>(word(p.input[0], i + 1));  // HERE
  store_global(word(p.output[0], i), sum);
}

// Copies one row more than shared memory has.
template <bool right>
__global__ void copy_too_long(const __grid_constant__ ProbeParams p) {
  const int threads = static_cast<int>(p.value[0]), thread = thread_index();
  for (int i = thread; i < (right ? threads / 4 : threads / 4 + 1); i += threads)
    copy_async(shared_memory() + 16 * i, p.input[0] + 16 * i);  // HERE
  commit_copies();
  wait_copies<0>();
  sync_block();
  put(p, load_shared<uint32_t>(shared_word(thread)));
}

// Copies one row fewer than it reads.
template <bool right>
__global__ void copy_too_short(const __grid_constant__ ProbeParams p) {
  const int threads = static_cast<int>(p.value[0]), thread = thread_index();
  for (int i = thread; i < (right ? threads / 4 : threads / 4 - 1); i += threads)
    copy_async(shared_memory() + 16 * i, p.input[0] + 16 * i);
  commit_copies();
  wait_copies<0>();
  sync_block();
  put(p, load_shared<uint32_t>(shared_word(thread)));  // HERE
}

template <bool right>
__global__ void missing_wait(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index();
  if (thread < p.value[0] / 4)
    copy_async(shared_memory() + 16 * thread, p.input[0] + 16 * thread);  // THERE
  commit_copies();
  if constexpr (right) wait_copies<0>();
  sync_block();
  put(p, load_shared<uint32_t>(shared_word(thread)));  // HERE
  wait_copies<0>();
}

// The wait covers the calling thread's copies alone.
template <bool right>
__global__ void wait_without_barrier(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index();
  if (thread < p.value[0] / 4)
    copy_async(shared_memory() + 16 * thread, p.input[0] + 16 * thread);  // THERE
  commit_copies();
  wait_copies<0>();
  if constexpr (right) sync_block();
  put(p, load_shared<uint32_t>(shared_word(thread)));  // HERE
}

// Two groups; the second is read while one may be under way.
template <bool right>
__global__ void one_pending_too_many(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index();
  const Shared row = shared_memory() + 32 * thread;
  copy_async(row, p.input[0] + 32 * thread);
  commit_copies();
  copy_async(row + 16, p.input[0] + 32 * thread + 16);  // THERE
  commit_copies();
  wait_copies<1>();
  auto a = load_shared<uint4>(row);
  if constexpr (right) wait_copies<0>();
  const auto b = load_shared<uint4>(row + 16);  // HERE
  wait_copies<0>();
  a.x += b.x;
  put(p, a.x);
}

// A wait does not see copies that no group has.
template <bool right>
__global__ void missing_commit(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index();
  const Shared row = shared_memory() + 16 * thread;
  copy_async(row, p.input[0] + 16 * thread);  // THERE
  if constexpr (right) commit_copies();
  wait_copies<0>();
  put(p, load_shared<uint32_t>(row));  // HERE
}

// The next copies go to rows that the second warp may still have to read.
template <bool right>
__global__ void copy_over_readers(const __grid_constant__ ProbeParams p) {
  const int threads = static_cast<int>(p.value[0]), thread = thread_index();
  store_shared(shared_word(thread), mine(p));
  sync_block();
  uint32_t value = 0;
  if (thread >= kWarp) value = load_shared<uint32_t>(shared_word(threads - 1 - thread));  // THERE
  if constexpr (right) sync_block();
  if (thread < threads / 4)
    copy_async(shared_memory() + 16 * thread, p.input[0] + 16 * thread);  // HERE
  commit_copies();
  wait_copies<0>();
  put(p, value);
}

template <bool right>
__global__ void misaligned_shared(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index();
  const Shared row = shared_memory() + 16 * thread;
  const auto value = mine(p);
  store_shared(row + (right ? 8 : 4), float2{1, 2});  // HERE
  put(p, value);
}

template <bool right>
__global__ void misaligned_global(const __grid_constant__ ProbeParams p) {
  const int64_t i = thread_index();
  const int64_t shift = i == 0 && !right ? 1 : 0;
  const auto value = load_global<uint4>(word(p.input[0], 4 * i + shift));  // HERE
  put(p, value.x);
}

// One warp takes another barrier than the others.
template <bool right>
__global__ void divergent_barrier(const __grid_constant__ ProbeParams p) {
  if (right || thread_index() / kWarp != 1)
    sync_block();  // BRANCH
  else
    sync_block();  // BRANCH
  put(p, mine(p));
}

template <bool right>
__global__ void barrier_without_all(const __grid_constant__ ProbeParams p) {
  put(p, mine(p));
  if (!right && thread_index() == 5) return;
  sync_block();  // HERE
}

template <bool right>
__global__ void written_twice(const __grid_constant__ ProbeParams p) {
  const int64_t i = block_index() * p.value[0] + thread_index();
  const int64_t shift = !right && block_index() == 1 && thread_index() == 0 ? -1 : 0;
  store_global(word(p.output[0], i + shift), mine(p));  // HERE
}

template <bool right>
__global__ void never_written(const __grid_constant__ ProbeParams p) {
  if (right || thread_index() != 3 || block_index() != 1) put(p, mine(p));
}

template <bool right>
__global__ void write_to_input(const __grid_constant__ ProbeParams p) {
  const int64_t i = block_index() * p.value[0] + thread_index();
  const auto value = mine(p);
  put(p, value);
  if (!right) store_global(const_cast<char*>(p.input[0]) + 4 * i, value);  // HERE
}

template <bool right>
__global__ void read_of_output(const __grid_constant__ ProbeParams p) {
  const int64_t i = block_index() * p.value[0] + thread_index();
  const auto value = mine(p);
  put(p, value);
  if (!right) (void)load_global<uint32_t>(word(p.output[0], i));  // HERE
}

template <bool right>
__global__ void shuffle_without_all(const __grid_constant__ ProbeParams p) {
  auto value = mine(p);
  if (right || thread_index() != 9) value += shuffle_xor(value, 1);  // HERE
  put(p, value);
}

// All lanes take part, but not in the same one.
template <bool right>
__global__ void divergent_warp(const __grid_constant__ ProbeParams p) {
  auto value = mine(p);
  if (right || thread_index() % 2)
    value += shuffle_xor(value, 2);  // BRANCH
  else
    value += shuffle_xor(value, 2);  // BRANCH
  put(p, value);
}

template <bool right>
__global__ void in_flight_at_exit(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index();
  copy_async(shared_memory() + 16 * thread, p.input[0] + 16 * thread);  // HERE
  commit_copies();
  put(p, mine(p));
  if constexpr (right) wait_copies<0>();
}

const Probe probes[] = {
    HGFAST_PLANTED(read_after_write),     HGFAST_PLANTED(write_after_read),
    HGFAST_PLANTED(write_after_write),    HGFAST_PLANTED(missing_sync_warp),
    HGFAST_PLANTED(sync_warp_for_block),  HGFAST_PLANTED(matrices_without_barrier),
    HGFAST_PLANTED(wrong_halo),           HGFAST_PLANTED(copy_too_long),
    HGFAST_PLANTED(copy_too_short),       HGFAST_PLANTED(missing_wait),
    HGFAST_PLANTED(wait_without_barrier), HGFAST_PLANTED(one_pending_too_many),
    HGFAST_PLANTED(missing_commit),       HGFAST_PLANTED(copy_over_readers),
    HGFAST_PLANTED(misaligned_shared),    HGFAST_PLANTED(misaligned_global),
    HGFAST_PLANTED(divergent_barrier),    HGFAST_PLANTED(barrier_without_all),
    HGFAST_PLANTED(written_twice),        HGFAST_PLANTED(never_written),
    HGFAST_PLANTED(write_to_input),       HGFAST_PLANTED(read_of_output),
    HGFAST_PLANTED(shuffle_without_all),  HGFAST_PLANTED(divergent_warp),
    HGFAST_PLANTED(in_flight_at_exit),
};

}  // namespace
}  // namespace hgfast::cuda
