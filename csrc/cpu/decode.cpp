// Heatmaps to joints: the place of each map's maximum, moved a quarter of a pixel towards the
// higher neighbour. One task per heatmap; every value is read once, the winning row twice.
#include "table.h"
#include "vec.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

struct f16 {
  uint16_t bits;
};

float value(float x) { return x; }

float value(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// Exponent and mantissa, put where float32 has them, are the number times 2^-112, subnormals
// included; infinity and NaN (exponent 31) need float32's own exponent for them.
float value(f16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  float y;
  memcpy(&y, &magnitude, sizeof y);
  y *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &y, sizeof bits);
  bits |= special | sign;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// The largest of a row, NaN if one is there.
template <class T>
float row_maximum(const T* row, int64_t width, int64_t stride) {
  float best = value(row[0]);
  for (int64_t x = 1; x < width; ++x) {
    const float v = value(row[x * stride]);
    if (v > best || v != v) best = v;
    if (best != best) break;
  }
  return best;
}

// The same over neighbours in memory, a register at a time.
template <class T>
float dense_row_maximum(const T* row, int64_t width) {
  if (width < kLanes) return row_maximum(row, width, 1);
  Vec best = load(row, Whole{});
  for (int64_t x = kLanes; x + kLanes <= width; x += kLanes)
    best = maximum(best, load(row + x, Whole{}));
  best = maximum(best, load(row + width - kLanes, Whole{}));  // the end, some of it again
  float lanes[kLanes];
  memcpy(lanes, &best, sizeof lanes);
  return row_maximum(lanes, kLanes, 1);
}

float any_row_maximum(const f16* row, int64_t width, int64_t stride) {
  return row_maximum(row, width, stride);
}

template <class T>
float any_row_maximum(const T* row, int64_t width, int64_t stride) {
  return stride == 1 ? dense_row_maximum(row, width) : row_maximum(row, width, stride);
}

float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }

template <class T>
void decode_heatmap(const DecodeParams& p, const T* map, float* coords, float* score) {
  const auto at = [&](int64_t x, int64_t y) { return value(map[y * p.stride_h + x * p.stride_w]); };

  float best = -__builtin_inff();
  int64_t x = 0, y = 0;
  for (int64_t row = 0; row < p.height && best == best; ++row) {
    const float v = any_row_maximum(map + row * p.stride_h, p.width, p.stride_w);
    if (v > best || v != v) {
      best = v;
      y = row;
    }
  }
  coords[0] = coords[1] = 0;
  *score = best;
  if (!(best > 0)) return;  // invisible, or NaN

  while (at(x, y) != best) ++x;
  coords[0] = static_cast<float>(x);
  coords[1] = static_cast<float>(y);
  if (1 < x && x < p.width - 1 && 1 < y && y < p.height - 1) {
    coords[0] += 0.25f * sign(at(x + 1, y) - at(x - 1, y));
    coords[1] += 0.25f * sign(at(x, y + 1) - at(x, y - 1));
  }
}

template <class T>
void decode_heatmaps(const DecodeParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* map =
        static_cast<const T*>(p.data) + i / p.joints * p.stride_b + i % p.joints * p.stride_k;
    decode_heatmap(p, map, p.coords + 2 * i, p.scores + i);
  }
}

}  // namespace

Work plan_decode(const DecodeParams& p, int) { return {.tasks = p.batch * p.joints, .scratch = 0}; }

void decode(const DecodeParams& p, int, int64_t begin, int64_t end, void*) {
  switch (p.type) {
    case HeatmapType::float32:
      return decode_heatmaps<float>(p, begin, end);
    case HeatmapType::bfloat16:
      return decode_heatmaps<bf16>(p, begin, end);
    case HeatmapType::float16:
      return decode_heatmaps<f16>(p, begin, end);
  }
}

}  // namespace hgfast::cpu::HGFAST_ISA
