// The products of gemm.h for bfloat16 operands, on AMX tiles.
//
// Four tiles hold 32 slots x 32 channels of C over the whole of K; per 32 values of k, two tiles
// of A and two of B are loaded for four products, so that loads and products overlap evenly. The
// sums leave through 4 KB of float32 in L1, where the epilogue finishes them.
//
// A is read where it lies, 16 slots per tile, evenly spaced; its channels come padded to 32. B is
// packed in tiles: [panel of 32 channels][k / 32][half][k pair][16 channels][2]. Every tile row
// begins a cache line: rows that straddle two cost half the speed.
#pragma once

#include "amx.h"
#include "gemm.h"

namespace hgfast::cpu::HGFAST_ISA {

template <>
struct Tiling<bf16> {
  static constexpr int64_t kGroup = kTileRows;
  static constexpr int64_t kDepth = 32;
  using Scope = TileScope;
};

constexpr int64_t kTilePanel = 32;                         // channels
constexpr int64_t kTileOfB = kTileRows * 32;               // values
constexpr int64_t kSumBytes = kTilePanel * sizeof(float);  // a row of sums

// 16 or 32 slots from s0, 16 or 32 channels from n0, into sums.
template <int GroupsA, int GroupsB>
void multiply_tiles(const Segment<bf16>* segment, int segments, int64_t s0, int64_t n0,
                    float* sums) {
  tile_zero<0>();
  if constexpr (GroupsB > 1) tile_zero<1>();
  if constexpr (GroupsA > 1) tile_zero<2>();
  if constexpr (GroupsA > 1 && GroupsB > 1) tile_zero<3>();
  for (; segments > 0; --segments, ++segment) {
    const int64_t stride = segment->stride * sizeof(bf16);
    const bf16* b = static_cast<const bf16*>(segment->b) + n0 * segment->taps * segment->depth;
    for (int64_t tap = 0; tap < segment->taps; ++tap) {
      const bf16* a0 = segment->a + segment->at[s0] + tap * segment->tap_stride;
      const bf16* a1 =
          segment->a + segment->at[s0 + (GroupsA - 1) * kTileRows] + tap * segment->tap_stride;
      for (int64_t k = 0; k < segment->depth; k += 32, b += 2 * kTileOfB) {
        tile_load<4>(a0 + k, stride);
        tile_load<6>(b, kTileBytes);
        tile_multiply<0, 4, 6>();
        if constexpr (GroupsB > 1) {
          tile_load<7>(b + kTileOfB, kTileBytes);
          tile_multiply<1, 4, 7>();
        }
        if constexpr (GroupsA > 1) {
          tile_load<5>(a1 + k, stride);
          tile_multiply<2, 5, 6>();
        }
        if constexpr (GroupsA > 1 && GroupsB > 1) tile_multiply<3, 5, 7>();
      }
    }
  }
  tile_store<0>(sums, kSumBytes);
  if constexpr (GroupsB > 1) tile_store<1>(sums + 16, kSumBytes);
  if constexpr (GroupsA > 1) tile_store<2>(sums + kTileRows * kTilePanel, kSumBytes);
  if constexpr (GroupsA > 1 && GroupsB > 1)
    tile_store<3>(sums + kTileRows * kTilePanel + 16, kSumBytes);
}

// All slots by channels n_first, a multiple of kTilePanel, to n - 1. One tile's sums are finished
// while the next tile's are formed: the epilogue takes as long as the products of a short K, and
// waits for none of them.
template <class E>
void gemm(const Segment<bf16>* segment, int segments, int64_t slots, int64_t n_first, int64_t n,
          const Epilogue<E>& epilogue) {
  alignas(kAlign) float sums[2][2 * kTileRows * kTilePanel];
  struct {
    int64_t s0, rows, n0, channels;
  } last{};
  int turn = 0;
  for (int64_t n0 = n_first; n0 < n; n0 += kTilePanel) {
    const int64_t channels = min(kTilePanel, n - n0);
    const auto one = channels > 16 ? multiply_tiles<1, 2> : multiply_tiles<1, 1>;
    const auto two = channels > 16 ? multiply_tiles<2, 2> : multiply_tiles<2, 1>;
    for (int64_t s0 = 0; s0 < slots; s0 += 2 * kTileRows, turn = 1 - turn) {
      const int64_t rows = min(2 * kTileRows, slots - s0);
      epilogue.prefetch(s0, rows, n0, channels);
      (rows > kTileRows ? two : one)(segment, segments, s0, n0, sums[turn]);
      epilogue.finish(sums[1 - turn], kTilePanel, last.rows, last.channels, last.s0, last.n0);
      last = {s0, rows, n0, channels};
    }
  }
  epilogue.finish(sums[1 - turn], kTilePanel, last.rows, last.channels, last.s0, last.n0);
}

}  // namespace hgfast::cpu::HGFAST_ISA
