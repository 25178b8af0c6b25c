// Copies a feature map between layouts and element types: what comes into a plan and what leaves
// it.
//
// A task is one row of one image. Between a layout with the columns innermost (NCHW) and one with
// the channels innermost (NHWC) a row is a transposition, done in blocks of 16 by 16 that stay in
// the first-level cache, so that both sides are read and written by whole cache lines.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>

#include "cpu_binding.h"

namespace hgfast {

struct Strides {
  int64_t batch, channels, height, width;  // in elements
};

inline Strides nhwc(const Shape& s) {
  return {s.height * s.width * s.channels, 1, s.width * s.channels, s.channels};
}

inline Strides nchw(const Shape& s) {
  return {s.channels * s.height * s.width, s.height * s.width, s.width, 1};
}

struct MapCopy {
  Shape shape;
  cpu::Element from, to;
  Strides from_strides, to_strides;
};

namespace detail {

constexpr int64_t kBlock = 16;

template <class From, class To>
void copy_row(const From* from, int64_t from_channel, int64_t from_column, To* to,
              int64_t to_channel, int64_t to_column, int64_t channels, int64_t columns) {
  if (from_channel == 1 && to_channel == 1) {
    for (int64_t x = 0; x < columns; ++x)
      for (int64_t c = 0; c < channels; ++c)
        to[x * to_column + c] = static_cast<To>(static_cast<float>(from[x * from_column + c]));
    return;
  }
  float block[kBlock][kBlock];  // [channel][column]
  for (int64_t first_c = 0; first_c < channels; first_c += kBlock) {
    const int64_t nc = std::min(kBlock, channels - first_c);
    for (int64_t first_x = 0; first_x < columns; first_x += kBlock) {
      const int64_t nx = std::min(kBlock, columns - first_x);
      const From* in = from + first_c * from_channel + first_x * from_column;
      To* out = to + first_c * to_channel + first_x * to_column;
      if (from_column == 1) {
        for (int64_t c = 0; c < nc; ++c)
          for (int64_t x = 0; x < nx; ++x)
            block[c][x] = static_cast<float>(in[c * from_channel + x]);
      } else {
        for (int64_t x = 0; x < nx; ++x)
          for (int64_t c = 0; c < nc; ++c)
            block[c][x] = static_cast<float>(in[c * from_channel + x * from_column]);
      }
      if (to_column == 1) {
        for (int64_t c = 0; c < nc; ++c)
          for (int64_t x = 0; x < nx; ++x) out[c * to_channel + x] = static_cast<To>(block[c][x]);
      } else {
        for (int64_t x = 0; x < nx; ++x)
          for (int64_t c = 0; c < nc; ++c)
            out[c * to_channel + x * to_column] = static_cast<To>(block[c][x]);
      }
    }
  }
}

template <class From, class To>
void copy_rows(const MapCopy& copy, const void* from, void* to, int64_t begin, int64_t end) {
  const Strides &in = copy.from_strides, &out = copy.to_strides;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / copy.shape.height, y = row % copy.shape.height;
    copy_row(static_cast<const From*>(from) + image * in.batch + y * in.height, in.channels,
             in.width, static_cast<To*>(to) + image * out.batch + y * out.height, out.channels,
             out.width, copy.shape.channels, copy.shape.width);
  }
}

}  // namespace detail

inline int64_t copy_tasks(const MapCopy& copy) { return copy.shape.batch * copy.shape.height; }

inline void copy_map(const MapCopy& copy, const void* from, void* to, int64_t begin, int64_t end) {
  using c10::BFloat16;
  const bool from_float = copy.from == cpu::Element::float32;
  const bool to_float = copy.to == cpu::Element::float32;
  if (from_float && to_float) detail::copy_rows<float, float>(copy, from, to, begin, end);
  if (from_float && !to_float) detail::copy_rows<float, BFloat16>(copy, from, to, begin, end);
  if (!from_float && to_float) detail::copy_rows<BFloat16, float>(copy, from, to, begin, end);
  if (!from_float && !to_float) detail::copy_rows<BFloat16, BFloat16>(copy, from, to, begin, end);
}

}  // namespace hgfast
