// 3x3 convolutions with stride 1 by Winograd's minimal filtering, F(m x m, 3 x 3) (Lavin and Gray,
// arXiv:1509.09308): m x m pixels of y from a tile of n x n pixels of x, n = m + 2, as
//
//   Y = A' [(G g G') * (B' d B)] A        * elementwise; g: the 3x3 weights, d: the tile of x
//
// Summed over the input channels, the elementwise products are n * n matrix products [tiles x in]
// [in x out]: n * n multiplications for m * m pixels instead of 9 each, 2.25 times fewer for m = 2
// and 4 times for m = 4. The transforms are additions over a pixel's channels, a tenth of the work.
//
// What is multiplied are sums of inputs and sums of weights, so rounding errors are relative to
// those: measured for 128 channels, m = 2 loses twice what the direct sum loses, m = 4 seven times.
// The interpolation points of m = 4 are 0, 1, -1, 2 and -1/2, which lose a third less than the
// usual 0, 1, -1, 2 and -2; all coefficients of A and B are exact, G's products are rounded once.
//
// A group of tiles goes through three stages, which its buffers must leave in the second-level
// cache: all of V = B' d B; then for each panel of output channels the n * n products, and their
// transformation into y. The weights are n * n / 9 times larger than the direct convolution's and
// stream past once for each group: with 32 tiles, one byte of them for 8 multiplications.
#pragma once

#include "gemm.h"

namespace hgfast::cpu::HGFAST_ISA {

template <int M>
struct Winograd;

template <>
struct Winograd<2> {
  static constexpr double kWeights[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};

  static void input(const Vec (&d)[4], Vec (&v)[4]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  static void output(const Vec (&m)[4], Vec (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
};

template <>
struct Winograd<4> {
  static constexpr double kWeights[6][3] = {{1, 0, 0},
                                            {-1. / 3, -1. / 3, -1. / 3},
                                            {1. / 3, -1. / 3, 1. / 3},
                                            {1. / 15, 2. / 15, 4. / 15},
                                            {-16. / 15, 8. / 15, -4. / 15},
                                            {0, 0, 1}};

  static void input(const Vec (&d)[6], Vec (&v)[6]) {
    const Vec half = splat(0.5f), three_halves = splat(1.5f), two = splat(2.0f);
    const Vec five_halves = splat(2.5f);
    // d0 + d4 - 2 d2 + 1.5 (d1 - d3)
    v[0] = fma(three_halves, d[1] - d[3], fma(-two, d[2], d[0] + d[4]));
    // d4 - d1 - 2.5 d2 - 0.5 d3
    v[1] = fma(-half, d[3], fma(-five_halves, d[2], d[4] - d[1]));
    // d4 + d1 + 0.5 d2 - 2.5 d3
    v[2] = fma(half, d[2], fma(-five_halves, d[3], d[4] + d[1]));
    // d4 - d2 + 0.5 (d3 - d1)
    v[3] = fma(half, d[3] - d[1], d[4] - d[2]);
    // d4 - d2 - 2 (d3 - d1)
    v[4] = fma(-two, d[3] - d[1], d[4] - d[2]);
    // d5 + d1 - 2 d3 + 1.5 (d2 - d4)
    v[5] = fma(three_halves, d[2] - d[4], fma(-two, d[3], d[5] + d[1]));
  }
  static void output(const Vec (&m)[6], Vec (&y)[4]) {
    const Vec sum = m[1] + m[2], difference = m[1] - m[2];
    y[0] = m[0] + sum + (m[3] + m[4]);
    y[1] = fma(splat(-0.5f), m[4], fma(splat(2.0f), m[3], difference));
    y[2] = fma(splat(0.25f), m[4], fma(splat(4.0f), m[3], sum));
    y[3] = fma(splat(-0.125f), m[4], fma(splat(8.0f), m[3], difference + m[5]));
  }
};

// Where products are left as they are, [slot][kPanel].
struct Products {
  float* y;
  void prefetch(int64_t, int64_t, int64_t, int64_t) const {}
  template <int R, int V, class Lanes>
  void finish(Vec (&sum)[R][V], int64_t s, int64_t, Lanes) const {
#pragma GCC unroll 16
    for (int m = 0; m < R; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(y + (s + m) * kPanel + v * kLanes, sum[m][v], Whole{});
  }
};

// Fewer are mostly transforms.
constexpr int64_t kFewestChannels = 16;

// In a group. More would read the weights less often, and V would not fit into the second-level
// cache: for 128 channels and m = 4 it takes 590 KB. Chosen by the 256/128/256 block on a
// Cascade Lake core, which benchmarks/bench_bottleneck.py times: 48 was no faster, 16 slower.
constexpr int64_t kTilesAtOnce = 32;

// How `down` x `across` tiles of a map are taken in groups of `tall` x `wide`, whole rows of tiles
// if they fit.
struct Grouping {
  int64_t down, across, tall, wide;

  Grouping(int64_t down, int64_t across) : down(down), across(across) {
    wide = ceil_div(across, ceil_div(across, kTilesAtOnce));
    tall = wide < across ? 1 : ceil_div(down, ceil_div(down, max(1, kTilesAtOnce / across)));
  }
  int64_t most() const { return tall * wide; }  // tiles in a group
};

// The side of a tile of y; 1 if there are none.
constexpr int64_t tile_side(Method method) {
  return method == Method::tiles2 ? 2 : method == Method::tiles4 ? 4 : 1;
}

// A group's V and products, place by place, the places a cache line further apart than they need to
// be: those of one pixel, which a transform visits one after the other, then fall into different
// sets of the first-level cache.
struct TileBuffers {
  float *v = nullptr, *products = nullptr;
  int64_t v_pitch = 0, products_pitch = 0;

  TileBuffers(Method method, const Grouping& group, int64_t in, Scratch& scratch) {
    if (method == Method::direct) return;
    const int64_t places = (tile_side(method) + 2) * (tile_side(method) + 2);
    v_pitch = round_up(group.most() * in, 16) + 16;
    products_pitch = group.most() * kPanel + 16;
    v = scratch.take<float>(places * v_pitch);
    products = scratch.take<float>(places * products_pitch);
  }
};

template <int M>
struct Tiles {
  static constexpr int64_t kPixels = M;  // on a side
  static constexpr int kSide = M + 2, kPlaces = kSide * kSide;

  // The pixels of y in a group of tall x wide tiles, by channels n_first, a multiple of kPanel, to
  // n - 1. x: the first tile's first pixel, in rows `row` values apart, zero-padded. The epilogue's
  // slots are the tiles' pixels: tile by tile, row by row.
  template <class E>
  static void convolve(const float* x, int64_t row, int64_t in, int64_t tall, int64_t wide,
                       const float* weights, int64_t n_first, int64_t n, const TileBuffers& buffers,
                       const Epilogue<E>& epilogue) {
    const int64_t tiles = tall * wide;
    int64_t v_at[kTilesAtOnce];
    for (int64_t tile = 0; tile < tiles; ++tile) {
      v_at[tile] = tile * in;
      transform_input(x + tile / wide * M * row + tile % wide * M * in, row, in,
                      buffers.v + v_at[tile], buffers.v_pitch);
    }
    weights += kPlaces * in * n_first;
    for (int64_t n0 = n_first; n0 < n; n0 += kPanel) {
      const int64_t channels = min(kPanel, n - n0), width = round_up(channels, kLanes);
      for (int place = 0; place < kPlaces; ++place, weights += in * width) {
        const auto segment =
            Segment<float>::dense(buffers.v + place * buffers.v_pitch, v_at, in, weights);
        multiply(&segment, 1, tiles, 0, width,
                 Products{buffers.products + place * buffers.products_pitch});
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        each(channels, [&](int64_t c, auto lanes) {
          Vec y[M][M];
          transform_output(buffers.products + tile * kPanel + c, buffers.products_pitch, y);
#pragma GCC unroll 16
          for (int i = 0; i < M * M; ++i) {
            const int64_t slot = tile * M * M + i;
            if (epilogue.y_at[slot] < 0) continue;
            Vec sum[1][1] = {{y[i / M][i % M]}};
            epilogue.finish(sum, slot, n0 + c, lanes);
          }
        });
      }
    }
  }

 private:
  // V of one tile at d.
  static void transform_input(const float* d, int64_t row, int64_t in, float* v, int64_t pitch) {
    each(in, [&](int64_t c, auto lanes) {
      Vec half[kSide][kSide];  // [column][row]
      for (int i = 0; i < kSide; ++i) {
        Vec pixel[kSide], out[kSide];
#pragma GCC unroll 8
        for (int j = 0; j < kSide; ++j) pixel[j] = load(d + i * row + j * in + c, lanes);
        Winograd<M>::input(pixel, out);
#pragma GCC unroll 8
        for (int j = 0; j < kSide; ++j) half[j][i] = out[j];
      }
      for (int j = 0; j < kSide; ++j) {
        Vec out[kSide];
        Winograd<M>::input(half[j], out);
#pragma GCC unroll 8
        for (int i = 0; i < kSide; ++i) store(v + (i * kSide + j) * pitch + c, out[i], lanes);
      }
    });
  }

  // y[row][column] of one tile and one register of channels.
  static void transform_output(const float* products, int64_t pitch, Vec (&y)[M][M]) {
    Vec half[M][kSide];  // [row][column]
    for (int j = 0; j < kSide; ++j) {
      Vec place[kSide], out[M];
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) place[i] = load(products + (i * kSide + j) * pitch, Whole{});
      Winograd<M>::output(place, out);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) half[i][j] = out[i];
    }
    for (int i = 0; i < M; ++i) Winograd<M>::output(half[i], y[i]);
  }
};

// Runs f(Tiles<M>) for the method's tiles.
template <class F>
inline void with_tiles(Method method, F f) {
  method == Method::tiles2 ? f(Tiles<2>{}) : f(Tiles<4>{});
}

}  // namespace hgfast::cpu::HGFAST_ISA
