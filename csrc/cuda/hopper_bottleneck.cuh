// A residual block, 1x1 -> 3x3 -> 1x1, in one kernel on Hopper (see hopper_bottleneck.h).
//
// Why another kernel. mma.sync reads a fragment of weights from shared memory for each 16 to 64
// pixels, 166 bytes a product of 16x8x16 in bottleneck.cuh, and a multiprocessor moves 128 a clock
// while it could multiply one such product in half a clock: at best three quarters of the peak.
// wgmma reads both operands out of shared memory by itself, weights once for 64 pixels and 128
// channels: 6 KB for the 64 clocks of a product, 96 bytes a clock.
//
// A block computes tiles of 16x16 pixels, all channels, one after the other. Four warpgroups of
// consumers have a quarter of 8x8 pixels each, the 64 rows of their products; one warp of a fifth
// group is the producer, which keeps a ring of nine stages of 16 KB full. Everything comes through
// that ring, in the order in which it is used: weights, slices of x, the shortcut, low. So copies
// run up to nine stages ahead, over the borders of convolutions and of tiles.
//
//   conv1   x by the copy engine, 32 channels at a time, through registers, where BN-ReLU is
//           applied (hence x may be NHWC: it is never an operand in shared memory). First the 256
//           pixels of the tile, a warpgroup its quarter; then the 68 around it, as two times 64
//           rows for two times 64 channels. T1, 18x18 pixels, goes to shared memory as planes of 8
//           channels: [channel / 8][pixel][8], 0 outside of the image.
//   conv2   nine shifted windows of T1 as operands. A pixel is 16 bytes, so a window begins at a
//           multiple of 16; eight pixels side by side are the 128 bytes that a descriptor without
//           swizzle calls a core matrix; the next eight lie a row of 18 pixels further on.
//   conv3   conv2's sums, rounded, are the fragments of its first operand: T2 never leaves the
//           registers. 64 channels of y at a time; shortcut and low are added in float32 and y is
//           rounded once, onto the shortcut's stage, from where the copy engine takes it. The 2x2
//           maximum of y, if the next block pools: two pixels of a column are in one thread, two of
//           a row four lanes apart.
//
// Two blocks form a cluster and go in step: each asks for half of the weights and has them brought
// to both. A tile takes 416 KB of weights (the 68 pixels: 64 KB once more), so of L2 240 KB for
// 109 MFLOP; x comes once and the shortcut once.
//
// Redundant: 384 rows are multiplied for the 324 pixels of T1, 256 of them needed: 7.7 %.
//
// Registers: 96 for each of 640 threads when it begins; the producers keep 32, the consumers take
// 112: 64 sums, or 32 and 32 of fragments.
#pragma once

#include "hopper.cuh"
#include "hopper_bottleneck.h"
#include "launch.cuh"

namespace hgfast::cuda {

// What the kernel gets.
struct HopperTileParams {
  BottleneckParams block;
  void* pooled;
  HopperTape tape;
  // Boxes of 32 channels: of x a quarter (8x8 pixels), a row and a column around the tile; of low a
  // tile; of y two rows of a quarter, of pooled one.
  TensorMap x_quarter, x_row, x_column, low, y, y_pooled;
  int tiles_x, tiles_y, pairs;  // pairs of tiles
};

struct HopperLayout {
  static constexpr int kThreads = 640, kConsumers = 512, kRegisters = 96;
  static constexpr int kCluster = 2;
  static constexpr int kTile = 16, kHalo = 18, kPixels = kHalo * kHalo;
  static constexpr int kAround = kPixels - kTile * kTile;  // pixels of the halo alone
  static constexpr int kPixel = 16, kRow = kHalo * kPixel, kPlane = kPixels * kPixel;  // of T1

  static constexpr int kStages = 9, kStage = 16384;
  static constexpr int kT1 = kStages * kStage;
  static constexpr int kBarriers = kT1 + HopperTape::kMiddle / 8 * kPlane;
  static constexpr int kEnd = kBarriers + 2 * kStages * 8;
  static_assert(kEnd <= 232448, "what a block may have on sm_90");

  // A slice of x: 32 channels, rows of 64 bytes, swizzled; a quarter has 64 rows.
  static constexpr int kSlice = 32, kSliceRow = 64, kQuarter = 64 * kSliceRow;
  // Around the tile: the row above it, the row below, the columns left and right of it. Each begins
  // where the swizzle does.
  static constexpr int kAbove = 0, kBelow = 1536, kLeft = 3072, kRight = 4096, kAroundSlice = 5120;
  // low's slice; the pooled rows of a warp.
  static constexpr int kLowSlice = 8 * 8 * kSliceRow, kPooled = 512;

  static HGFAST_DEVICE Shared stage(int number) { return shared_memory() + number * kStage; }
  static HGFAST_DEVICE Barrier full(int stage) { return shared_memory() + kBarriers + stage * 8; }
  static HGFAST_DEVICE Barrier empty(int stage) { return full(stage) + kStages * 8; }

  // 16 bytes of a row of a slice that begins at `base`.
  static HGFAST_DEVICE Shared piece(Shared base, int row, int number) {
    return base + row * kSliceRow + ((number ^ (row / 2 % 4)) * 16);
  }
};

// A place in the ring, which goes round.
struct HopperStage {
  int number = 0, parity = 0;
  HGFAST_DEVICE void advance() {
    if (++number == HopperLayout::kStages) {
      number = 0;
      parity ^= 1;
    }
  }
};

struct HopperTilePlace {
  int image, y, x;  // of the tile's first pixel; behind the last tile an image that is not there
  HGFAST_DEVICE HopperTilePlace(const HopperTileParams& p, int pair) {
    const int tile = pair * HopperLayout::kCluster + cluster_rank(),
              of_image = p.tiles_x * p.tiles_y;
    image = tile / of_image;
    y = tile % of_image / p.tiles_x * HopperLayout::kTile;
    x = tile % p.tiles_x * HopperLayout::kTile;
  }
};

// The one thread that asks for everything.
struct HopperProducer : HopperLayout {
  const HopperTileParams& p;
  HopperStage at;
  bool first_round = true;

  HGFAST_DEVICE explicit HopperProducer(const HopperTileParams& params) : p(params) {}

  // The next stage, once nobody in the cluster reads it any more; so many bytes will come.
  HGFAST_DEVICE int next(int bytes) {
    const int stage = at.number;
    if (!first_round) wait_barrier(empty(stage), at.parity ^ 1);
    arrive_expecting(full(stage), bytes);
    at.advance();
    if (at.number == 0) first_round = false;
    return stage;
  }
  // Half of them, for both blocks; the other one asks for the other half.
  HGFAST_DEVICE void weights(int64_t element, int elements) {
    const int to = next(elements * 2), half = elements * 2 / kCluster, rank = cluster_rank();
    load_bulk_multicast(stage(to) + rank * half,
                        static_cast<const char*>(p.block.tape) + element * 2 + rank * half, half,
                        full(to), (1u << kCluster) - 1);
  }
  HGFAST_DEVICE void quarters(const HopperTilePlace& tile, int channel) {
    const int to = next(4 * kQuarter);
    for (int i = 0; i < 4; ++i)
      load_tile(stage(to) + i * kQuarter, p.x_quarter, full(to), channel, tile.x + i % 2 * 8,
                tile.y + i / 2 * 8, tile.image);
  }
  HGFAST_DEVICE void around(const HopperTilePlace& tile, int channel) {
    const int to = next(2 * kAround * kSliceRow);
    for (int i = 0; i < 2; ++i) {
      const Shared slice = stage(to) + i * kAroundSlice;
      const int from = channel + i * kSlice;
      load_tile(slice + kAbove, p.x_row, full(to), from, tile.x - 1, tile.y - 1, tile.image);
      load_tile(slice + kBelow, p.x_row, full(to), from, tile.x - 1, tile.y + kTile, tile.image);
      load_tile(slice + kLeft, p.x_column, full(to), from, tile.x - 1, tile.y, tile.image);
      load_tile(slice + kRight, p.x_column, full(to), from, tile.x + kTile, tile.y, tile.image);
    }
  }

  HGFAST_DEVICE void produce(const HopperTilePlace& tile) {
    constexpr int kItem = HopperTape::kColumns * HopperTape::kMiddle;
    constexpr int kColumns = HopperTape::kColumns;
    for (int column = 0; column < p.block.in; column += kColumns) {
      weights(int64_t{column} * HopperTape::kMiddle, kItem);
      quarters(tile, column);
      quarters(tile, column + kSlice);
    }
    for (int column = 0; column < p.block.in; column += kColumns) {
      weights(int64_t{column} * HopperTape::kMiddle, kItem);
      around(tile, column);
    }
    for (int i = 0; i < 18; ++i) weights(p.tape.conv2 + int64_t{i} * kItem, kItem);
    for (int out = 0; out < p.block.out; out += HopperTape::kOut) {
      const int64_t begin = p.tape.conv3 + out / HopperTape::kOut * p.tape.output;
      weights(begin, kItem);
      if (p.block.project)
        for (int column = 0; column < p.block.in; column += kColumns) {
          weights(begin + kItem + int64_t{column} * HopperTape::kOut, kItem / 2);
          quarters(tile, column);
          quarters(tile, column + kSlice);
        }
      if (p.block.low) {
        const int to = next(2 * kLowSlice);
        for (int i = 0; i < 2; ++i)
          load_tile(stage(to) + i * kLowSlice, p.low, full(to), out + i * kSlice, tile.x / 2,
                    tile.y / 2, tile.image);
      }
      if (p.pooled) (void)next(0);  // room for what the consumers write
      for (int i = 0; i < 2; ++i)
        if (p.block.project)
          (void)next(0);
        else
          quarters(tile, out + i * kSlice);
    }
  }
};

// One thread of the four warpgroups that compute.
template <class T>
struct HopperConsumer : HopperLayout {
  const HopperTileParams& p;
  const int group = uniform(thread_index() / kWarpgroup);
  const int warp = uniform(thread_index() / kWarp % 4);

  HopperStage at;
  // The first of the stages that y is being stored from; -1: it is not.
  int held = -1;

  HGFAST_DEVICE explicit HopperConsumer(const HopperTileParams& params) : p(params) {}

  // Registers are scarce: what follows from the lane's number is computed where it is needed.
  HGFAST_DEVICE static int lane() { return forget(thread_index()) % kWarp; }
  // In fragments: the row whose address this lane gives, its column (0 or 1, of 8 channels). In
  // sums: the first row and the pair of columns.
  HGFAST_DEVICE static int matrix_row() { return lane() % 16; }
  HGFAST_DEVICE static int matrix_column() { return lane() / 16; }
  HGFAST_DEVICE static int sum_row() { return lane() / 4; }
  HGFAST_DEVICE static int quad() { return lane() % 4; }

  // ---- The ring ----

  HGFAST_DEVICE int take() {
    const int stage = at.number;
    wait_barrier(full(stage), at.parity);
    at.advance();
    return stage;
  }
  // This warp needs it no more. Its lanes' reads come before the barrier of the warp; those of its
  // products before wait_products.
  HGFAST_DEVICE void release(int stage) const {
    sync_warp();
    if (lane() < kCluster) arrive_at(empty(stage), lane());
  }
  // The stages that y is being stored from.
  HGFAST_DEVICE void release_held() {
    if (held < 0) return;
    if (lane() == 0) wait_stores<0>();
    for (int i = p.pooled ? 3 : 2; i > 0; --i) {
      release(held);
      held = held + 1 == kStages ? 0 : held + 1;
    }
    held = -1;
  }

  // ---- Pixels ----

  HGFAST_DEVICE bool inside(int y, int x) const {
    return y >= 0 && y < p.block.height && x >= 0 && x < p.block.width;
  }
  HGFAST_DEVICE static Shared t1(int y, int x) {  // of the halo, from 0
    return shared_memory() + kT1 + (y * kHalo + x) * kPixel;
  }
  // The quarter's first pixel in the tile.
  HGFAST_DEVICE int quarter_y() const { return group / 2 * 8; }
  HGFAST_DEVICE int quarter_x() const { return group % 2 * 8; }

  // ---- Sums and fragments ----

  // Sums begin with the bias: lane's columns of the channels from `bias` on.
  template <int n>
  HGFAST_DEVICE void start(float (&sums)[n], const float* bias) const {
    const float* const first = bias + quad() * 2;
#pragma unroll
    for (int i = 0; i < n / 4; ++i) {
      const float2 b = load_global_now(first + i * 8);
      sums[4 * i] = sums[4 * i + 2] = b.x;
      sums[4 * i + 1] = sums[4 * i + 3] = b.y;
    }
  }
  // BN-ReLU on 16 pixels and the 16 channels from `channel` on.
  HGFAST_DEVICE void activate(uint32_t (&a)[4], int channel) const {
    if (!p.block.scale) return;
    const int first = channel + quad() * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 by = load_global<float2>(p.block.scale + first + half * 8);
      const float2 plus = load_global<float2>(p.block.shift + first + half * 8);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 value = unpack<T>(a[half * 2 + i]);
        a[half * 2 + i] = pack_relu<T>(fmaf(by.x, value.x, plus.x), fmaf(by.y, value.y, plus.y));
      }
    }
  }

  // 16 columns of weights, of an item of so many rows, from `row` on.
  HGFAST_DEVICE static uint64_t weights(int stage, int sixteen, int rows, int row = 0) {
    return operand(HopperLayout::stage(stage) + (sixteen * 2 * rows + row) * 16, rows * 16, 128);
  }

  // sums += (16 pixels of a slice of x, each lane's in a row of its own) * weights: 32 channels,
  // for the rows of weights from `row` on.
  template <bool normed, int n>
  HGFAST_DEVICE void multiply_slice(float (&sums)[n], Shared slice, int matrix_row, int channel,
                                    int of, int half, int rows, int row) const {
    uint32_t a[2][4];
    const int column = matrix_column();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      load_matrices(a[k], piece(slice, matrix_row, k * 2 + column));
      if (normed) activate(a[k], channel + k * 16);
      settle(a[k]);
    }
    settle(sums);
    begin_products();
#pragma unroll
    for (int k = 0; k < 2; ++k) add_product<T>(sums, a[k], weights(of, half * 2 + k, rows, row));
    commit_products();
    wait_products<0>();
    settle(sums);
  }
  // Of this group's quarter.
  template <bool normed, int n>
  HGFAST_DEVICE void multiply_quarter(float (&sums)[n], int channel, int of, int half) {
    const int x = take();
    multiply_slice<normed>(sums, stage(x) + group * kQuarter, warp * 16 + matrix_row(), channel, of,
                           half, 2 * n, 0);
    release(x);
  }

  // ---- conv1 ----

  HGFAST_DEVICE void conv1_inside(const HopperTilePlace& tile) {
    float sums[64];
    start(sums, p.block.b1);
    for (int column = 0; column < p.block.in; column += HopperTape::kColumns) {
      const int of = take();
#pragma unroll 1
      for (int half = 0; half < 2; ++half)
        multiply_quarter<true>(sums, column + half * kSlice, of, half);
      release(of);
    }

    sync_some(1, kConsumers);  // nobody reads the last tile's T1 any more
    const int y = quarter_y() + warp * 2, x = quarter_x(), lane = this->lane();
    const bool upper = inside(tile.y + y, tile.x + x + lane / 4);
    const bool lower = inside(tile.y + y + 1, tile.x + x + lane / 4);
    const Shared to = t1(1 + y + lane / 8 % 2, 1 + x + lane % 8) + lane / 16 * kPlane;
#pragma unroll
    for (int n = 0; n < 16; n += 2) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* const d = sums + 4 * (n + i);
        a[2 * i] = upper ? pack_relu<T>(d[0], d[1]) : 0;
        a[2 * i + 1] = lower ? pack_relu<T>(d[2], d[3]) : 0;
      }
      store_matrices(to + n * kPlane, a);
    }
  }

  // The pixels around the tile, from left to right above it, below it, then left and right of it.
  struct Around {
    int y, x;     // in the halo
    Shared from;  // in a slice
    int row;      // of its box
  };
  HGFAST_DEVICE static Around around(int pixel) {
    if (pixel < kHalo) return {0, pixel, kAbove, pixel};
    if (pixel < 2 * kHalo) return {kHalo - 1, pixel - kHalo, kBelow, pixel - kHalo};
    const int i = pixel - 2 * kHalo;
    if (i < kTile) return {1 + i, 0, kLeft, i};
    return {1 + i - kTile, kHalo - 1, kRight, i - kTile};
  }

  HGFAST_DEVICE void conv1_around(const HopperTilePlace& tile) {
    const int first_row = group % 2 * 64 + warp * 16, first_channel = group / 2 * 64;
    float sums[32];
    // Not the bias: its loads would come before the stores above, where registers are short.
#pragma unroll
    for (float& sum : sums) sum = 0;
    const int pixel = first_row + matrix_row();
    const Around from = around(pixel < kAround ? pixel : kAround - 1);
    for (int column = 0; column < p.block.in; column += HopperTape::kColumns) {
      const int of = take(), x = take();
#pragma unroll 1
      for (int half = 0; half < 2; ++half)
        multiply_slice<true>(sums, stage(x) + half * kAroundSlice + from.from, from.row,
                             column + half * kSlice, of, half, HopperTape::kMiddle, first_channel);
      release(x);
      release(of);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int number = first_row + sum_row() + i * 8;
      const Around pixel = around(number < kAround ? number : kAround - 1);
      const bool there = inside(tile.y - 1 + pixel.y, tile.x - 1 + pixel.x);
      const int quad = this->quad();
      const Shared to = t1(pixel.y, pixel.x) + first_channel / 8 * kPlane + quad * 4;
      const float* const bias = p.block.b1 + first_channel + quad * 2;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float2 b = load_global_now(bias + n * 8);
        const uint32_t pair =
            pack_relu<T>(sums[4 * n + 2 * i] + b.x, sums[4 * n + 2 * i + 1] + b.y);
        if (number < kAround) store_shared<uint32_t>(to + n * kPlane, there ? pair : 0);
      }
    }
    fence_async();
    sync_some(1, kConsumers);
  }

  // ---- conv2 ----

  // Its result, as the fragments of conv3.
  HGFAST_DEVICE void conv2(uint32_t (&a)[8][4]) {
    float sums[64];
    start(sums, p.block.b2);
    settle(sums);
    int before = -1;
#pragma unroll 1
    for (int i = 0; i < 18; ++i) {
      const int tap = i / 2, of = take();
      const Shared window = t1(quarter_y() + tap / 3, quarter_x() + tap % 3) + i % 2 * 8 * kPlane;
      begin_products();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        add_product<T>(sums, operand(window + k * 2 * kPlane, kPlane, kRow),
                       weights(of, k, HopperTape::kMiddle));
      commit_products();
      if (i > 0) {
        wait_products<1>();
        release(before);
      }
      before = of;
    }
    wait_products<0>();
    settle(sums);
    release(before);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float* const d = sums + 8 * k;
      a[k][0] = pack_relu<T>(d[0], d[1]);
      a[k][1] = pack_relu<T>(d[2], d[3]);
      a[k][2] = pack_relu<T>(d[4], d[5]);
      a[k][3] = pack_relu<T>(d[6], d[7]);
      settle(a[k]);
    }
  }

  // ---- conv3 ----

  HGFAST_DEVICE void conv3(const uint32_t (&t2)[8][4], const HopperTilePlace& tile) {
#pragma unroll 1
    for (int out = 0; out < p.block.out; out += HopperTape::kOut) {
      float sums[32];
      start(sums, p.block.b3 + out);
      const int of = take();
      settle(sums);
      begin_products();
#pragma unroll
      for (int k = 0; k < 8; ++k) add_product<T>(sums, t2[k], weights(of, k, HopperTape::kOut));
      commit_products();
      wait_products<0>();
      settle(sums);
      release(of);
      release_held();  // of the 64 channels before: the ring is not long enough for both
      if (p.block.project) {
        for (int column = 0; column < p.block.in; column += HopperTape::kColumns) {
          const int of = take();
#pragma unroll 1
          for (int half = 0; half < 2; ++half) multiply_quarter<false>(sums, 0, of, half);
          release(of);
        }
      }
      store(sums, tile, out);
    }
    release_held();
  }

  HGFAST_DEVICE void store(const float (&sums)[32], const HopperTilePlace& tile, int out) {
    const int lane = this->lane(), sum_row = lane / 4, quad = lane % 4;
    const int low = p.block.low ? take() : -1;
    held = at.number;
    const int pooled = p.pooled ? take() : -1;
    const Shared pooled_rows = stage(pooled) + (group * 4 + warp) * 2 * kPooled;
    const int low_row = (quarter_y() / 2 + warp) * 8 + (quarter_x() + sum_row) / 2;
    Shared rows[2];  // this warp's 16 pixels, of each slice
#pragma unroll
    for (int slice = 0; slice < 2; ++slice) {
      rows[slice] = stage(take()) + group * kQuarter + warp * 16 * kSliceRow;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t pairs[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* const d = sums + (slice * 4 + n) * 4 + 2 * i;
          const Shared at = piece(rows[slice], sum_row + i * 8, n) + quad * 4;
          float2 value{d[0], d[1]};
          if (!p.block.project) {
            const float2 t = unpack<T>(load_shared<uint32_t>(at));
            value = {value.x + t.x, value.y + t.y};
          }
          if (p.block.relu) value = {relu(value.x), relu(value.y)};
          if (p.block.low) {
            const float2 t = unpack<T>(load_shared<uint32_t>(
                piece(stage(low) + slice * kLowSlice, low_row, n) + quad * 4));
            value = {value.x + t.x, value.y + t.y};
          }
          pairs[i] = pack<T>(value.x, value.y);
          store_shared(at, pairs[i]);
        }
        if (p.pooled) {
          uint32_t most = maximum<T>(pairs[0], pairs[1]);
          most = maximum<T>(most, shuffle_xor(most, 4));
          if (sum_row % 2 == 0)
            store_shared(piece(pooled_rows + slice * kPooled, sum_row / 2, n) + quad * 4, most);
        }
      }
    }
    if (p.block.low) release(low);
    fence_async();
    sync_warp();
    if (lane == 0) {
      const int y = tile.y + quarter_y() + warp * 2, x = tile.x + quarter_x();
#pragma unroll
      for (int slice = 0; slice < 2; ++slice) {
        store_tile(p.y, rows[slice], out + slice * kSlice, x, y, tile.image);
        if (p.pooled)
          store_tile(p.y_pooled, pooled_rows + slice * kPooled, out + slice * kSlice, x / 2, y / 2,
                     tile.image);
      }
      commit_stores();
    }
  }
};

template <class T>
__global__ void __launch_bounds__(HopperLayout::kThreads, 1)
    hopper_bottleneck_kernel(const __grid_constant__ HopperTileParams p) {
  using Layout = HopperLayout;
  if (thread_index() == 0) {
    for (int i = 0; i < Layout::kStages; ++i) {
      init_barrier(Layout::full(i), 1);
      init_barrier(Layout::empty(i), Layout::kConsumers / kWarp * Layout::kCluster);
    }
    fence_barriers();
  }
  sync_cluster();

  const int cluster = block_index() / Layout::kCluster;
  const int clusters = grid_size() / Layout::kCluster;
  if (thread_index() >= Layout::kConsumers) {
    lower_registers<32>();
    if (thread_index() == Layout::kConsumers) {
      HopperProducer producer(p);
      for (int pair = cluster; pair < p.pairs; pair += clusters)
        producer.produce(HopperTilePlace(p, pair));
    }
    sync_warp();
  } else {
    raise_registers<112>();
    HopperConsumer<T> consumer(p);
    for (int pair = cluster; pair < p.pairs; pair += clusters) {
      const HopperTilePlace tile(p, pair);
      consumer.conv1_inside(tile);
      consumer.conv1_around(tile);
      uint32_t t2[8][4];
      consumer.conv2(t2);
      consumer.conv3(t2, tile);
    }
  }
  sync_cluster();  // the other block still arrives at the barriers of this one
}

}  // namespace hgfast::cuda
