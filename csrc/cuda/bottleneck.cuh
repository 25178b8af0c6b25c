// A residual block, 1x1 -> 3x3 -> 1x1, in one kernel (see kernels.h for the formula).
//
// Why one kernel. Per pixel, 256 -> 128 -> 128 -> 256 channels are 426 kFLOP. Convolution by
// convolution the pixel's channels cross the memory bus a dozen times, 5 KB and more, and the 1x1
// convolutions run at the speed of memory. Here x is read once and y is written once, 1 KB: 416
// FLOP per byte, about twice what a large GPU multiplies while a byte arrives from its memory.
//
// A block computes one tile of y, all channels of it:
//
//   conv1   on the tile and a halo of one pixel around it: x comes through a ring in shared memory,
//           slice by slice of 32 channels; BN-ReLU is applied to the fragments in registers; the
//           result T1 stays in shared memory. Outside of the image T1 is 0: conv2 is padded with
//           zeros, not with conv1 of zeros.
//   conv2   nine shifted products over T1, its result T2 goes to shared memory, onto T1.
//   conv3   over T2, then over x once more where the shortcut is projected; the rest of the block
//           is added to the sums in registers, in float32, and y is rounded once.
//
// The halo is computed twice: conv1 on 180 pixels, in fragments 192, for a tile of 128 makes 7.7 %
// more FLOPs of the whole.
//
// Weights, 416 KB for 256/128, do not fit into shared memory. They come from L2 once for a tile,
// through a second ring, as one tape (see kernels.h) that lies in memory just as it is consumed:
// one pointer moves through all three convolutions, copies run two slices ahead of the products,
// and behind the end of one convolution the next one's weights are on their way already. On the
// tape a lane finds its fragments for two 8-column products in 16 consecutive bytes: no ldmatrix
// for weights, no bank conflicts.
//
// All matrix rows are pixels, all columns are channels: 16 pixels a fragment. Rows in shared
// memory are swizzled, so that the 8 rows that an ldmatrix reads lie in different banks wherever
// the 3x3 window stands.
#pragma once

#include "fragments.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace hgfast::cuda {

// An instance. A block makes `chunk` channels of a product at a time. With `single`, one chunk
// holds all middle channels, and what is dead lends its shared memory; otherwise middle is a
// run-time number of chunks. The warps share a product as a grid of warps_m (pixels) by warps_n
// (channels); registers are rationed so that they allow `resident` blocks on a multiprocessor.
// Shared memory allows as many on sm_90 and sm_100, and fewer on others.
template <class Element_, int chunk_, bool single_, int tile_h_, int tile_w_, int warps_m_,
          int warps_n_, int resident_>
struct BottleneckConfig {
  using T = Element_;
  static constexpr int chunk = chunk_;
  static constexpr bool single = single_;
  static constexpr int tile_h = tile_h_, tile_w = tile_w_;
  static constexpr int warps_m = warps_m_, warps_n = warps_n_;
  static constexpr int resident = resident_;

  static constexpr int threads = warps_m * warps_n * kWarp;
  static constexpr int halo_h = tile_h + 2, halo_w = tile_w + 2;
  static constexpr int halo_pixels = halo_h * halo_w;
  static constexpr int tile_pixels = tile_h * tile_w;
  // Fragments of a warp: pixels of conv1, pixels of conv2 and conv3, channels.
  static constexpr int halo_m = (halo_pixels + 16 * warps_m - 1) / (16 * warps_m);
  static constexpr int tile_m = tile_pixels / (16 * warps_m);
  static constexpr int n = chunk / (8 * warps_n);
  static constexpr int halo_rows = halo_m * warps_m * 16;

  static_assert(tile_pixels % (16 * warps_m) == 0, "whole fragments of pixels for each warp");
  static_assert(chunk % (32 * warps_n) == 0, "a quad of lanes exchanges four fragments");
  static_assert(chunk * kSliceColumns * 2 % (threads * 16) == 0, "all threads copy weights alike");

  // Shared memory.
  static constexpr int stages = 3;
  static constexpr int slice_row = kSliceColumns * 2;  // bytes
  static constexpr int weights_stage = chunk * slice_row;
  static constexpr int halo_stage = halo_rows * slice_row;
  static constexpr int tile_stage = tile_pixels * slice_row;  // x for the projection

  // Whether x for the projection is asked for before conv3 begins.
  static constexpr bool early = chunk / kSliceColumns < stages - 1;

  // Where things lie, for T1 and T2 with rows of so many bytes.
  struct Layout {
    int t1, t2, halo_ring, tile_ring, end;
  };
  static constexpr HGFAST_HOST_DEVICE Layout layout(int row, bool project) {
    constexpr int ring = stages * weights_stage;
    const int t1_bytes = halo_pixels * row, t2_bytes = tile_pixels * row;
    if (!single) {
      const int x = ring + t1_bytes + t2_bytes;
      return {ring, ring + t1_bytes, x, x, x + stages * halo_stage};
    }
    // The ring of x is read before T1 is written, T1 is read before T2 is written. The slices of x
    // for the projection are asked for while T2 is read; with a single slice of T2 already
    // while T1 is read.
    const int tile_ring = ring + (early && t1_bytes > t2_bytes ? t1_bytes : t2_bytes);
    int end = ring + (t1_bytes > stages * halo_stage ? t1_bytes : stages * halo_stage);
    if (project && tile_ring + stages * tile_stage > end) end = tile_ring + stages * tile_stage;
    return {ring, ring, ring, tile_ring, end};
  }
};

// One thread's part in a tile.
template <class Config>
struct BottleneckTile {
  using T = typename Config::T;
  static constexpr int kThreads = Config::threads;

  const BottleneckParams& p;
  const int lane = thread_index() % kWarp;
  const int warp_m = thread_index() / kWarp / Config::warps_n;
  const int warp_n = thread_index() / kWarp % Config::warps_n;
  // In fragments of pixels: the row whose address this lane gives to ldmatrix, and its column
  // (0 or 1, of 8 channels); in accumulators: the first row and the pair of columns.
  const int matrix_row = lane % 16, matrix_column = lane / 16;
  const int sum_row = lane / 4, quad = lane % 4;

  int image, y0, x0;  // the tile's place
  const char* x;      // the image

  // The tape's ring.
  int next = 0;    // slice to be asked for
  int stage = -1;  // of the slice being consumed

  // ---- Sizes; with one chunk nearly all of them are constants ----

  HGFAST_DEVICE int chunks() const {
    return Config::single ? 1 : (p.middle + Config::chunk - 1) / Config::chunk;
  }
  HGFAST_DEVICE int out_chunks() const { return (p.out + Config::chunk - 1) / Config::chunk; }
  HGFAST_DEVICE int in_slices() const { return (p.in + kSliceColumns - 1) / kSliceColumns; }
  HGFAST_DEVICE int middle_slices() const { return chunks() * (Config::chunk / kSliceColumns); }
  HGFAST_DEVICE int middle_row() const { return chunks() * Config::chunk * 2; }  // bytes
  HGFAST_DEVICE typename Config::Layout at() const {
    return Config::layout(middle_row(), p.project);
  }
  HGFAST_DEVICE int output_slices() const {
    return middle_slices() + (p.project ? in_slices() : 0);
  }
  HGFAST_DEVICE int conv2_begin() const { return chunks() * in_slices(); }
  HGFAST_DEVICE int conv3_begin() const { return conv2_begin() + chunks() * 9 * middle_slices(); }
  HGFAST_DEVICE int slices() const { return conv3_begin() + out_chunks() * output_slices(); }
  HGFAST_DEVICE static Shared memory() { return shared_memory(); }

  static constexpr int kHaloPieces = (Config::halo_rows * 4 + kThreads - 1) / kThreads;
  int halo_offset[kHaloPieces];  // where this thread's pieces of x are, in elements; -1: outside

  HGFAST_DEVICE explicit BottleneckTile(const BottleneckParams& params) : p(params) {
    const int tiles_x = (static_cast<int>(p.width) + Config::tile_w - 1) / Config::tile_w;
    const int tiles_y = (static_cast<int>(p.height) + Config::tile_h - 1) / Config::tile_h;
    const int tile = block_index() % (tiles_x * tiles_y);
    image = block_index() / (tiles_x * tiles_y);
    y0 = tile / tiles_x * Config::tile_h;
    x0 = tile % tiles_x * Config::tile_w;
    x = static_cast<const char*>(p.x) +
        static_cast<int64_t>(image) * p.x_height * p.x_width * p.in * 2;
#pragma unroll
    for (int i = 0; i < kHaloPieces; ++i)
      halo_offset[i] = offset_in_halo((thread_index() + i * kThreads) / 4);
  }

  // ---- Pixels ----

  HGFAST_DEVICE bool inside(int y, int x) const {
    return y >= 0 && y < p.height && x >= 0 && x < p.width;
  }
  // Where t's pixel is in x, in elements; -1 outside of the image.
  HGFAST_DEVICE int offset_of(int y, int x) const {
    if (!inside(y, x)) return -1;
    const int twice = p.pool ? 2 : 1;
    return (twice * y * static_cast<int>(p.x_width) + twice * x) * p.in;
  }
  HGFAST_DEVICE int offset_in_halo(int row) const {
    if (row >= Config::halo_pixels) return -1;
    return offset_of(y0 - 1 + row / Config::halo_w, x0 - 1 + row % Config::halo_w);
  }
  HGFAST_DEVICE int offset_in_tile(int row) const {
    return offset_of(y0 + row / Config::tile_w, x0 + row % Config::tile_w);
  }
  // 8 channels of t, from x as it is or pooled.
  HGFAST_DEVICE uint4 load_plain(int offset, int channel) const {
    return load_global<uint4>(x + int64_t{offset + channel} * 2);
  }
  HGFAST_DEVICE uint4 load_pooled(int offset, int channel) const {
    const char* from = x + int64_t{offset + channel} * 2;
    const int64_t right = int64_t{p.in} * 2, down = p.x_width * p.in * 2;
    const uint4 pieces[] = {load_global<uint4>(from), load_global<uint4>(from + right),
                            load_global<uint4>(from + down),
                            load_global<uint4>(from + down + right)};
    uint4 most = pieces[0];
#pragma unroll
    for (int i = 1; i < 4; ++i)
      most = {maximum<T>(most.x, pieces[i].x), maximum<T>(most.y, pieces[i].y),
              maximum<T>(most.z, pieces[i].z), maximum<T>(most.w, pieces[i].w)};
    return most;
  }

  // ---- Shared memory ----

  // 16 rows further on, the swizzle is the same.

  // A slice of x: rows of 64 bytes, in four pieces of 16.
  HGFAST_DEVICE static Shared slice_address(Shared base, int row, int piece) {
    return base + row * Config::slice_row + ((piece ^ (row / 2 % 4)) * 16);
  }
  // T1 and T2.
  HGFAST_DEVICE Shared middle_address(Shared base, int row, int piece) const {
    if constexpr (Config::chunk == 32) return slice_address(base, row, piece);
    return base + row * middle_row() + ((piece ^ (row % 8)) * 16);
  }

  // ---- The ring ----

  // 32 channels of t, from `column` on, into a stage of so many rows, 16 bytes a piece; zeros
  // outside of the image and behind the last channel. offset(row, i) says where a piece is.
  template <int rows, class Offset>
  HGFAST_DEVICE void ask_for_input(Shared stage_begin, int column, Offset&& offset) const {
    const int first = forget(thread_index());  // its row and piece; the next is 4 rows a warp on
    const int channel = column + first % 4 * 8;
    const auto to = [&](int i) { return slice_address(stage_begin, first / 4 + i, first % 4); };
    const auto real = [&](int from) { return from >= 0 && channel < p.in; };
    if (p.pool) {
#pragma unroll 1  // rare, and many registers a piece
      for (int row = 0; row < rows; row += kThreads / 4) {
        if (rows % (kThreads / 4) && first / 4 + row >= rows) break;
        const int from = offset(first / 4 + row, -1);
        store_shared(to(row), real(from) ? load_pooled(from, channel) : uint4{0, 0, 0, 0});
      }
    } else {
#pragma unroll
      for (int i = 0; i * (kThreads / 4) < rows; ++i) {
        const int row = i * (kThreads / 4);
        if (rows % (kThreads / 4) && first / 4 + row >= rows) break;
        const int from = offset(first / 4 + row, i);
        copy_async(to(row), real(from) ? x + int64_t{from + channel} * 2 : x, real(from));
      }
    }
  }

  // What of x a slice that is asked for may need.
  enum class Input { none, halo, tile };

  // Asks for the next slice of the tape and for what of x belongs to it.
  template <Input input>
  HGFAST_DEVICE void ask() {
    if (next < slices()) {
      const int to_stage = next % Config::stages;
      const int thread = forget(thread_index());
      const Shared to = memory() + to_stage * Config::weights_stage + thread * 16;
      const char* from = static_cast<const char*>(p.tape) +
                         static_cast<int64_t>(next) * Config::weights_stage + thread * 16;
#pragma unroll
      for (int i = 0; i < Config::weights_stage; i += kThreads * 16) copy_async(to + i, from + i);

      if constexpr (input == Input::halo) {
        if (next < conv2_begin())
          ask_for_input<Config::halo_rows>(
              memory() + at().halo_ring + to_stage * Config::halo_stage,
              (Config::single ? next : next % in_slices()) * kSliceColumns,
              [&](int row, int i) { return i < 0 ? offset_in_halo(row) : halo_offset[i]; });
      }
      if constexpr (input == Input::tile) {
        const int slice = (next - conv3_begin()) % output_slices() - middle_slices();
        if (next >= conv3_begin() && slice >= 0)
          ask_for_input<Config::tile_pixels>(
              memory() + at().tile_ring + to_stage * Config::tile_stage, slice * kSliceColumns,
              [&](int row, int) { return offset_in_tile(row); });
      }
      ++next;
    }
    commit_copies();
  }

  HGFAST_DEVICE void begin() {
    for (int i = 0; i < Config::stages - 1; ++i) ask<Input::halo>();
  }

  // To the next slice. The barrier shows everyone's copies to everyone, and says that nobody reads
  // the slice before any more, whose stage is filled again at once.
  template <Input input>
  HGFAST_DEVICE void step() {
    wait_copies<Config::stages - 2>();
    sync_block();
    ask<input>();
    stage = stage == Config::stages - 1 ? 0 : stage + 1;
  }

  // ---- Products ----

  // sums += a * weights for the 16 columns `half` of the slice; load(i, a) gives the fragments
  // of pixels. The weights' stay in registers meanwhile: there are fewer of them.
  template <int m, class Load>
  HGFAST_DEVICE void multiply(float (&sums)[m][Config::n][4], int half, Load&& load) const {
    const Shared weights = memory() + stage * Config::weights_stage + half * Config::chunk * 32 +
                           warp_n * Config::n * 256 + lane * 16;
    uint4 b[Config::n / 2];
#pragma unroll
    for (int n = 0; n < Config::n / 2; ++n) b[n] = load_shared<uint4>(weights + n * 512);
#pragma unroll
    for (int i = 0; i < m; ++i) {
      uint32_t a[4];
      load(i, a);
#pragma unroll
      for (int n = 0; n < Config::n / 2; ++n) {
        multiply_add<T>(sums[i][2 * n], a, b[n].x, b[n].y);
        multiply_add<T>(sums[i][2 * n + 1], a, b[n].z, b[n].w);
      }
    }
  }

  // Sums begin with the bias.
  template <int m>
  HGFAST_DEVICE void start(float (&sums)[m][Config::n][4], const float* bias, int chunk) const {
#pragma unroll
    for (int n = 0; n < Config::n; ++n) {
      const int column = chunk * Config::chunk + (warp_n * Config::n + n) * 8 + quad * 2;
      const float2 b = load_global<float2>(bias + column);
#pragma unroll
      for (int i = 0; i < m; ++i) {
        sums[i][n][0] = sums[i][n][2] = b.x;
        sums[i][n][1] = sums[i][n][3] = b.y;
      }
    }
  }

  // BN-ReLU on a fragment: the channels 2 * quad and the next, and the same 8 further on.
  HGFAST_DEVICE static void activate(uint32_t (&a)[4], const float2 (&scale)[2],
                                     const float2 (&shift)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 value = unpack<T>(a[i]), by = scale[i / 2], plus = shift[i / 2];
      a[i] = pack_relu<T>(fmaf(by.x, value.x, plus.x), fmaf(by.y, value.y, plus.y));
    }
  }

  // relu(sums) of a chunk into T1 or T2. `keep` says of a row (a pixel) whether it is
  // 0: outside of the image; 1: real; -1: not stored.
  template <int m, class Keep>
  HGFAST_DEVICE void store_middle(const float (&sums)[m][Config::n][4], Shared to, int chunk,
                                  Keep&& keep) const {
#pragma unroll
    for (int i = 0; i < m; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = (forget(warp_m) * m + i) * 16 + half * 8 + sum_row;
        const int kept = keep(row);
        if (kept < 0) continue;
#pragma unroll
        for (int n = 0; n < Config::n; ++n) {
          const int column = chunk * Config::chunk + (warp_n * Config::n + n) * 8;
          const uint32_t pair = pack_relu<T>(sums[i][n][2 * half], sums[i][n][2 * half + 1]);
          // Also behind the last channel: 0 times infinity is no 0.
          const bool real = kept && column < p.middle;
          store_shared(middle_address(to, row, column / 8) + quad * 4, real ? pair : 0u);
        }
      }
    }
  }

  HGFAST_DEVICE void conv1() {
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      float sums[Config::halo_m][Config::n][4];
      start(sums, p.b1, chunk);
      for (int slice = 0; slice < in_slices(); ++slice) {
        step<Input::halo>();
        const Shared from = memory() + at().halo_ring + stage * Config::halo_stage +
                            warp_m * Config::halo_m * 16 * Config::slice_row;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = slice * kSliceColumns + half * 16 + quad * 2;
          float2 scale[2], shift[2];
          if (p.scale) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              scale[i] = load_global<float2>(p.scale + column + i * 8);
              shift[i] = load_global<float2>(p.shift + column + i * 8);
            }
          }
          multiply(sums, half, [&](int i, uint32_t (&a)[4]) {
            load_matrices(a, slice_address(from + i * 16 * Config::slice_row, matrix_row,
                                           half * 2 + matrix_column));
            if (p.scale) activate(a, scale, shift);
          });
        }
      }
      if constexpr (Config::single) sync_block();  // T1 lies where x was read from
      store_middle(sums, memory() + at().t1, chunk, [&](int row) {
        if (row >= Config::halo_pixels) return -1;
        return inside(y0 - 1 + row / Config::halo_w, x0 - 1 + row % Config::halo_w) ? 1 : 0;
      });
    }
  }

  HGFAST_DEVICE void conv2() {
    int corner[Config::tile_m];  // the pixel of T1 at the window's upper left
#pragma unroll
    for (int i = 0; i < Config::tile_m; ++i) {
      const int row = (warp_m * Config::tile_m + i) * 16 + matrix_row;
      corner[i] = row / Config::tile_w * Config::halo_w + row % Config::tile_w;
    }
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      float sums[Config::tile_m][Config::n][4];
      start(sums, p.b2, chunk);
      for (int tap = 0; tap < 9; ++tap) {
        const int shift = tap / 3 * Config::halo_w + tap % 3;
#pragma unroll 1  // or its addresses take the registers of the sums
        for (int slice = 0; slice < middle_slices(); ++slice) {
          step<Config::early ? Input::tile : Input::none>();
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            multiply(sums, half, [&](int i, uint32_t (&a)[4]) {
              load_matrices(a, middle_address(memory() + at().t1, corner[i] + shift,
                                              slice * 4 + half * 2 + matrix_column));
            });
          }
        }
      }
      if constexpr (Config::single) sync_block();  // T2 lies where T1 was read from
      store_middle(sums, memory() + at().t2, chunk, [](int) { return 1; });
    }
  }

  HGFAST_DEVICE void conv3() {
    for (int chunk = 0; chunk < out_chunks(); ++chunk) {
      float sums[Config::tile_m][Config::n][4];
      start(sums, p.b3, chunk);
      for (int slice = 0; slice < output_slices(); ++slice) {
        step<Input::tile>();
        const Shared input = memory() + at().tile_ring + stage * Config::tile_stage;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          multiply(sums, half, [&](int i, uint32_t (&a)[4]) {
            const int row = (warp_m * Config::tile_m + i) * 16, piece = half * 2 + matrix_column;
            load_matrices(a,
                          slice < middle_slices()
                              ? middle_address(memory() + at().t2 + row * middle_row(), matrix_row,
                                               slice * 4 + piece)
                              : slice_address(input + row * Config::slice_row, matrix_row, piece));
          });
        }
      }
      store_output(sums, chunk);
    }
  }

  // ---- Output ----

  HGFAST_DEVICE void store_output(const float (&sums)[Config::tile_m][Config::n][4],
                                  int chunk) const {
    // The image in y and in low; offsets in an image are int.
    const int width = static_cast<int>(p.width);
    const int64_t begin = forget(image) * p.height * p.width * p.out * 2;
    char* const out = static_cast<char*>(p.y) + begin;
    const char* const low = static_cast<const char*>(p.low) + begin / 4;
    const auto channel_of = [&](int n) {
      return chunk * Config::chunk + (warp_n * Config::n + n + quad) * 8;
    };
#pragma unroll
    for (int i = 0; i < Config::tile_m; ++i) {
      const int first_row = (forget(warp_m) * Config::tile_m + i) * 16 + sum_row;
      int y[2], x[2];
      // All of the shortcut first, so that one wait is for all loads.
      uint4 shortcut[2][Config::n / 4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        y[half] = y0 + (first_row + half * 8) / Config::tile_w;
        x[half] = x0 + (first_row + half * 8) % Config::tile_w;
      }
      const auto fetch = [&](auto&& load) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int n = 0; n < Config::n; n += 4)
            if (inside(y[half], x[half]) && channel_of(n) < p.out)
              shortcut[half][n / 4] = load(offset_of(y[half], x[half]), channel_of(n));
      };
      if (!p.project) {
        if (p.pool)
          fetch([&](int offset, int channel) { return load_pooled(offset, channel); });
        else
          fetch([&](int offset, int channel) { return load_plain(offset, channel); });
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < Config::n; n += 4) {
          float2 v[4];
#pragma unroll
          for (int j = 0; j < 4; ++j)
            v[j] = {sums[i][n + j][2 * half], sums[i][n + j][2 * half + 1]};
          transpose_quad(v);  // by all lanes, also where nothing is stored

          const int channel = channel_of(n);
          if (!inside(y[half], x[half]) || channel >= p.out) continue;
          if (!p.project) add<T>(v, shortcut[half][n / 4]);
          if (p.relu) {
#pragma unroll
            for (float2& value : v) value = {relu(value.x), relu(value.y)};
          }
          if (p.low) {
            const int below = (y[half] / 2 * (width / 2) + x[half] / 2) * p.out + channel;
            add<T>(v, load_global<uint4>(low + int64_t{below} * 2));
          }
          store_global(out + int64_t{(y[half] * width + x[half]) * p.out + channel} * 2,
                       uint4{pack<T>(v[0].x, v[0].y), pack<T>(v[1].x, v[1].y),
                             pack<T>(v[2].x, v[2].y), pack<T>(v[3].x, v[3].y)});
        }
      }
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::resident)
    bottleneck_kernel(const __grid_constant__ BottleneckParams p) {
  BottleneckTile<Config> tile(p);
  tile.begin();
  tile.conv1();
  tile.conv2();
  tile.conv3();
}

}  // namespace hgfast::cuda
