// One small kernel for each function of csrc/cuda/device.cuh, for tests/test_emulator.py.
#include "cuda/device.cuh"
#include "emulator/registry.h"

namespace hgfast::cuda {
namespace {

using emulator::launch_probe;
using emulator::Probe;
using emulator::ProbeParams;

// The bytes of element `index` of an array of V.
template <class V>
HGFAST_DEVICE const void* at(const char* array, int64_t index) {
  return array + index * static_cast<int64_t>(sizeof(V));
}
template <class V>
HGFAST_DEVICE void* at(char* array, int64_t index) {
  return array + index * static_cast<int64_t>(sizeof(V));
}

// output[0] = d + a b, for a (16, 16), b (16, 8) and d (16, 8), row by row; a and b go through
// shared memory and load_matrices, b transposed by hand. A warp.
template <class T>
__global__ void product(const __grid_constant__ ProbeParams p) {
  const int lane = thread_index() % kWarp;
  const Shared memory = shared_memory();
  // Rows of 16 elements of a: the 16 bytes of half a row for each lane.
  store_shared(memory + 16 * lane, load_global<uint4>(at<uint4>(p.input[0], lane)));
  sync_warp();
  uint32_t a[4], b[2];
  const int row = lane % 8 + lane / 8 % 2 * 8, half = lane / 16;
  load_matrices(a, memory + row * 32 + half * 16);
  for (int i = 0; i < 2; ++i) {
    const int k = lane % 4 * 2 + i * 8, column = lane / 4;
    const auto element = [&](int row) {
      const int index = row * 8 + column;
      const auto pair = load_global<uint32_t>(at<uint32_t>(p.input[1], index / 2));
      return pair >> (16 * (index % 2)) & 0xffffu;
    };
    b[i] = element(k) | element(k + 1) << 16;
  }
  float d[4];
  for (int i = 0; i < 4; ++i)
    d[i] = load_global<float>(
        at<float>(p.input[2], (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2));
  multiply_add<T>(d, a, b[0], b[1]);
  for (int i = 0; i < 2; ++i)
    store_global(at<float>(p.output[0], (lane / 4 + i * 8) * 8 + lane % 4 * 2),
                 float2{d[2 * i], d[2 * i + 1]});
}

// input[0]: (blocks, value[0], 32) rows of 16 bytes; input[1]: (32) the offset of each lane's row;
// output[0]: (blocks, 32, 4) uint32, the fragments.
__global__ void load_matrices_probe(const __grid_constant__ ProbeParams p) {
  const int lane = thread_index(), rows = static_cast<int>(p.value[0]) * kWarp;
  const Shared memory = shared_memory();
  for (int row = lane; row < rows; row += kWarp)
    store_shared(memory + 16 * row,
                 load_global<uint4>(at<uint4>(p.input[0], int64_t{block_index()} * rows + row)));
  sync_warp();
  uint32_t fragment[4];
  load_matrices(fragment, memory + load_global<uint32_t>(at<uint32_t>(p.input[1], lane)));
  store_global(at<uint4>(p.output[0], int64_t{block_index()} * kWarp + lane),
               uint4{fragment[0], fragment[1], fragment[2], fragment[3]});
}

// The way back: fragments to rows.
__global__ void store_matrices_probe(const __grid_constant__ ProbeParams p) {
  const int lane = thread_index();
  const int64_t element = int64_t{block_index()} * kWarp + lane;
  const Shared memory = shared_memory();
  const auto value = load_global<uint4>(at<uint4>(p.input[0], element));
  const uint32_t fragment[4] = {value.x, value.y, value.z, value.w};
  store_matrices(memory + load_global<uint32_t>(at<uint32_t>(p.input[1], lane)), fragment);
  sync_warp();
  store_global(at<uint4>(p.output[0], element), load_shared<uint4>(memory + 16 * lane));
}

// input[0]: pairs of float32, output[0]: packed.
template <class T>
__global__ void pack_probe(const __grid_constant__ ProbeParams p) {
  const int64_t i = int64_t{block_index()} * p.value[0] + thread_index();
  const auto value = load_global<float2>(at<float2>(p.input[0], i));
  store_global(at<uint32_t>(p.output[0], i), pack<T>(value.x, value.y));
}

template <class T>
__global__ void unpack_probe(const __grid_constant__ ProbeParams p) {
  const int64_t i = int64_t{block_index()} * p.value[0] + thread_index();
  store_global(at<float2>(p.output[0], i),
               unpack<T>(load_global<uint32_t>(at<uint32_t>(p.input[0], i))));
}

template <class T>
__global__ void maximum_probe(const __grid_constant__ ProbeParams p) {
  const int64_t i = int64_t{block_index()} * p.value[0] + thread_index();
  store_global(at<uint32_t>(p.output[0], i),
               maximum<T>(load_global<uint32_t>(at<uint32_t>(p.input[0], i)),
                          load_global<uint32_t>(at<uint32_t>(p.input[1], i))));
}

__global__ void relu_probe(const __grid_constant__ ProbeParams p) {
  const int64_t i = int64_t{block_index()} * p.value[0] + thread_index();
  store_global(at<float>(p.output[0], i), relu(load_global<float>(at<float>(p.input[0], i))));
}

// value[0]: the mask; of uint32 and of float.
__global__ void shuffle_probe(const __grid_constant__ ProbeParams p) {
  const int i = thread_index();
  const int mask = static_cast<int>(p.value[0]);
  store_global(at<uint32_t>(p.output[0], i),
               shuffle_xor(load_global<uint32_t>(at<uint32_t>(p.input[0], i)), mask));
  store_global(at<float>(p.output[1], i),
               shuffle_xor(load_global<float>(at<float>(p.input[1], i)), mask));
}

// Every kind of V through shared memory, in a block whose threads each read what another wrote.
template <class V>
__global__ void exchange_probe(const __grid_constant__ ProbeParams p) {
  const int threads = static_cast<int>(p.value[0]), thread = thread_index();
  const int64_t first = int64_t{block_index()} * threads;
  const Shared memory = shared_memory();
  const auto size = static_cast<Shared>(sizeof(V));
  store_shared(memory + thread * size, load_global<V>(at<V>(p.input[0], first + thread)));
  sync_block();
  store_global(at<V>(p.output[0], first + thread),
               load_shared<V>(memory + (threads - 1 - thread) * size));
}

// Three groups in flight, round after round; rows from value[1] on are zeros.
// input[0], output[0]: (value[0] rounds, threads) of 16 bytes.
__global__ void copy_probe(const __grid_constant__ ProbeParams p) {
  const int rounds = static_cast<int>(p.value[0]), threads = static_cast<int>(p.value[2]);
  const Shared memory = shared_memory();
  const auto begin = [&](int round) {
    if (round < rounds)
      copy_async(memory + (round % 4 * threads + thread_index()) * 16,
                 at<uint4>(p.input[0], int64_t{round} * threads + thread_index()),
                 round < p.value[1]);
    commit_copies();
  };
  for (int round = 0; round < 3; ++round) begin(round);
  for (int round = 0; round < rounds; ++round) {
    wait_copies<2>();
    sync_block();
    begin(round + 3);
    const int other = threads - 1 - thread_index();
    store_global(at<uint4>(p.output[0], int64_t{round} * threads + other),
                 load_shared<uint4>(memory + (round % 4 * threads + other) * 16));
  }
  wait_copies<0>();
}

// value[0] times: load_matrices and multiply_add in every warp. For the speed of the emulator.
__global__ void work_probe(const __grid_constant__ ProbeParams p) {
  const int thread = thread_index();
  const Shared memory = shared_memory();
  store_shared(memory + 16 * thread, load_global<uint4>(at<uint4>(p.input[0], thread)));
  sync_block();
  float d[4] = {};
  for (int64_t i = 0; i < p.value[0]; ++i) {
    uint32_t a[4];
    load_matrices(a, memory + 16 * (thread ^ static_cast<int>(i % 8)));
    multiply_add<BFloat16>(d, a, a[0], a[1]);
  }
  store_global(at<float4>(p.output[0], thread), float4{d[0], d[1], d[2], d[3]});
}

// A random program: input[0] holds for each of value[1] steps what each thread does: nothing (0),
// read (1) or write (2) of a word, value << 2 | what. Behind a step all threads of a warp meet
// where input[1], for each step and warp, is 1, and all threads of the block where it is 2.
__global__ void program_probe(const __grid_constant__ ProbeParams p) {
  const int threads = static_cast<int>(p.value[0]), thread = thread_index();
  const int words = static_cast<int>(p.value[2]);
  for (int word = thread; word < words; word += threads)
    store_shared(shared_memory() + 4 * word, 0u);
  sync_block();
  uint32_t sum = 0;
  for (int64_t step = 0; step < p.value[1]; ++step) {
    const auto action = load_global<uint32_t>(at<uint32_t>(p.input[0], step * threads + thread));
    const Shared word = shared_memory() + 4 * (action >> 2);
    if ((action & 3) == 1) sum += load_shared<uint32_t>(word);
    if ((action & 3) == 2) store_shared(word, sum);
    const auto barrier =
        load_global<uint32_t>(at<uint32_t>(p.input[1], (step * threads + thread) / kWarp));
    if (barrier == 1) sync_warp();
    if (barrier == 2) sync_block();
  }
  store_global(at<uint32_t>(p.output[0], thread), sum);
}

// Reads value[0] rows of 16 bytes, value[1] times over.
__global__ void reread_probe(const __grid_constant__ ProbeParams p) {
  const int threads = 128;
  uint32_t sum = 0;
  for (int64_t time = 0; time < p.value[1]; ++time)
    for (int64_t row = thread_index(); row < p.value[0]; row += threads)
      sum += load_global<uint4>(at<uint4>(p.input[0], row)).x;
  store_global(at<uint4>(p.output[0], int64_t{block_index()} * threads + thread_index()),
               uint4{sum, sum, sum, sum});
}

const Probe probes[] = {
    {"product_bfloat16", launch_probe<product<BFloat16>>},
    {"product_float16", launch_probe<product<Float16>>},
    {"load_matrices", launch_probe<load_matrices_probe>},
    {"store_matrices", launch_probe<store_matrices_probe>},
    {"pack_bfloat16", launch_probe<pack_probe<BFloat16>>},
    {"pack_float16", launch_probe<pack_probe<Float16>>},
    {"unpack_bfloat16", launch_probe<unpack_probe<BFloat16>>},
    {"unpack_float16", launch_probe<unpack_probe<Float16>>},
    {"maximum_bfloat16", launch_probe<maximum_probe<BFloat16>>},
    {"maximum_float16", launch_probe<maximum_probe<Float16>>},
    {"relu", launch_probe<relu_probe>},
    {"shuffle", launch_probe<shuffle_probe>},
    {"exchange_uint32", launch_probe<exchange_probe<uint32_t>>},
    {"exchange_float", launch_probe<exchange_probe<float>>},
    {"exchange_float2", launch_probe<exchange_probe<float2>>},
    {"exchange_uint4", launch_probe<exchange_probe<uint4>>},
    {"exchange_float4", launch_probe<exchange_probe<float4>>},
    {"copy", launch_probe<copy_probe>},
    {"program", launch_probe<program_probe>},
    {"reread", launch_probe<reread_probe>},
    {"work", launch_probe<work_probe>},
};

}  // namespace
}  // namespace hgfast::cuda
