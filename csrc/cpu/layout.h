// Pixels of a feature map from one layout and element type to another.
//
// Between a layout with the columns innermost (NCHW) and one with the channels innermost (NHWC)
// that is the transposition of a matrix of pixels by channels. It goes by squares of kLanes by
// kLanes in registers: with AVX-512, 16 cache lines in, 64 shuffles, 16 cache lines out, so both
// sides are moved by whole lines and no element is touched alone. An image's three channels would
// leave such a square mostly empty: they are interleaved.
#pragma once

#include "vec.h"

namespace hgfast::cpu::HGFAST_ISA {

// The lanes of two registers in turn, from their lower or their upper halves.
template <int N, int... I>
struct Zip : Zip<N - 1, N - 1, I...> {};
template <int... I>
struct Zip<0, I...> {
  static Vec low(Vec a, Vec b) {
    return __builtin_shufflevector(a, b, (I / 2 + I % 2 * kLanes)...);
  }
  static Vec high(Vec a, Vec b) {
    return __builtin_shufflevector(a, b, (kLanes / 2 + I / 2 + I % 2 * kLanes)...);
  }
  // Register `Out` of pixels one after the other, whose channels lie in `rows`: those before
  // `Row`, and from `Row` its own.
  template <int Channels, int Out, int Row = Channels - 1>
  static Vec pixels(const Vec (&rows)[Channels]) {
    if constexpr (Row == 0) {
      return __builtin_shufflevector(rows[0], rows[0], ((Out * kLanes + I) / Channels)...);
    } else {
      return __builtin_shufflevector(
          pixels<Channels, Out, Row - 1>(rows), rows[Row],
          ((Out * kLanes + I) % Channels == Row ? kLanes + (Out * kLanes + I) / Channels : I)...);
    }
  }
};

// log2(kLanes) perfect shuffles of the rows' elements are a transposition.
inline void swap_axes(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = Zip<kLanes>::low(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = Zip<kLanes>::high(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// y[column][row] = x[row][column], of a square or what the edges leave of one.
template <class From, class To, class Rows, class Columns>
inline void transpose_square(const From* x, int64_t x_row, To* y, int64_t y_column, Rows rows,
                             int nrows, Columns columns, int ncolumns) {
  Vec square[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) square[i] = i < nrows ? load(x + i * x_row, columns) : Vec{};
  swap_axes(square);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (i < ncolumns) store(y + i * y_column, square[i], rows);
}

template <class From, class To>
inline void transpose_matrix(const From* x, int64_t x_row, int64_t rows, int64_t columns, To* y,
                             int64_t y_column) {
  each(rows, [&](int64_t r, auto part_of_rows) {
    each(columns, [&](int64_t c, auto part_of_columns) {
      transpose_square(x + r * x_row + c, x_row, y + c * y_column + r, y_column, part_of_rows,
                       static_cast<int>(min(rows - r, kLanes)), part_of_columns,
                       static_cast<int>(min(columns - c, kLanes)));
    });
  });
}

// Three rows, `x_row` apart, become dense pixels: kLanes at a time, those beyond are left. Returns
// how many there were.
template <class From, class To>
inline int64_t interleave_three(const From* x, int64_t x_row, int64_t pixels, To* y) {
  int64_t p = 0;
  for (; p + kLanes <= pixels; p += kLanes, y += 3 * kLanes) {
    Vec rows[3];
    for (int i = 0; i < 3; ++i) rows[i] = load(x + i * x_row + p, Whole{});
    store(y, Zip<kLanes>::pixels<3, 0>(rows), Whole{});
    store(y + kLanes, Zip<kLanes>::pixels<3, 1>(rows), Whole{});
    store(y + 2 * kLanes, Zip<kLanes>::pixels<3, 2>(rows), Whole{});
  }
  return p;
}

inline float value(float x) { return x; }
inline float value(bf16 x) { return load(&x, Part{1})[0]; }

// Pixels one after the other, at even distances.
template <class From, class To>
inline void copy_pixels(const From* x, const Strides& from, To* y, const Strides& to,
                        int64_t channels, int64_t pixels) {
  if (from.channels == 1 && to.channels == 1) {
    for (int64_t p = 0; p < pixels; ++p, x += from.width, y += to.width)
      each(channels, [&](int64_t c, auto lanes) { store(y + c, load(x + c, lanes), lanes); });
  } else if (from.width == 1 && to.channels == 1) {
    int64_t done = 0;
    if (channels == 3 && to.width == 3) done = interleave_three(x, from.channels, pixels, y);
    transpose_matrix(x + done, from.channels, channels, pixels - done, y + done * to.width,
                     to.width);
  } else if (from.channels == 1 && to.width == 1) {
    transpose_matrix(x, from.width, pixels, channels, y, to.channels);
  } else {
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < channels; ++c)
        store(y + p * to.width + c * to.channels,
              splat(value(x[p * from.width + c * from.channels])), Part{1});
  }
}

}  // namespace hgfast::cpu::HGFAST_ISA
