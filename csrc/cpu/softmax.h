// The mean place under softmax(beta h), for softargmax.
#pragma once

#include "heatmap.h"

namespace hgfast::cpu::HGFAST_ISA {

typedef double Doubles __attribute__((vector_size(kLanes * 4)));
typedef float HalfVec __attribute__((vector_size(kLanes * 2)));

// In double, and half as many: the sums of lanes kLanes / 2 apart.
inline Doubles doubles(Vec x) {
  HalfVec halves[2];
  memcpy(halves, &x, sizeof x);
  return __builtin_convertvector(halves[0], Doubles) + __builtin_convertvector(halves[1], Doubles);
}

inline double sum(Doubles x) {
  double total = 0;
  for (int i = 0; i < kLanes / 2; ++i) total += x[i];
  return total;
}

inline Vec counting() {
  Vec x{};
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(i);
  return x;
}

// The lanes that a Part does not have, zero.
inline Vec keep(Vec x, Whole) { return x; }
inline Vec keep(Vec x, Part part) {
  return counting() < splat(static_cast<float>(part.count)) ? x : Vec{};
}

inline unsigned lane_bits(Whole) { return (1u << kLanes) - 1; }
inline unsigned lane_bits(Part part) { return (1u << part.count) - 1; }

// exp(beta d) for d <= 0, of which -87 / beta is low enough: the weights of the rest are as good as
// nothing beside that of the maximum, which is 1.
//
// As Cody and Waite do it ("Software Manual for the Elementary Functions", 1980): with n the whole
// number next to t / ln 2, exp(t) = 2^n exp(r), r = t - n ln 2, where ln 2 has a head of few bits,
// so that its product with n is exact, and a tail. |r| <= 0.35, for which exp's Taylor series up to
// r^7 is off by less than 6e-9. beta d comes in head and tail as well: rounded to one float32 its
// error would grow with its size.
class ScaledExp {
 public:
  explicit ScaledExp(double beta) {
    constexpr double kMost = 0x1.fffffep127;  // of float32
    if (beta > kMost) beta = kMost;
    head_ = static_cast<float>(beta);
    tail_ = static_cast<float>(beta - static_cast<double>(head_));
    lowest_ = static_cast<float>(87 / beta < kMost ? -87 / beta : -kMost);
  }

  Vec operator()(Vec d) const {
    constexpr float kRound = 0x1.8p23f;  // added, it leaves a whole number in the last bits
    d = larger(d, splat(lowest_));       // NaN, of infinities, becomes the lowest
    const Vec t = d * head_;
    const Vec rest = fma(d, splat(head_), -t) + d * tail_;
    const Vec shifted = t * 0x1.715476p0f + kRound;  // 1 / ln 2
    const Vec n = shifted - kRound;
    Vec r = t - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    r = r + rest;
    constexpr float kSeries[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    Vec e = splat(1.0f / 5040);
    for (const float coefficient : kSeries) e = fma(e, r, splat(coefficient));
    const Bits power = ((Bits)shifted - (Bits)splat(kRound) + 127) << 23;
    return e * (Vec)power;
  }

 private:
  float head_, tail_, lowest_;
};

struct Mean {
  double x, y;
  bool flat;  // one value all over
};

// Weights are float32 and added up so along parts of a row, in double beyond.
inline Mean mean_place(const Heatmap<float>& map, float top, double beta) {
  constexpr int64_t kPart = 8 * kLanes;
  const ScaledExp weigh(beta);
  const Vec highest = splat(top), columns = counting();
  Doubles total{}, sum_x{}, sum_y{};
  bool flat = true;
  for (int64_t y = 0; y < map.height; ++y) {
    for (int64_t first = 0; first < map.width; first += kPart) {
      const float* from = map.data + y * map.stride_h + first;
      Vec weights{}, moments{};
      each(min(kPart, map.width - first), [&](int64_t x, auto lanes) {
        const Vec v = load(from + x, lanes);
        const Vec weight = keep(v == highest ? splat(1) : weigh(v - highest), lanes);
        if (flat) flat = (equal_lanes(v, highest) & lane_bits(lanes)) == lane_bits(lanes);
        weights += weight;
        moments += weight * (columns + static_cast<float>(x));
      });
      const Doubles row = doubles(weights);
      total += row;
      sum_x += doubles(moments) + row * static_cast<double>(first);
      sum_y += row * static_cast<double>(y);
    }
  }
  const double all = sum(total);
  return {sum(sum_x) / all, sum(sum_y) / all, flat};
}

}  // namespace hgfast::cpu::HGFAST_ISA
