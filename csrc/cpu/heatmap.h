// One heatmap as the decoding kernels see it: its values in float32, whatever they are stored as,
// and where its maximum is.
#pragma once

#include "vec.h"

namespace hgfast::cpu::HGFAST_ISA {

struct f16 {
  uint16_t bits;
};

// Exponent and mantissa, put where float32 has them, are the number times 2^-112, subnormals
// included; infinity and NaN (exponent 31) get float32's own exponent for them.
inline Vec from_f16(Halves x) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, (__m256i)x);  // as cvtph, of which GCC 12 warns
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)x);
#else
  const Bits bits = __builtin_convertvector(x, Bits);
  const Bits number = (Bits)((Vec)((bits & 0x7fff) << 13) * 0x1p112f);
  const Bits special = (bits & 0x7c00) == 0x7c00 ? Bits{} + 0x7f800000 : Bits{};
  return (Vec)(number | special | (bits & 0x8000) << 16);
#endif
}

template <class Lanes>
inline Vec load(const f16* p, Lanes lanes) {
  return from_f16(load_halves(p, lanes));
}

inline float value(const float* p) { return *p; }
inline float value(const bf16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline float value(const f16* p) { return load(p, Part{1})[0]; }

// Two registers of neighbours in memory, in whatever order is cheapest.
template <class T>
inline void load_pair(const T* p, Vec* a, Vec* b) {
  *a = load(p, Whole{});
  *b = load(p + kLanes, Whole{});
}
inline void load_pair(const bf16* p, Vec* a, Vec* b) {
  const Bits both = (Bits)load(reinterpret_cast<const float*>(p), Whole{});
  *a = (Vec)(both << 16);
  *b = (Vec)(both & 0xffff0000);
}

// b if either is NaN; one instruction on x86.
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// A bit per lane: whether the two are equal.
inline unsigned equal_lanes(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
#else
  unsigned lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= static_cast<unsigned>(a[i] == b[i]) << i;
  return lanes;
#endif
}

// Likewise: whether a is larger.
inline unsigned larger_lanes(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
#else
  unsigned lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= static_cast<unsigned>(a[i] > b[i]) << i;
  return lanes;
#endif
}

// Remembers in which lanes a NaN went by.
class NanWatch {
 public:
  void see(Vec a, Vec b) {
#if defined(__AVX512F__)
    seen_ |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
#elif defined(__AVX2__)
    seen_ = _mm256_or_ps(seen_, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
#else
    seen_ |= (Bits)((a != a) | (b != b));
#endif
  }

  unsigned lanes() const {
#if defined(__AVX512F__)
    return seen_;
#elif defined(__AVX2__)
    return static_cast<unsigned>(_mm256_movemask_ps(seen_));
#else
    unsigned lanes = 0;
    for (int i = 0; i < kLanes; ++i) lanes |= static_cast<unsigned>(seen_[i] != 0) << i;
    return lanes;
#endif
  }

 private:
#if defined(__AVX512F__)
  __mmask16 seen_ = 0;
#elif defined(__AVX2__)
  Vec seen_{};
#else
  Bits seen_{};
#endif
};

// The largest lane; none is NaN.
inline float largest(Vec x) {
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

template <class T>
struct Heatmap {
  const T* data;
  int64_t height, width;
  int64_t stride_h, stride_w;  // in elements

  float at(int64_t x, int64_t y) const { return value(data + y * stride_h + x * stride_w); }
  bool dense() const { return stride_w == 1 && stride_h == width; }
};

struct Peak {
  float value;
  int64_t x, y;  // the first cell, in row order, that has it
};

// The cell number `index`, in row order.
template <class T>
inline Peak cell_of(const Heatmap<T>& map, float value, int64_t index) {
  // 64 bits divide several times as slowly.
  const int64_t y = index >> 32 ? index / map.width
                                : static_cast<uint32_t>(index) / static_cast<uint32_t>(map.width);
  return {value, index - y * map.width, y};
}

constexpr float kNan = __builtin_nanf("");
constexpr float kInfinity = __builtin_inff();

// The maximum of a dense heatmap; NaN, at any place, if there is one in it.
//
// The first pass only compares: largest values, a register of them per chunk of the map, without
// their places, which would cost two instructions more per register. The place is looked up in the
// chunk that has it, which is still in the L1 cache.
template <class T>
Peak find_peak(const Heatmap<T>& map) {
  constexpr int64_t kChunks = 16;
  constexpr int64_t kAhead = 2048;
  const int64_t count = map.height * map.width;
  if (count < kLanes) {
    Peak peak{-kInfinity, 0, 0};
    for (int64_t i = 0; i < count; ++i) {
      const float v = value(map.data + i);
      if (v != v) return {kNan, 0, 0};
      if (v > peak.value) peak = cell_of(map, v, i);
    }
    return peak;
  }
  const Vec lowest = splat(-kInfinity);
  const int64_t chunk = max(4 * kLanes, round_up(ceil_div(count, kChunks), 4 * kLanes));
  Vec tops[kChunks];
  NanWatch nan;
  Vec best = lowest;
  int chunks = 0;
  for (int64_t first = 0; first < count; first += chunk) {
    const int64_t end = min(first + chunk, count);
    int64_t i = first;
    Vec a = lowest, b = lowest, c = lowest, d = lowest;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      for (size_t line = 0; line < 4 * kLanes * sizeof(T); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(map.data + i) + kAhead + line);
      Vec v, w, x, y;
      load_pair(map.data + i, &v, &w);
      load_pair(map.data + i + 2 * kLanes, &x, &y);
      a = larger(v, a);
      b = larger(w, b);
      c = larger(x, c);
      d = larger(y, d);
      nan.see(v, w);
      nan.see(x, y);
    }
    for (; i < end; i += kLanes) {  // the map's end, some of it again
      const Vec v = load(map.data + min(i, count - kLanes), Whole{});
      a = larger(v, a);
      nan.see(v, v);
    }
    tops[chunks] = larger(larger(a, b), larger(c, d));
    best = larger(tops[chunks++], best);
  }
  if (nan.lanes()) return {kNan, 0, 0};

  const float top = largest(best);
  int in = 0;
  while (in < chunks - 1 && !equal_lanes(tops[in], splat(top))) ++in;
  for (int64_t i = in * chunk; i < count; i += kLanes) {
    const int64_t at = min(i, count - kLanes);
    const unsigned lanes = equal_lanes(load(map.data + at, Whole{}), splat(top));
    if (!lanes) continue;
    return cell_of(map, top, at + __builtin_ctz(lanes));
  }
  return {top, 0, 0};  // not reached
}

// The maxima of `count` heatmaps whose joints are neighbours in memory, `map` the first of them.
//
// A register holds as many joints. Again the first pass only compares, and remembers after each row
// for every joint whether the row was higher than all before; the column is looked up in that row.
template <class T>
void find_peaks_of_joints(const Heatmap<T>& map, int64_t count, Peak* peaks) {
  each(count, [&](int64_t joint, auto lanes) {
    Vec best = splat(-kInfinity);
    Bits rows{};
    NanWatch nan;
    for (int64_t y = 0; y < map.height; ++y) {
      const T* row = map.data + y * map.stride_h + joint;
      Vec even = splat(-kInfinity), odd = even;
      int64_t x = 0;
      for (; x + 2 <= map.width; x += 2) {
        const Vec a = load(row + x * map.stride_w, lanes);
        const Vec b = load(row + (x + 1) * map.stride_w, lanes);
        even = larger(a, even);
        odd = larger(b, odd);
        nan.see(a, b);
      }
      if (x < map.width) {
        const Vec a = load(row + x * map.stride_w, lanes);
        even = larger(a, even);
        nan.see(a, a);
      }
      const Vec top = larger(even, odd);
      rows = top > best ? Bits{} + static_cast<uint32_t>(y) : rows;
      best = larger(top, best);
    }
    const unsigned lost = nan.lanes();
    for (int64_t i = 0; i < min(kLanes, count - joint); ++i) {
      Peak& peak = peaks[joint + i];
      peak = {best[i], 0, rows[i]};
      if (lost >> i & 1) {
        peak.value = kNan;
        continue;
      }
      const T* at = map.data + peak.y * map.stride_h + joint + i;
      while (value(at) != peak.value) {
        at += map.stride_w;
        ++peak.x;
      }
    }
  });
}

// The same where nothing lies between the pixels: memory is a row of values again, in which the
// joints recur every `joints` registers, kLanes pixels on, in the same lanes. So every register is
// full and every cache line read once, whatever the number of joints.
template <class T, int kMostJoints>
void find_peaks_of_pixels(const Heatmap<T>& map, int64_t joints, Peak* peaks) {
  constexpr int64_t kPeriods = 8;  // make a chunk, which stays in the L1 cache
  const int64_t count = map.height * map.width, last = count - kLanes;
  Vec tops[kMostJoints];
  Bits chunks[kMostJoints];
  NanWatch nans[kMostJoints];
  for (int64_t j = 0; j < joints; ++j) {
    tops[j] = splat(-kInfinity);
    chunks[j] = Bits{};
  }
  for (int64_t chunk = 0; chunk * kPeriods * kLanes < count; ++chunk) {
    const int64_t first = chunk * kPeriods * kLanes, end = min(first + kPeriods * kLanes, count);
    for (int64_t j = 0; j < joints; ++j) {
      const T* from = map.data + j * kLanes;
      Vec top = splat(-kInfinity);
      NanWatch nan = nans[j];
      int64_t pixel = first;
      for (; pixel + 2 * kLanes <= end; pixel += 2 * kLanes) {
        const Vec a = load(from + pixel * joints, Whole{});
        const Vec b = load(from + (pixel + kLanes) * joints, Whole{});
        top = larger(larger(a, b), top);
        nan.see(a, b);
      }
      for (; pixel < end; pixel += kLanes) {  // the map's end, some of it again
        const Vec a = load(from + min(pixel, last) * joints, Whole{});
        top = larger(a, top);
        nan.see(a, a);
      }
      nans[j] = nan;
      chunks[j] = top > tops[j] ? Bits{} + static_cast<uint32_t>(chunk) : chunks[j];
      tops[j] = larger(top, tops[j]);
    }
  }

  // Lane i of register j is joint (j kLanes + i) % joints of a pixel of each period.
  float values[kMostJoints * kLanes];
  uint32_t at[kMostJoints * kLanes];
  memcpy(values, tops, joints * sizeof(Vec));
  memcpy(at, chunks, joints * sizeof(Bits));
  for (int64_t joint = 0; joint < joints; ++joint) peaks[joint] = {-kInfinity, 0, 0};
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t joint = 0; joint < joints; ++joint) {
      float& best = peaks[joint].value;
      best = values[i * joints + joint] > best ? values[i * joints + joint] : best;
    }
  }
  for (int64_t joint = 0; joint < joints; ++joint) {
    const float top = peaks[joint].value;
    uint32_t chunk = UINT32_MAX;
    for (int64_t i = 0; i < kLanes; ++i) {
      const bool earlier = values[i * joints + joint] == top && at[i * joints + joint] < chunk;
      chunk = earlier ? at[i * joints + joint] : chunk;
    }
    int64_t cell = count;
    for (int64_t i = 0; i < kLanes; ++i) {
      if (values[i * joints + joint] != top || at[i * joints + joint] != chunk) continue;
      for (int64_t pixel = chunk * kPeriods * kLanes; pixel < count; pixel += kLanes) {
        const int64_t here = min(pixel, last) + i;
        if (value(map.data + here * joints + joint) != top) continue;
        cell = min(cell, here);
        break;
      }
    }
    peaks[joint] = cell_of(map, top, cell);
  }
  for (int64_t j = 0; j < joints; ++j) {
    const unsigned lost = nans[j].lanes();
    for (int i = 0; lost >> i; ++i)
      if (lost >> i & 1) peaks[(j * kLanes + i) % joints].value = kNan;
  }
}

template <int kMostJoints, class T>
void find_peaks(const Heatmap<T>& map, int64_t joints, Peak* peaks) {
  const bool dense = map.stride_w == joints && map.stride_h == map.width * joints;
  if (dense && map.height * map.width >= kLanes) {
    find_peaks_of_pixels<T, kMostJoints>(map, joints, peaks);
  } else {
    find_peaks_of_joints(map, joints, peaks);
  }
}

// The first NaN of a heatmap in which there is one.
template <class T>
Peak first_nan(const Heatmap<T>& map) {
  for (int64_t y = 0; y < map.height; ++y) {
    for (int64_t x = 0; x < map.width; ++x) {
      const float v = map.at(x, y);
      if (v != v) return {v, x, y};
    }
  }
  return {kNan, 0, 0};
}

}  // namespace hgfast::cpu::HGFAST_ISA
