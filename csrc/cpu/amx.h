// The few AMX instructions that gemm_amx.h needs: eight tile registers of 16 rows x 64 bytes.
//
// Two implementations of one interface: the instructions, and a plain C++ model of them. The
// model runs the tile code where there is no AMX, so that its logic is tested everywhere, and
// stops the process where the processor would fault.
#pragma once

#include "vec.h"

#if defined(HGFAST_AMX_MODEL)
#include <stdio.h>
#include <stdlib.h>
#endif

namespace hgfast::cpu::HGFAST_ISA {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;                  // in a row
constexpr int64_t kTileDepth = kTileBytes / 2;  // values of k

struct alignas(64) TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

#if !defined(HGFAST_AMX_MODEL)

// The configurations are passed whole: gcc 12's own intrinsic declares eight bytes as read, and
// the compiler drops the stores to the rest.
inline void load_tile_config(const TileConfig& c) { asm volatile("ldtilecfg %0" ::"m"(c)); }
inline void store_tile_config(TileConfig& c) { asm volatile("sttilecfg %0" : "=m"(c)); }

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
// C += A * B; a row of B holds two values of k for each of 16 channels.
template <int C, int A, int B>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct Tile {
  alignas(64) uint8_t row[kTileRows][kTileBytes];
};
inline thread_local TileConfig tile_config;
inline thread_local Tile tiles[8];

inline void tile_require(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "AMX model: %s\n", what);
  abort();
}

inline void load_tile_config(const TileConfig& c) {
  tile_require(c.palette <= 1, "tile configuration: palette is neither 0 nor 1");
  for (int t = 0; c.palette == 1 && t < 16; ++t) {
    const bool fits = t < 8 ? c.rows[t] <= kTileRows && c.row_bytes[t] <= kTileBytes
                            : c.rows[t] == 0 && c.row_bytes[t] == 0;
    tile_require(fits, "tile configuration: more rows or bytes than a tile has");
    tile_require((c.rows[t] == 0) == (c.row_bytes[t] == 0),
                 "tile configuration: rows without bytes, or bytes without rows");
  }
  tile_config = c;
  memset(tiles, 0, sizeof tiles);
}
inline void store_tile_config(TileConfig& c) { c = tile_config; }

inline void require_configured(int t) {
  tile_require(tile_config.palette == 1 && tile_config.rows[t] > 0, "tile is not configured");
}
// Tile rows that straddle cache lines are legal and cost half the speed: not wanted here, unless
// they are shorter than a line, as those of windows that overlap are.
inline void require_aligned(int t, const void* p, int64_t stride) {
  if (tile_config.row_bytes[t] < kTileBytes) return;
  tile_require(reinterpret_cast<uintptr_t>(p) % 64 == 0 && stride % 64 == 0,
               "tile row is not aligned to 64 bytes");
}

template <int T>
inline void tile_zero() {
  require_configured(T);
  memset(&tiles[T], 0, sizeof tiles[T]);
}
template <int T>
inline void tile_load(const void* p, int64_t stride) {
  require_configured(T);
  require_aligned(T, p, stride);
  memset(&tiles[T], 0, sizeof tiles[T]);
  for (int r = 0; r < tile_config.rows[T]; ++r)
    memcpy(tiles[T].row[r], static_cast<const char*>(p) + r * stride, tile_config.row_bytes[T]);
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
  require_configured(T);
  require_aligned(T, p, stride);
  for (int r = 0; r < tile_config.rows[T]; ++r)
    memcpy(static_cast<char*>(p) + r * stride, tiles[T].row[r], tile_config.row_bytes[T]);
}

// Subnormals count as zero, in operands and results.
inline Vec flush(Vec x) {
  const Bits bits = (Bits)x;
  return (Vec)((bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits);
}

// As Intel's manual has it: the even and the odd k are summed apart from zero, with fused
// multiply-adds; then the two sums, then C and their sum, are added.
template <int C, int A, int B>
inline void tile_multiply() {
  require_configured(A);
  require_configured(B);
  require_configured(C);
  tile_require(tile_config.rows[C] == tile_config.rows[A] &&
                   tile_config.row_bytes[C] == tile_config.row_bytes[B] &&
                   tile_config.row_bytes[A] == 4 * tile_config.rows[B],
               "shapes of a product's tiles do not match");
  static_assert(kLanes == kTileBytes / 4);
  for (int m = 0; m < tile_config.rows[A]; ++m) {
    Vec even{}, odd{}, c;
    for (int k = 0; k < tile_config.rows[B]; ++k) {
      uint32_t a;
      Bits b;
      memcpy(&a, tiles[A].row[m] + 4 * k, sizeof a);
      memcpy(&b, tiles[B].row[k], sizeof b);
      const Bits a_low = Bits{} + (a << 16), a_high = Bits{} + (a & 0xffff0000);
      even = flush(fma(flush((Vec)a_low), flush((Vec)(b << 16)), even));
      odd = flush(fma(flush((Vec)a_high), flush((Vec)(b & 0xffff0000)), odd));
    }
    memcpy(&c, tiles[C].row[m], sizeof c);
    c = flush(flush(c) + flush(even + odd));
    memcpy(tiles[C].row[m], &c, sizeof c);
  }
}

#endif

// The tiles at full size while it lives, or 4 to 7, the operands', so many values of k deep; then
// the configuration found before, so that whoever else uses AMX in this thread (oneDNN caches its
// own) finds it unchanged.
class TileScope {
 public:
  explicit TileScope(int64_t depth = kTileDepth) {
    store_tile_config(before_);
    TileConfig full;
    full.palette = 1;
    for (int t = 0; t < 8; ++t) {
      full.row_bytes[t] = kTileBytes;
      full.rows[t] = kTileRows;
    }
    for (int a = 4; a < 6; ++a) full.row_bytes[a] = static_cast<uint16_t>(depth * 2);
    for (int b = 6; b < 8; ++b) full.rows[b] = static_cast<uint8_t>(depth / 2);
    load_tile_config(full);
  }
  ~TileScope() { load_tile_config(before_); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  TileConfig before_;
};

}  // namespace hgfast::cpu::HGFAST_ISA
