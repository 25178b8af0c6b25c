// The Gaussian of dark, udp and megvii: a separable filter with zeros around the map, along rows,
// then along columns, in float32.
//
// With taps w from the middle outwards it is
//
//     w[0] h[x] + w[1] (h[x - 1] + h[x + 1]) + w[2] (h[x - 2] + h[x + 2]) + ...
//
// where each product and sum is rounded for itself, in this order: the bits are those of
// reference.gaussian_blur on every instruction set (no contraction: see cmake/kernels.cmake).
#pragma once

#include "heatmap.h"

namespace hgfast::cpu::HGFAST_ISA {

// A part of a blurred map, or all of it. Rows begin `stride` apart, a multiple of kLanes.
struct Blurred {
  const float* data;
  int64_t x, y;  // its first cell
  int64_t width, height, stride;

  float at(int64_t px, int64_t py) const { return data[(py - y) * stride + px - x]; }
};

class Blur {
 public:
  // For parts of at most `height` x `width` cells.
  Blur(const DecodeParams& p, int64_t height, int64_t width, Scratch& scratch)
      : reach_(p.reach),
        taps_(p.taps),
        line_(scratch.take<float>(round_up(width, kLanes) + 2 * reach_)),
        rows_(scratch.take<float>((height + 2 * reach_) * round_up(width, kLanes))),
        result_(scratch.take<float>(height * round_up(width, kLanes))) {}

  // The cells from (x, y) on. It is overwritten by the next.
  template <class T>
  Blurred part(const Heatmap<T>& map, int64_t x, int64_t y, int64_t height, int64_t width) {
    const int64_t stride = round_up(width, kLanes);
    for (int64_t row = 0; row < height + 2 * reach_; ++row) {
      float* to = rows_ + row * stride;
      const int64_t from = y - reach_ + row;
      if (0 <= from && from < map.height) {
        copy_line(map, from, x - reach_, stride + 2 * reach_);
        for (int64_t i = 0; i < stride; i += kLanes) filter(line_ + i, 1, to + i);
      } else {
        for (int64_t i = 0; i < stride; i += kLanes) store(to + i, Vec{}, Whole{});
      }
    }
    for (int64_t row = 0; row < height; ++row) {
      for (int64_t i = 0; i < stride; i += kLanes)
        filter(rows_ + row * stride + i, stride, result_ + row * stride + i);
    }
    last_ = {result_, x, y, width, height, stride};
    return last_;
  }

  // The last part, its rows moved together.
  Heatmap<float> dense() {
    for (int64_t y = 0; y < last_.height; ++y)
      memmove(result_ + y * last_.width, result_ + y * last_.stride, 4 * last_.width);
    return {result_, last_.height, last_.width, last_.width, 1};
  }

  void negate() {
    for (int64_t i = 0; i < last_.height * last_.width; ++i) result_[i] = -result_[i];
  }

 private:
  // A register's worth; `from` is where the first tap's reach begins.
  void filter(const float* from, int64_t step, float* to) const {
    const float* middle = from + reach_ * step;
    Vec total = taps_[0] * load(middle, Whole{});
    for (int64_t i = 1; i <= reach_; ++i) {
      const Vec both = load(middle - i * step, Whole{}) + load(middle + i * step, Whole{});
      total = total + taps_[i] * both;
    }
    store(to, total, Whole{});
  }

  // `count` cells of a row from x on, zeros outside the map.
  template <class T>
  void copy_line(const Heatmap<T>& map, int64_t y, int64_t x, int64_t count) {
    const int64_t before = min(max(0, -x), count), end = max(before, min(count, map.width - x));
    for (int64_t i = 0; i < before; ++i) line_[i] = 0;
    const T* from = map.data + y * map.stride_h + (x + before) * map.stride_w;
    float* to = line_ + before;
    if (map.stride_w == 1) {
      each(end - before,
           [&](int64_t i, auto lanes) { store(to + i, load(from + i, lanes), lanes); });
    } else {
      for (int64_t i = 0; i < end - before; ++i) to[i] = value(from + i * map.stride_w);
    }
    for (int64_t i = end; i < count; ++i) line_[i] = 0;
  }

  int64_t reach_;
  const float* taps_;
  float *line_, *rows_, *result_;
  Blurred last_{};
};

}  // namespace hgfast::cpu::HGFAST_ISA
