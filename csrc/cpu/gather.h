// Heatmaps of any layout as dense planes of float32, one per joint; and two planes merged, those of
// an image and of its mirror image.
#pragma once

#include "heatmap.h"

namespace hgfast::cpu::HGFAST_ISA {

// Lanes of both in turn: a[0] b[0] a[1] b[1] ..., the first half and the second.
inline void interleave(Vec a, Vec b, Vec* low, Vec* high) {
#if defined(__AVX512F__)
  const Bits first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  *low = _mm512_permutex2var_ps(a, (__m512i)first, b);
  *high = _mm512_permutex2var_ps(a, (__m512i)(first + 8), b);
#elif defined(__AVX2__)
  const Vec even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
  *low = _mm256_permute2f128_ps(even, odd, 0x20);
  *high = _mm256_permute2f128_ps(even, odd, 0x31);
#else
  *low = Vec{a[0], b[0], a[1], b[1]};
  *high = Vec{a[2], b[2], a[3], b[3]};
#endif
}

// Rows become columns. Every round interleaves row i with row i + kLanes / 2.
inline void transpose(Vec (&rows)[kLanes]) {
  for (int width = kLanes; width > 1; width /= 2) {
    Vec next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i)
      interleave(rows[i], rows[i + kLanes / 2], &next[2 * i], &next[2 * i + 1]);
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

inline Vec reversed(Vec x) {
#if defined(__AVX512F__)
  const Bits order = {15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0};
  return _mm512_permutex2var_ps(x, (__m512i)order, x);
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0));
#else
  return Vec{x[3], x[2], x[1], x[0]};
#endif
}

// One lane further, the first one kept.
inline Vec delayed(Vec x) {
#if defined(__AVX512F__)
  const Bits order = {0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14};
  return _mm512_permutex2var_ps(x, (__m512i)order, x);
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(0, 0, 1, 2, 3, 4, 5, 6));
#else
  return Vec{x[0], x[0], x[1], x[2]};
#endif
}

template <class T>
Heatmap<float> gather(const Heatmap<T>& map, float* plane) {
  for (int64_t y = 0; y < map.height; ++y) {
    const T* from = map.data + y * map.stride_h;
    float* to = plane + y * map.width;
    if (map.stride_w == 1) {
      each(map.width, [&](int64_t x, auto lanes) { store(to + x, load(from + x, lanes), lanes); });
    } else {
      for (int64_t x = 0; x < map.width; ++x) to[x] = value(from + x * map.stride_w);
    }
  }
  return {plane, map.height, map.width, map.width, 1};
}

// Heatmaps whose joints are neighbours in memory, `map` the first of them, into planes
// `plane_size` apart: squares of kLanes pixels and kLanes joints are transposed in registers.
template <class T>
void gather_joints(const Heatmap<T>& map, int64_t joints, float* planes, int64_t plane_size) {
  for (int64_t y = 0; y < map.height; ++y) {
    const T* row = map.data + y * map.stride_h;
    each(joints, [&](int64_t joint, auto lanes) {
      const int64_t count = min(kLanes, joints - joint);
      if (count <= kLanes / 4) {  // a square would be mostly empty
        for (int64_t i = 0; i < count; ++i) {
          float* to = planes + (joint + i) * plane_size + y * map.width;
          for (int64_t x = 0; x < map.width; ++x) to[x] = value(row + x * map.stride_w + joint + i);
        }
        return;
      }
      each(map.width, [&](int64_t x, auto pixels) {
        const int64_t wide = min(kLanes, map.width - x);
        Vec square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)  // past the row's end its last pixel again
          square[i] = load(row + min(x + i, x + wide - 1) * map.stride_w + joint, lanes);
        transpose(square);
        float* to = planes + joint * plane_size + y * map.width + x;
        for (int64_t i = 0; i < count; ++i) store(to + i * plane_size, square[i], pixels);
      });
    });
  }
}

// (map + mirrored-back flipped) factor. Both have dense rows; `plane` may be where `map` is.
template <class A, class B>
Heatmap<float> merge(const Heatmap<A>& map, const Heatmap<B>& flipped, bool shift, float factor,
                     float* plane) {
  const int64_t last = map.width - 1;
  for (int64_t y = 0; y < map.height; ++y) {
    const A* a = map.data + y * map.stride_h;
    const B* b = flipped.data + y * flipped.stride_h;
    float* to = plane + y * map.width;
    int64_t x = 0;
    for (; x + kLanes <= map.width; x += kLanes) {
      const bool repeat = shift && x == 0;  // column 0 stands in for the one before it
      const int64_t first = last + (shift && !repeat) - x - (kLanes - 1);
      const Vec mirrored = reversed(load(b + first, Whole{}));
      const Vec other = repeat ? delayed(mirrored) : mirrored;
      store(to + x, (load(a + x, Whole{}) + other) * factor, Whole{});
    }
    for (; x < map.width; ++x)
      to[x] = (value(a + x) + value(b + min(last, last + shift - x))) * factor;
  }
  return {plane, map.height, map.width, map.width, 1};
}

}  // namespace hgfast::cpu::HGFAST_ISA
