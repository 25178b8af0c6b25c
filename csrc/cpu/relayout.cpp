// Copies a feature map between layouts and element types: what comes into a plan and what leaves
// it.
//
// Between a layout with the columns innermost (NCHW) and one with the channels innermost (NHWC)
// that is the transposition of a matrix of pixels by channels. It goes by squares of kLanes by
// kLanes in registers: with AVX-512, 16 cache lines in, 64 shuffles, 16 cache lines out, so both
// sides are moved by whole lines and no element is touched alone. A task is a band of kBand pixels:
// its NHWC side stays in the first-level cache while the squares fill its lines.
#include "table.h"
#include "vec.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

constexpr int64_t kBand = 32;

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
};

// log2(kLanes) perfect shuffles of the rows' elements are a transposition.
inline void transpose(Vec (&rows)[kLanes]) {
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
void transpose_square(const From* x, int64_t x_row, To* y, int64_t y_column, Rows rows, int nrows,
                      Columns columns, int ncolumns) {
  Vec square[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) square[i] = i < nrows ? load(x + i * x_row, columns) : Vec{};
  transpose(square);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (i < ncolumns) store(y + i * y_column, square[i], rows);
}

template <class From, class To>
void transpose_matrix(const From* x, int64_t x_row, int64_t rows, int64_t columns, To* y,
                      int64_t y_column) {
  each(rows, [&](int64_t r, auto part_of_rows) {
    each(columns, [&](int64_t c, auto part_of_columns) {
      transpose_square(x + r * x_row + c, x_row, y + c * y_column + r, y_column, part_of_rows,
                       static_cast<int>(min(rows - r, kLanes)), part_of_columns,
                       static_cast<int>(min(columns - c, kLanes)));
    });
  });
}

inline float value(float x) { return x; }
inline float value(bf16 x) { return load(&x, Part{1})[0]; }

// Pixels one after the other, at even distances.
template <class From, class To>
void copy_pixels(const From* x, const Strides& from, To* y, const Strides& to, int64_t channels,
                 int64_t pixels) {
  if (from.channels == 1 && to.channels == 1) {
    for (int64_t p = 0; p < pixels; ++p, x += from.width, y += to.width)
      each(channels, [&](int64_t c, auto lanes) { store(y + c, load(x + c, lanes), lanes); });
  } else if (from.width == 1 && to.channels == 1) {
    transpose_matrix(x, from.channels, channels, pixels, y, to.width);
  } else if (from.channels == 1 && to.width == 1) {
    transpose_matrix(x, from.width, pixels, channels, y, to.channels);
  } else {
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < channels; ++c)
        store(y + p * to.width + c * to.channels,
              splat(value(x[p * from.width + c * from.channels])), Part{1});
  }
}

// Rows that follow each other at the distance of their pixels are one long row.
struct Rows {
  int64_t count, pixels, bands;

  explicit Rows(const RelayoutParams& p) {
    const auto joined = [&](const Strides& s) { return s.height == s.width * p.width; };
    const bool whole = joined(p.from) && joined(p.to);
    count = p.batch * (whole ? 1 : p.height);
    pixels = whole ? p.height * p.width : p.width;
    bands = ceil_div(pixels, kBand);
  }
};

}  // namespace

Work plan_relayout(const RelayoutParams& p, int) {
  const Rows rows(p);
  return {.tasks = rows.count * rows.bands, .scratch = 0};
}

void relayout(const RelayoutParams& p, int, int64_t begin, int64_t end, void*) {
  const Rows rows(p);
  const int64_t per_image = rows.count / max(p.batch, 1);
  with_element(p.x_element, [&](auto from) {
    with_element(p.y_element, [&](auto to) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / rows.bands, first = task % rows.bands * kBand;
        const int64_t image = row / per_image, line = row % per_image;
        const auto at = [&](const Strides& s) {
          return image * s.batch + line * s.height + first * s.width;
        };
        copy_pixels(static_cast<const decltype(from)*>(p.x) + at(p.from), p.from,
                    static_cast<decltype(to)*>(p.y) + at(p.to), p.to, p.channels,
                    min(kBand, rows.pixels - first));
      }
    });
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
