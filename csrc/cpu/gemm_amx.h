// The products of gemm.h on AMX tiles: of bfloat16 operands, and of float32 ones as three products
// of bfloat16 (bf16x3).
//
// Four tiles hold 32 slots x 32 channels of C over the whole of K; per 32 values of k, two tiles
// of A and two of B are loaded for four products, so that loads and products overlap evenly. The
// sums leave through 4 KB of float32 in L1, where the epilogue finishes them, a few rows after each
// step of the next tile's products.
//
// bf16x3: x = high + low, both bfloat16, is x to within 2^-17 |x|, and |low| is at most 2^-8 |x|.
// Of
//   x w = high high + high low + low high + low low
// the last is dropped. So a product is off by 2^-15 |x w| at most, half of it for the dropped term,
// half for the rounding of low parts; bfloat16 alone is off by 2^-7, float32 by 2^-24. The sums are
// float32 as ever.
//
// FLOPs: three products at 512 multiply-adds a cycle are worth 170, five times the 32 of AVX-512.
// Bytes: an operand is as wide as float32, so as many move as there. Per 32 values of k both parts
// of two tiles of A and two of B are loaded, eight tiles for twelve products of 16 cycles: a load
// has 24 cycles, where bfloat16's has 16, and needs 8 from L1 and about 20 from L2. So operands may
// come from L2. Splitting costs some ten instructions for 16 values; it is done once, where a value
// is stored as an operand, never in the loop over k.
//
// A is read where it lies, 16 slots per tile, evenly spaced. Its channels come padded to 32; split
// ones lie as the 32 high parts and then the 32 low ones. (But for windows of few channels, see
// conv.cpp: their rows are shorter, begin anywhere, and Segment::parts tells where low parts lie; a
// product is less than 32 deep then, as TileScope says.) B is packed in tiles:
// [panel of 32 channels][k / 32][part][half][k pair][16 channels][2]. So every tile row is a cache
// line: rows that straddle two cost half the speed.
#pragma once

#include "amx.h"
#include "gemm.h"

namespace hgfast::cpu::HGFAST_ISA {

constexpr int64_t kTilePanel = 32;                         // channels
constexpr int64_t kTileOfB = kTileRows * 32;               // values
constexpr int64_t kSumBytes = kTilePanel * sizeof(float);  // a row of sums

// A float32 as an operand of bf16x3. The parts of 32 values lie together, the high ones first.
struct bf16x2 {
  bf16 parts[2];
};

template <>
constexpr bool is_of_maps<bf16x2> = false;

template <>
struct Tiling<bf16> {
  static constexpr int64_t kGroup = kTileRows;
  static constexpr int64_t kDepth = kTileDepth;
  static constexpr int64_t kWidth = kTilePanel;
  using Scope = TileScope;
};

template <>
struct Tiling<bf16x2> : Tiling<bf16> {};

// The two parts of x. Subnormal ones count as 0 in a product.
//
// Infinity and NaN, and what bfloat16 rounds to infinity, are in the low part alone. That meets the
// other operand's high part only, so infinity times w is what it is in float32. From the high part
// it would meet w's low part too, which may be 0 or of the other sign: NaN.
struct Parts {
  Halves high, low;

  explicit Parts(Vec x) {
    const Vec near = from_bf16(to_bf16(x)), rest = x - near;
    const auto is_finite = rest - rest == Vec{};
    high = to_bf16(is_finite ? near : Vec{});
    low = to_bf16(is_finite ? rest : x);
  }
};

// A register as an operand of either type, part by part.
inline void split(Vec x, const bf16*, Halves* parts) { parts[0] = to_bf16(x); }
inline void split(Vec x, const bf16x2*, Halves* parts) {
  const Parts both(x);
  parts[0] = both.high;
  parts[1] = both.low;
}

template <class Lanes>
inline void put(bf16x2* row, int64_t i, Vec x, Lanes lanes) {
  static_assert(kTileDepth % kLanes == 0);
  const Parts parts(x);
  const int64_t within = i % kTileDepth;
  bf16* high = reinterpret_cast<bf16*>(row + i - within) + within;
  store(high, parts.high, lanes);
  store(high + kTileDepth, parts.low, lanes);
}

inline void clear(bf16x2* row, int64_t first, int64_t end) {
  for (; first < end && first % kTileDepth; ++first) {
    const int64_t within = first % kTileDepth;
    bf16* high = reinterpret_cast<bf16*>(row + first - within) + within;
    high[0] = high[kTileDepth] = bf16{};
  }
  memset(static_cast<void*>(row + first), 0, (end - first) * sizeof(bf16x2));
}

// 32 values of k, for 16 or 32 slots and 16 or 32 channels.
template <int GroupsA, int GroupsB>
inline void multiply_loaded() {
  tile_multiply<0, 4, 6>();
  if constexpr (GroupsB > 1) tile_multiply<1, 4, 7>();
  if constexpr (GroupsA > 1) tile_multiply<2, 5, 6>();
  if constexpr (GroupsA > 1 && GroupsB > 1) tile_multiply<3, 5, 7>();
}
template <int GroupsA, int GroupsB>
inline void multiply_step(const bf16* a0, const bf16* a1, int64_t stride, int64_t, const bf16* b) {
  tile_load<4>(a0, stride);
  tile_load<6>(b, kTileBytes);
  tile_multiply<0, 4, 6>();
  if constexpr (GroupsB > 1) {
    tile_load<7>(b + kTileOfB, kTileBytes);
    tile_multiply<1, 4, 7>();
  }
  if constexpr (GroupsA > 1) {
    tile_load<5>(a1, stride);
    tile_multiply<2, 5, 6>();
  }
  if constexpr (GroupsA > 1 && GroupsB > 1) tile_multiply<3, 5, 7>();
}

// The same of split operands. A's low parts begin `parts` bytes behind the high ones. `part`: 0 is
// the high one.
template <int GroupsA>
inline void load_a(const bf16x2* a0, const bf16x2* a1, int64_t stride, int64_t from) {
  tile_load<4>(reinterpret_cast<const char*>(a0) + from, stride);
  if constexpr (GroupsA > 1) tile_load<5>(reinterpret_cast<const char*>(a1) + from, stride);
}
template <int GroupsB>
inline void load_b(const bf16x2* b, int part) {
  const bf16* tile = reinterpret_cast<const bf16*>(b) + part * 2 * kTileOfB;
  tile_load<6>(tile, kTileBytes);
  if constexpr (GroupsB > 1) tile_load<7>(tile + kTileOfB, kTileBytes);
}
template <int GroupsA, int GroupsB>
inline void multiply_step(const bf16x2* a0, const bf16x2* a1, int64_t stride, int64_t parts,
                          const bf16x2* b) {
  load_a<GroupsA>(a0, a1, stride, parts);
  load_b<GroupsB>(b, 0);
  multiply_loaded<GroupsA, GroupsB>();
  load_a<GroupsA>(a0, a1, stride, 0);
  multiply_loaded<GroupsA, GroupsB>();
  load_b<GroupsB>(b, 1);
  multiply_loaded<GroupsA, GroupsB>();
}

// Sums that wait for their epilogue: it runs a few rows at a time, between the products of the next
// tile, whose unit it does not use. All at once it would take as long as the products of a short K
// and fill the queues that those have to pass.
template <class E>
class Unfinished {
 public:
  explicit Unfinished(const Epilogue<E>& epilogue)
      : epilogue_(epilogue), whole_rows_(epilogue.whole_rows()) {}

  void begin(const float* sums, int64_t s, int64_t rows, int64_t n, int64_t channels) {
    sums_ = sums;
    s_ = s, rows_ = rows, n_ = n, channels_ = channels;
    int64_t no_pixel = 0;  // negative if one is none
    for (int64_t i = 0; i < rows; ++i) no_pixel |= epilogue_.y_at[s + i];
    whole_ = channels == kTilePanel && no_pixel >= 0;
  }

  void finish(int64_t rows) {
    if (rows_ == 0) return;
    rows = min(rows, rows_);
    if (whole_) {
      whole_rows_(epilogue_, sums_, rows, s_, n_);
    } else {
      epilogue_.finish(sums_, kTilePanel, rows, channels_, s_, n_);
    }
    sums_ += rows * kTilePanel;
    s_ += rows;
    rows_ -= rows;
  }

 private:
  const Epilogue<E>& epilogue_;
  const typename Epilogue<E>::Rows whole_rows_;
  const float* sums_ = nullptr;
  int64_t s_ = 0, rows_ = 0, n_ = 0, channels_ = 0;  // what is left
  bool whole_ = false;
};

// So many steps of k lie between two stores of tiles at most. The instructions do not ask for it;
// but a core was seen to stall for some 700 cycles at a store behind 32 steps or more, and for none
// where another store, of whatever tile, came in between.
constexpr int64_t kStepsPerStore = 16;
static_assert(kStepsPerStore > kTileRows * kTileBytes / kSumBytes, "a step finishes a row or more");

// 16 or 32 slots from s0, 16 or 32 channels from n0, into sums. Meanwhile `before` is finished.
template <int GroupsA, int GroupsB, class Operand, class E>
void multiply_tiles(const Segment<Operand>* segment, int segments, int64_t s0, int64_t n0,
                    float* sums, Unfinished<E>& before, int64_t rows_per_step) {
  tile_zero<0>();
  if constexpr (GroupsB > 1) tile_zero<1>();
  if constexpr (GroupsA > 1) tile_zero<2>();
  if constexpr (GroupsA > 1 && GroupsB > 1) tile_zero<3>();
  int64_t since = 0;
  for (; segments > 0; --segments, ++segment) {
    const int64_t stride = segment->stride * sizeof(Operand);
    const Operand* b =
        static_cast<const Operand*>(segment->b) + n0 * segment->taps * segment->depth;
    for (int64_t tap = 0; tap < segment->taps; ++tap) {
      const Operand* a0 = segment->a + segment->at[s0] + tap * segment->tap_stride;
      const Operand* a1 =
          segment->a + segment->at[s0 + (GroupsA - 1) * kTileRows] + tap * segment->tap_stride;
      for (int64_t k = 0; k < segment->depth; k += kTileDepth, b += kTileDepth * kTilePanel) {
        if (++since == kStepsPerStore) {
          tile_store<6>(sums, kTileBytes);  // over rows that are finished
          since = 0;
        }
        multiply_step<GroupsA, GroupsB>(a0 + k, a1 + k, stride, segment->parts, b);
        before.finish(rows_per_step);
      }
    }
  }
  before.finish(2 * kTileRows);
  tile_store<0>(sums, kSumBytes);
  if constexpr (GroupsB > 1) tile_store<1>(sums + 16, kSumBytes);
  if constexpr (GroupsA > 1) tile_store<2>(sums + kTileRows * kTilePanel, kSumBytes);
  if constexpr (GroupsA > 1 && GroupsB > 1)
    tile_store<3>(sums + kTileRows * kTilePanel + 16, kSumBytes);
}

// All slots by channels n_first, a multiple of kTilePanel, to n - 1.
template <class Operand, class E>
void gemm(const Segment<Operand>* segment, int segments, int64_t slots, int64_t n_first, int64_t n,
          const Epilogue<E>& epilogue) {
  alignas(kAlign) float sums[2 * kTileRows * kTilePanel];
  int64_t steps = 0;
  for (int i = 0; i < segments; ++i) steps += segment[i].taps * segment[i].depth / kTileDepth;
  const int64_t wanted = ceil_div(2 * kTileRows, max(1, steps));  // a phase may have no taps
  const int64_t rows_per_step = wanted > 4 ? 8 : wanted > 2 ? 4 : wanted;
  Unfinished<E> before(epilogue);
  for (int64_t n0 = n_first; n0 < n; n0 += kTilePanel) {
    const int64_t channels = min(kTilePanel, n - n0);
    const auto one =
        channels > 16 ? multiply_tiles<1, 2, Operand, E> : multiply_tiles<1, 1, Operand, E>;
    const auto two =
        channels > 16 ? multiply_tiles<2, 2, Operand, E> : multiply_tiles<2, 1, Operand, E>;
    for (int64_t s0 = 0; s0 < slots; s0 += 2 * kTileRows) {
      const int64_t rows = min(2 * kTileRows, slots - s0);
      (rows > kTileRows ? two : one)(segment, segments, s0, n0, sums, before, rows_per_step);
      before.begin(sums, s0, rows, n0, channels);
    }
  }
  before.finish(2 * kTileRows);
}

}  // namespace hgfast::cpu::HGFAST_ISA
