// Matrix products over pixels: C[slot][channel] = sum over k of A[slot][k] * B[k][channel],
// finished (bias, ReLU, sums, rounding) while the tile of C is still in registers.
//
// A's rows are pixels of an activation in NHWC: for slot s, `taps` runs of `depth` values,
// the first at a + at[s], the next `tap_stride` further on. So a 1x1 convolution is one run;
// a 3x3 over a zero-padded map is three, each of three neighbours' channels; nothing is
// gathered. In float32 a run may also lie anywhere, with a place of its own in `at`. Several
// segments, each with its own A and B, add up into one C: a block's last convolution and its
// projected shortcut are one product.
//
// B is packed in panels of kPanel output channels: [panel][k][channel], zeros beyond the last
// channel; a last panel of at most kLanes channels is that narrow.
//
// The kernel holds kRows x kPanel of C in registers over the whole of K. Per k it loads
// kVectors registers of B and broadcasts kRows values of A, for kRows * kVectors fused
// multiply-adds: with AVX-512, 14 loads for 24 FMAs, which two load ports and two FMA ports
// finish in 12 cycles, with room for the prefetches. B streams from L2 at 128 bytes per 12 cycles;
// a tile's rows of A stay in L1 or follow from L2. A sum is formed in the order of k, in chains
// that begin at multiples of kChain, whatever tile its pixel falls in.
#pragma once

#include "vec.h"

namespace hgfast::cpu::HGFAST_ISA {

constexpr int kVectors = 2;
constexpr int64_t kPanel = kVectors * kLanes;
#if defined(__AVX512F__)
constexpr int kRows = 12;  // 24 sums and 2 of B in 32 registers, 12 pointers in 16
#else
constexpr int kRows = 6;  // 12 sums and 2 of B in 16 registers
#endif

// B is fetched so many k ahead of its use, and a tile's y and add before its sums are formed.
// Chosen by the 256/128/256 block on a Cascade Lake core, which benchmarks/bench_bottleneck.py
// times: the first gained 3 % at 64x64 and a tenth at 16x16 (4, 8 and 16 alike), the second 2 to 4
// %.
constexpr int64_t kAhead = 8;

// So many products are added up one after the other, and the sums of such chains in their turn:
// rounding errors grow with the length of a chain, and 3x3 convolutions have thousands. One more
// addition per sum and chain.
constexpr int64_t kChain = 512;

// What a product over this operand type wants of its A.
template <class Operand>
struct Tiling;

template <>
struct Tiling<float> {
  static constexpr int64_t kGroup = 1;       // slots whose rows must lie evenly spaced
  static constexpr int64_t kDepth = 1;       // channels of A come in multiples of this,
  static constexpr int64_t kWidth = kLanes;  // those of B of this
  struct Scope {                             // lives around a task range's products
    explicit Scope(int64_t = kDepth) {}
  };
};

// A pixel's channels as an operand: padded with zeros.
template <class Operand>
constexpr int64_t padded(int64_t channels) {
  return round_up(channels, Tiling<Operand>::kDepth);
}

// Whether maps are kept in this type; else it is an operand's alone.
template <class E>
constexpr bool is_of_maps = true;

// Into a row of operands, or a pixel of a map: values i, i + 1, ...; and zeros from `first` on.
template <class E, class Lanes>
inline void put(E* row, int64_t i, Vec x, Lanes lanes) {
  store(row + i, x, lanes);
}
// The kVectors registers of a panel.
template <class E>
inline void put_panel(E* row, const Vec (&x)[kVectors]) {
#if defined(__AVX512BF16__)
  if constexpr (is_same<E, bf16>) {
    const auto halves = _mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    memcpy(static_cast<void*>(row), &halves, sizeof halves);
    return;
  }
#endif
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) put(row, v * kLanes, x[v], Whole{});
}
template <class E>
inline void clear(E* row, int64_t first, int64_t end) {
  memset(static_cast<void*>(row + first), 0, (end - first) * sizeof(E));
}

// Products run over so many slots at a time: enough that a panel of B, once in L2, is used many
// times; few enough that what lies between two products of a block stays in L2 as well.
constexpr int64_t kBlock = 128;

template <class Operand>
struct Segment {
  const Operand* a;
  const int64_t* at;  // per slot, in elements
  int64_t stride;     // from one slot of a group to the next, in elements
  int64_t taps, tap_stride, depth;
  const void* b;        // packed
  int64_t at_step = 0;  // from a slot's place in `at` to that of its next tap; float32 only
  int64_t parts = 64;   // bytes from a split operand's high parts to its low ones; bf16x3 only

  // Pixels one after the other, one run of `depth` each.
  static Segment dense(const Operand* a, const int64_t* at, int64_t depth, const void* b) {
    return {a, at, depth, 1, 0, depth, b};
  }
};

template <class E>
struct Epilogue {
  const float* bias;
  bool relu;
  bool relu_sum = false;  // behind add, before low
  E* y;
  const int64_t* y_at;     // per slot, in elements; negative: no pixel, nothing is stored
  const E* add = nullptr;  // laid out like y
  const E* low = nullptr;
  const int64_t* low_at = nullptr;

  // Calls in what finish() will read and write.
  void prefetch(int64_t s, int64_t rows, int64_t n, int64_t channels) const {
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < channels; i += 64 / sizeof(E)) {
        __builtin_prefetch(y + y_at[s + m] + n + i, 1);
        if (add) __builtin_prefetch(add + y_at[s + m] + n + i);
      }
    }
  }

  // Finishes the sums of slots s, s + 1, ... and channels n, n + 1, ...; `lanes` of the last
  // register count.
  template <int M, int V, class Lanes>
  void finish(Vec (&sum)[M][V], int64_t s, int64_t n, Lanes lanes) const {
    if constexpr (V > 1 && !is_same<Lanes, Whole>) {
      finish_registers<0, V - 1>(sum, s, n, Whole{});
      finish_registers<V - 1, V>(sum, s, n, lanes);
    } else {
      finish_registers<0, V>(sum, s, n, lanes);
    }
  }

  // The same for a tile of sums in memory, with any number of channels.
  void finish(const float* sums, int64_t row_stride, int64_t rows, int64_t channels, int64_t s,
              int64_t n) const {
    for (int64_t m = 0; m < rows; ++m) {
      if (y_at[s + m] < 0) continue;
      if (channels == kPanel) {
        Vec sum[1][kVectors];
        memcpy(sum, sums + m * row_stride, sizeof sum);
        finish(sum, s + m, n, Whole{});
        continue;
      }
      each(channels, [&](int64_t c, auto lanes) {
        Vec sum[1][1] = {{load(sums + m * row_stride + c, Whole{})}};
        finish(sum, s + m, n + c, lanes);
      });
    }
  }

  // The same for rows of a whole panel that are all pixels, in as few instructions as it takes:
  // beside products that wait for nothing, each instruction counts. One function for each set of
  // steps.
  using Rows = void (*)(const Epilogue&, const float* sums, int64_t rows, int64_t s, int64_t n);
  Rows whole_rows() const { return pick<>(relu, add != nullptr, relu_sum, low != nullptr); }

 private:
  template <bool... kSteps, class... Rest>
  static Rows pick(bool step, Rest... rest) {
    return step ? pick<kSteps..., true>(rest...) : pick<kSteps..., false>(rest...);
  }
  template <bool... kSteps>
  static Rows pick() {
    return finish_whole<kSteps...>;
  }

  template <bool kRelu, bool kAdd, bool kReluSum, bool kLow>
  static void finish_whole(const Epilogue& e, const float* sums, int64_t rows, int64_t s,
                           int64_t n) {
    E* const y = e.y + n;
    const E* const add = kAdd ? e.add + n : nullptr;
    const E* const low = kLow ? e.low + n : nullptr;
    const int64_t *const y_at = e.y_at + s, *const low_at = e.low_at + s;
    Vec bias[kVectors];
    memcpy(bias, e.bias + n, sizeof bias);
    for (int64_t m = 0; m < rows; ++m, sums += kPanel) {
      Vec x[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        x[v] = load(sums + v * kLanes, Whole{}) + bias[v];
        if constexpr (kRelu) x[v] = HGFAST_ISA::relu(x[v]);
        if constexpr (is_of_maps<E>) {
          if constexpr (kAdd) x[v] += load(add + y_at[m] + v * kLanes, Whole{});
          if constexpr (kReluSum) x[v] = HGFAST_ISA::relu(x[v]);
          if constexpr (kLow) x[v] += load(low + low_at[m] + v * kLanes, Whole{});
        }
      }
      put_panel(y + y_at[m], x);
    }
  }

  template <int First, int Last, int M, int V, class F>
  static void each_sum(Vec (&sum)[M][V], F f) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int v = First; v < Last; ++v) f(sum[m][v], m, v);
    }
  }

  // Registers First ... Last - 1 of each slot.
  template <int First, int Last, int M, int V, class Lanes>
  void finish_registers(Vec (&sum)[M][V], int64_t s, int64_t n, Lanes lanes) const {
    const auto each_sum = [&](auto f) { Epilogue::each_sum<First, Last>(sum, f); };
#pragma GCC unroll 4
    for (int v = First; v < Last; ++v) {
      const Vec b = load(bias + n + v * kLanes, lanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sum[m][v] += b;
    }
    if (relu) each_sum([&](Vec& x, int, int) { x = HGFAST_ISA::relu(x); });
    if constexpr (is_of_maps<E>) {
      if (add) {
        each_sum(
            [&](Vec& x, int m, int v) { x += load(add + y_at[s + m] + n + v * kLanes, lanes); });
      }
      if (relu_sum) each_sum([&](Vec& x, int, int) { x = HGFAST_ISA::relu(x); });
      if (low) {
        each_sum(
            [&](Vec& x, int m, int v) { x += load(low + low_at[s + m] + n + v * kLanes, lanes); });
      }
    }
    each_sum([&](Vec& x, int m, int v) { put(y + y_at[s + m], n + v * kLanes, x, lanes); });
  }
};

// gcc does not see that `total` is read only where it was written.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// M slots from s0, V registers of channels from n0.
template <int M, int V, class Finish>
void multiply_tile(const Segment<float>* segment, int segments, int64_t s0, int64_t n0, int64_t n,
                   const Finish& epilogue) {
  epilogue.prefetch(s0, M, n0, V * kLanes);
  Vec sum[M][V] = {};
  Vec total[M][V];  // in memory: of the chains before this one
  bool is_first = true;
  int64_t room = kChain;
  for (; segments > 0; --segments, ++segment) {
    const float* b = static_cast<const float*>(segment->b) + n0 * segment->taps * segment->depth;
    const float* a = segment->a;
    const int64_t* at = segment->at + s0;
    for (int64_t tap = 0; tap < segment->taps;
         ++tap, a += segment->tap_stride, at += segment->at_step) {
      const float* row[M];
      for (int m = 0; m < M; ++m) row[m] = a + at[m];
      for (int64_t left = segment->depth;;) {
        const int64_t length = min(left, room);
#pragma GCC unroll 2
        for (int64_t k = 0; k < length; ++k, b += V * kLanes) {
          Vec w[V];
          for (int i = 0; i < V * kLanes; i += 16) __builtin_prefetch(b + kAhead * V * kLanes + i);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) w[v] = load(b + v * kLanes, Whole{});
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) {
            const Vec x = splat(row[m][k]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[m][v] = fma(x, w[v], sum[m][v]);
          }
        }
        left -= length;
        room -= length;
        if (left == 0) break;
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          row[m] += length;
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            total[m][v] = is_first ? sum[m][v] : total[m][v] + sum[m][v];
            sum[m][v] = Vec{};
          }
        }
        is_first = false;
        room = kChain;
      }
    }
  }
  if (!is_first) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[m][v] += total[m][v];
    }
  }
  if (n - n0 >= V * kLanes) {
    epilogue.finish(sum, s0, n0, Whole{});
  } else {
    epilogue.finish(sum, s0, n0, Part{static_cast<int>(n - n0 - (V - 1) * kLanes)});
  }
}

#pragma GCC diagnostic pop

template <class Finish>
using MultiplyTile = void (*)(const Segment<float>*, int, int64_t, int64_t, int64_t, const Finish&);

template <int V, class Finish, int M = kRows>
MultiplyTile<Finish> tile_of(int64_t rows) {
  if constexpr (M > 1) {
    if (rows < M) return tile_of<V, Finish, M - 1>(rows);
  }
  return multiply_tile<M, V, Finish>;
}

// All slots by channels n_first, a multiple of kPanel, to n - 1.
template <class Finish>
void multiply(const Segment<float>* segment, int segments, int64_t slots, int64_t n_first,
              int64_t n, const Finish& epilogue) {
  // Tiles of even height: two of 7 rows keep the FMA ports busier than one of 12 and one of 2.
  const int64_t rows = ceil_div(slots, ceil_div(slots, kRows));
  for (int64_t n0 = n_first; n0 < n; n0 += kPanel) {
    const bool narrow = n - n0 <= kLanes;
    const auto choose = narrow ? tile_of<1, Finish> : tile_of<kVectors, Finish>;
    for (int64_t s0 = 0; s0 < slots; s0 += rows)
      choose(min(rows, slots - s0))(segment, segments, s0, n0, n, epilogue);
  }
}

// Likewise, finished by the epilogue.
template <class E>
void gemm(const Segment<float>* segment, int segments, int64_t slots, int64_t n_first, int64_t n,
          const Epilogue<E>& epilogue) {
  multiply(segment, segments, slots, n_first, n, epilogue);
}

// Walks a map in rows: its place, kept by counting, since a division costs as much as a tile's k.
struct Cursor {
  int64_t row, column, across;

  Cursor(int64_t index, int64_t across)
      : row(index / across), column(index % across), across(across) {}
  void next() {
    if (++column == across) {
      column = 0;
      ++row;
    }
  }
};

// The order in which a product visits the pixels of a band: rows x columns of a map whose rows
// lie `pitch` pixels apart. Where a group of slots would straddle two rows, the product runs
// straight on through the gap between them, and those slots are no pixels.
template <class Operand>
struct Slots {
  int64_t rows, columns, across;

  Slots(int64_t rows, int64_t columns, int64_t pitch)
      : rows(rows),
        columns(columns),
        across(columns % Tiling<Operand>::kGroup == 0 ? columns : pitch) {}
  int64_t count() const { return (rows - 1) * across + columns; }
  Cursor from(int64_t slot) const { return Cursor(slot, across); }
  bool is_pixel(const Cursor& at) const { return at.row < rows && at.column < columns; }
};

// How a convolution's K lies in A and B: a tap's channels, `tap` values from one tap of a row to
// the next and `row` from one row of taps to the next; zeros between them and behind them.
struct Depth {
  int64_t tap, row, total;
};

// One run of channels per tap of the kernel; but a stem's 7x7 taps of 3 channels, padded each,
// would be mostly padding, so there the whole window is one run.
template <class Operand>
constexpr Depth depth_of(int64_t in, int64_t kernel_h, int64_t kernel_w) {
  const int64_t taps = kernel_h * kernel_w, tap = padded<Operand>(in);
  if (in < 16 && taps > 9) return {in, kernel_w * in, padded<Operand>(taps * in)};
  return {tap, kernel_w * tap, taps * tap};
}

// By lines: a row of taps of few channels is one step of an AMX product.
constexpr int64_t kLineTap = 4;
template <class Operand>
constexpr bool has_lines = Tiling<Operand>::kGroup > 1;
template <class Operand>
constexpr Depth depth_of_lines(int64_t kernel_h) {
  return {kLineTap, Tiling<Operand>::kDepth, kernel_h * Tiling<Operand>::kDepth};
}

}  // namespace hgfast::cpu::HGFAST_ISA

#if defined(__AMX_TILE__) || defined(HGFAST_AMX_MODEL)
#include "gemm_amx.h"
#endif

namespace hgfast::cpu::HGFAST_ISA {

// What bfloat16 activations are multiplied as, and float32 ones at "high".
#if defined(__AMX_TILE__) || defined(HGFAST_AMX_MODEL)
using Bf16Operand = bf16;
using HighOperand = bf16x2;
constexpr const char* kHigh = "bf16x3";
#else
using Bf16Operand = float;
using HighOperand = float;
constexpr const char* kHigh = "winograd";
#endif

// Runs f(operand, element) with values of the C++ types.
template <class F>
inline void with_types(Precision precision, F f) {
  if (precision == Precision::highest) {
    f(float{}, float{});
  } else if (precision == Precision::high) {
    f(HighOperand{}, float{});
  } else {
    f(Bf16Operand{}, bf16{});
  }
}

}  // namespace hgfast::cpu::HGFAST_ISA
