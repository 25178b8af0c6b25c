// The chain of a pixel behind an hourglass, 1x1-BN-ReLU, heatmaps and the way into the next stack,
// in one kernel (see kernels.h for the formulas).
//
// Why one kernel. Of 256 channels and 17 joints the chain is 271 kFLOP a pixel. As three
// convolutions z is written once and read twice: with y, x, next and the heatmaps 3.1 KB a pixel,
// 88 FLOP per byte, and so memory is the limit. Here z stays in shared memory: 1.6 KB, 173 FLOP
// per byte, about what a large GPU multiplies while a byte arrives. Without next, behind the last
// stack, it is the difference between 1.6 KB and 0.5 KB.
//
// A block computes a tile of pixels, consecutive ones of all images: nothing here knows of rows.
//
//   z         chunk by chunk of channels; y comes through a ring in shared memory, slice by slice
//             of 32 channels; z stays in shared memory, in 16 bits.
//   next      z times wn, chunk by chunk; x is added to the sums in registers, in float32, and next
//             is rounded once.
//   heatmaps  z times wh, 32 joints at a time: as many rows as a chunk would mostly be padding. A
//             pixel of 17 joints is 34 bytes, so they are put together in shared memory and leave
//             it 16 bytes at a time.
//
// Weights, 270 KB, come from L2 once for a tile, through a ring, as one tape in the order in which
// they are consumed (see kernels.h, and bottleneck.cuh for what lanes do with it). Tiles of 128
// pixels read 2.1 KB of weights a pixel, tiles of 32 four times as much: these are for small
// images, which would leave multiprocessors idle. Of 256 channels z takes 64 KB of the larger
// tile; so that 99 KB are enough for all of it, that ring has two stages instead of three.
//
// All matrix rows are pixels, all columns are channels. Rows in shared memory are swizzled, so that
// the 8 rows that an ldmatrix reads lie in different banks.
#pragma once

#include "fragments.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace hgfast::cuda {

// An instance: tiles of so many pixels, `chunk` channels of a product at a time, and rings of so
// many stages. Registers are rationed for `resident` blocks on a multiprocessor.
template <class Element_, int chunk_, int pixels_, int stages_, int resident_>
struct HeadConfig {
  using T = Element_;
  static constexpr int chunk = chunk_, pixels = pixels_, stages = stages_, resident = resident_;

  // Warps share a product as a grid of pixels by channels.
  static constexpr int warps_m = 2, warps_n = 2;
  static constexpr int threads = warps_m * warps_n * kWarp;
  static constexpr int m = pixels / (16 * warps_m);            // fragments of a warp: pixels,
  static constexpr int n = chunk / (8 * warps_n);              // channels of a chunk,
  static constexpr int joints_n = kJointRows / (8 * warps_n);  // joints
  static constexpr int slice_row = kSliceColumns * 2;          // bytes
  static constexpr int weights_stage = chunk * slice_row;
  static constexpr int joints_stage = kJointRows * slice_row;
  static constexpr int input_stage = pixels * slice_row;

  static_assert(pixels % (16 * warps_m) == 0, "whole fragments of pixels for each warp");
  static_assert(n % 4 == 0, "a quad of lanes exchanges four fragments");
  static_assert(joints_n % 2 == 0, "weights come for two fragments at a time");
  static_assert(joints_stage % (threads * 16) == 0, "all threads copy weights alike");
  static_assert(input_stage % (threads * 16) == 0, "all threads copy y alike");
  static_assert(chunk >= 64, "rows of z have eight pieces to swizzle");

  // Of the heatmaps in shared memory; 16 bytes more, so that 8 rows begin in different banks.
  static constexpr HGFAST_HOST_DEVICE int joints_row(int joints) { return joints * 2 + 16; }

  // Where things lie, for so many padded channels of z and joints. The heatmaps are put where y
  // came through.
  struct Layout {
    int z, input, end;
  };
  static constexpr HGFAST_HOST_DEVICE Layout layout(int middle, int joints) {
    const int z = stages * weights_stage, input = z + pixels * middle * 2;
    const int ring = stages * input_stage, maps = joints ? pixels * joints_row(joints) : 0;
    return {z, input, input + (maps > ring ? maps : ring)};
  }
};

// One thread's part in a tile.
template <class Config>
struct HeadTile {
  using T = typename Config::T;
  static constexpr int kThreads = Config::threads, kPixels = Config::pixels;

  const HeadParams& p;
  const int lane = thread_index() % kWarp;
  const int warp_m = thread_index() / kWarp / Config::warps_n;
  const int warp_n = thread_index() / kWarp % Config::warps_n;
  // As in bottleneck.cuh: a lane's row and column for ldmatrix, and those of its sums.
  const int matrix_row = lane % 16, matrix_column = lane / 16;
  const int sum_row = lane / 4, quad = lane % 4;

  const int64_t first = int64_t{block_index()} * kPixels;  // pixel
  const int valid;                                         // pixels of the tile

  // The tape's ring.
  int next = 0;    // slice to be asked for
  int stage = -1;  // of the slice being consumed

  HGFAST_DEVICE explicit HeadTile(const HeadParams& params)
      : p(params),
        valid(params.pixels - first < kPixels ? static_cast<int>(params.pixels - first) : kPixels) {
  }

  // ---- Sizes ----

  HGFAST_DEVICE static int chunks_of(int channels) {
    return (channels + Config::chunk - 1) / Config::chunk;
  }
  HGFAST_DEVICE int joint_chunks() const { return (p.joints + kJointRows - 1) / kJointRows; }
  HGFAST_DEVICE int in_slices() const { return (p.in + kSliceColumns - 1) / kSliceColumns; }
  HGFAST_DEVICE int middle() const { return chunks_of(p.middle) * Config::chunk; }
  HGFAST_DEVICE int middle_slices() const { return middle() / kSliceColumns; }
  HGFAST_DEVICE int z_slices() const { return chunks_of(p.middle) * in_slices(); }
  HGFAST_DEVICE int wide_slices() const {  // those of joints are narrower
    return z_slices() + chunks_of(p.out) * middle_slices();
  }
  HGFAST_DEVICE int slices() const { return wide_slices() + joint_chunks() * middle_slices(); }
  HGFAST_DEVICE typename Config::Layout at() const {
    return Config::layout(middle(), joint_chunks() * kJointRows);
  }
  HGFAST_DEVICE static Shared memory() { return shared_memory(); }

  // ---- Shared memory ----

  HGFAST_DEVICE static Shared slice_address(Shared base, int row, int piece) {
    return base + row * Config::slice_row + ((piece ^ (row / 2 % 4)) * 16);
  }
  HGFAST_DEVICE Shared z_address(int row, int piece) const {
    return memory() + at().z + row * middle() * 2 + ((piece ^ (row % 8)) * 16);
  }

  // ---- The ring ----

  // 32 channels of y, from `column` on, 16 bytes a piece; zeros behind the last pixel and the last
  // channel.
  HGFAST_DEVICE void ask_for_input(Shared to, int column) const {
    const int thread = forget(thread_index());
    const int channel = column + thread % 4 * 8;
    const char* const from = static_cast<const char*>(p.y) + (first * p.in + channel) * 2;
#pragma unroll
    for (int i = 0; i < kPixels; i += kThreads / 4) {
      const int row = i + thread / 4;
      const bool real = row < valid && channel < p.in;
      copy_async(slice_address(to, row, thread % 4), real ? from + int64_t{row} * p.in * 2 : p.y,
                 real);
    }
  }

  HGFAST_DEVICE void ask() {
    if (next < slices()) {
      const int to_stage = next % Config::stages, wide = wide_slices();
      const int thread = forget(thread_index()) * 16;
      const Shared to = memory() + to_stage * Config::weights_stage + thread;
      const char* from = static_cast<const char*>(p.tape) + thread;
      if (next < wide) {
        from += static_cast<int64_t>(next) * Config::weights_stage;
#pragma unroll
        for (int i = 0; i < Config::weights_stage; i += kThreads * 16) copy_async(to + i, from + i);
      } else {
        from += static_cast<int64_t>(wide) * Config::weights_stage +
                static_cast<int64_t>(next - wide) * Config::joints_stage;
#pragma unroll
        for (int i = 0; i < Config::joints_stage; i += kThreads * 16) copy_async(to + i, from + i);
      }
      if (next < z_slices())
        ask_for_input(memory() + at().input + to_stage * Config::input_stage,
                      next % in_slices() * kSliceColumns);
      ++next;
    }
    commit_copies();
  }

  // To the next slice. The barrier shows everyone's copies to everyone, and says that nobody reads
  // the slice before any more, whose stage is filled again at once.
  HGFAST_DEVICE void step() {
    wait_copies<Config::stages - 2>();
    sync_block();
    ask();
    stage = stage == Config::stages - 1 ? 0 : stage + 1;
  }

  // ---- Products ----

  // sums += a * weights for the slice, of `rows` rows; load(i, piece, a) gives the fragments of
  // pixels.
  template <int n, class Load>
  HGFAST_DEVICE void multiply(float (&sums)[Config::m][n][4], Load&& load) const {
    constexpr int rows = n * 8 * Config::warps_n;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Shared weights = memory() + stage * Config::weights_stage + half * rows * 32 +
                             warp_n * n * 256 + lane * 16;
      uint4 b[n / 2];
#pragma unroll
      for (int j = 0; j < n / 2; ++j) b[j] = load_shared<uint4>(weights + j * 512);
#pragma unroll
      for (int i = 0; i < Config::m; ++i) {
        uint32_t a[4];
        load(i, half * 2 + matrix_column, a);
#pragma unroll
        for (int j = 0; j < n / 2; ++j) {
          multiply_add<T>(sums[i][2 * j], a, b[j].x, b[j].y);
          multiply_add<T>(sums[i][2 * j + 1], a, b[j].z, b[j].w);
        }
      }
    }
  }

  // The first channel of a fragment of sums.
  template <int n>
  HGFAST_DEVICE int column_of(int chunk, int j) const {
    return ((chunk * Config::warps_n + warp_n) * n + j) * 8;
  }

  // Sums begin with the bias.
  template <int n>
  HGFAST_DEVICE void start(float (&sums)[Config::m][n][4], const float* bias, int chunk) const {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float2 b = load_global<float2>(bias + column_of<n>(chunk, j) + quad * 2);
#pragma unroll
      for (int i = 0; i < Config::m; ++i) {
        sums[i][j][0] = sums[i][j][2] = b.x;
        sums[i][j][1] = sums[i][j][3] = b.y;
      }
    }
  }

  // Calls visit(row, j, first, second) for the pairs of sums that this lane holds.
  template <int n, class Visit>
  HGFAST_DEVICE void each_pair(const float (&sums)[Config::m][n][4], Visit&& visit) const {
#pragma unroll
    for (int i = 0; i < Config::m; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < n; ++j)
          visit((forget(warp_m) * Config::m + i) * 16 + half * 8 + sum_row, j, sums[i][j][2 * half],
                sums[i][j][2 * half + 1]);
  }

  HGFAST_DEVICE void make_z() {
    for (int chunk = 0; chunk < chunks_of(p.middle); ++chunk) {
      float sums[Config::m][Config::n][4];
      start(sums, p.b1, chunk);
#pragma unroll 1
      for (int slice = 0; slice < in_slices(); ++slice) {
        step();
        const Shared input = memory() + at().input + stage * Config::input_stage;
        multiply(sums, [&](int i, int piece, uint32_t (&a)[4]) {
          const int row = (warp_m * Config::m + i) * 16;
          load_matrices(a, slice_address(input + row * Config::slice_row, matrix_row, piece));
        });
      }
      each_pair(sums, [&](int row, int j, float a, float b) {
        const int column = column_of<Config::n>(chunk, j);
        // Also behind the last channel: 0 times infinity is no 0.
        const uint32_t pair = column < p.middle ? pack_relu<T>(a, b) : 0u;
        store_shared(z_address(row, column / 8) + quad * 4, pair);
      });
    }
  }

  template <int n>
  HGFAST_DEVICE void multiply_z(float (&sums)[Config::m][n][4]) {
#pragma unroll 1
    for (int slice = 0; slice < middle_slices(); ++slice) {
      step();
      multiply(sums, [&](int i, int piece, uint32_t (&a)[4]) {
        load_matrices(a, z_address((warp_m * Config::m + i) * 16 + matrix_row, slice * 4 + piece));
      });
    }
  }

  HGFAST_DEVICE void make_next() {
    for (int chunk = 0; chunk < chunks_of(p.out); ++chunk) {
      float sums[Config::m][Config::n][4];
      start(sums, p.bn, chunk);
      multiply_z(sums);
      store_next(sums, chunk);
    }
  }

  HGFAST_DEVICE void make_heatmaps() {
    const int joints_row = Config::joints_row(joint_chunks() * kJointRows);
    for (int chunk = 0; chunk < joint_chunks(); ++chunk) {
      float sums[Config::m][Config::joints_n][4];
      start(sums, p.bh, chunk);
      multiply_z(sums);
      each_pair(sums, [&](int row, int j, float a, float b) {
        const int joint = column_of<Config::joints_n>(chunk, j) + quad * 2;
        store_shared(memory() + at().input + row * joints_row + joint * 2, pack<T>(a, b));
      });
    }
    if (joint_chunks() == 0) return;
    sync_block();
    // Their elements lie one behind the other; a tile begins at a multiple of 16 bytes.
    char* const to = static_cast<char*>(p.heatmaps) + first * p.joints * 2;
    const int elements = valid * p.joints;
    for (int begin = thread_index() * 8; begin < elements; begin += kThreads * 8) {
      int row = begin / p.joints, joint = begin % p.joints;
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint32_t element = 0;
        if (begin + i < elements)
          element = load_shared<uint16_t>(memory() + at().input + row * joints_row + joint * 2);
        pairs[i / 2] = i % 2 ? pairs[i / 2] | element << 16 : element;
        if (++joint == p.joints) joint = 0, ++row;
      }
      store_global(to + int64_t{begin} * 2, uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
    }
  }

  // ---- Output ----

  HGFAST_DEVICE void store_next(const float (&sums)[Config::m][Config::n][4], int chunk) const {
#pragma unroll
    for (int i = 0; i < Config::m; ++i) {
      int64_t offset[2];  // of the pixel, in bytes; of its first channel for this lane
      uint4 x[2][Config::n / 4] = {};
      const auto channel_of = [&](int j) { return column_of<Config::n>(chunk, j + quad); };
      const auto row_of = [&](int half) {
        return (forget(warp_m) * Config::m + i) * 16 + half * 8 + sum_row;
      };
      // All of x first, so that one wait is for all loads.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        offset[half] = (first + row_of(half)) * p.out * 2;
        if (!p.x) continue;
#pragma unroll
        for (int j = 0; j < Config::n; j += 4)
          if (row_of(half) < valid && channel_of(j) < p.out)
            x[half][j / 4] = load_global<uint4>(static_cast<const char*>(p.x) + offset[half] +
                                                channel_of(j) * 2);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < Config::n; j += 4) {
          float2 v[4];
#pragma unroll
          for (int k = 0; k < 4; ++k)
            v[k] = {sums[i][j + k][2 * half], sums[i][j + k][2 * half + 1]};
          transpose_quad(v);  // by all lanes, also where nothing is stored

          if (row_of(half) >= valid || channel_of(j) >= p.out) continue;
          if (p.x) add<T>(v, x[half][j / 4]);
          store_global(static_cast<char*>(p.next) + offset[half] + channel_of(j) * 2,
                       uint4{pack<T>(v[0].x, v[0].y), pack<T>(v[1].x, v[1].y),
                             pack<T>(v[2].x, v[2].y), pack<T>(v[3].x, v[3].y)});
        }
      }
    }
  }

  HGFAST_DEVICE void run() {
    for (int i = 0; i < Config::stages - 1; ++i) ask();
    make_z();
    make_next();
    make_heatmaps();
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::resident)
    head_kernel(const __grid_constant__ HeadParams p) {
  HeadTile<Config> tile(p);
  tile.run();
}

}  // namespace hgfast::cuda
