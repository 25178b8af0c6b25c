// Heatmaps to joints: the place of each map's maximum, moved a quarter of a pixel towards the
// higher neighbour. Every value is read once.
//
// A task is one heatmap, searched a register along its rows at a time; or, where the joints of a
// pixel are neighbours in memory (channels_last), a register of heatmaps, searched side by side.
#include "table.h"
#include "vec.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

struct f16 {
  uint16_t bits;
};

// Exponent and mantissa, put where float32 has them, are the number times 2^-112, subnormals
// included; infinity and NaN (exponent 31) get float32's own exponent for them.
template <class Lanes>
Vec load(const f16* p, Lanes lanes) {
  const Bits bits = __builtin_convertvector(load_halves(p, lanes), Bits);
  const Bits number = (Bits)((Vec)((bits & 0x7fff) << 13) * 0x1p112f);
  const Bits special = (bits & 0x7c00) == 0x7c00 ? Bits{} + 0x7f800000 : Bits{};
  return (Vec)(number | special | (bits & 0x8000) << 16);
}

template <class T>
float value(const T* p) {
  return load(p, Part{1})[0];
}

struct Peak {
  float value;  // NaN if there is one in the map
  int64_t x, y;
};

// A running maximum in every lane: NaN once one was seen, else the first of the largest.
struct Running {
  Vec best = splat(-__builtin_inff());
  Bits place{};

  void see(Vec v, int64_t at) {
    const auto higher = (v > best) | (v != v);
    best = higher ? v : best;
    place = higher ? Bits{} + static_cast<uint32_t>(at) : place;
  }
};

// A heatmap whose rows hold a register or more of neighbours in memory.
template <class T>
Peak find_peak_dense(const DecodeParams& p, const T* map) {
  Running running;
  for (int64_t y = 0; y < p.height; ++y) {
    const auto see = [&](int64_t x) {
      running.see(load(map + y * p.stride_h + x, Whole{}), y * p.width + x);
    };
    for (int64_t x = 0; x + kLanes <= p.width; x += kLanes) see(x);
    if (p.width % kLanes) see(p.width - kLanes);  // the row's end, some of it again
  }
  float best = running.best[0];
  int64_t first = running.place[0];
  for (int i = 1; i < kLanes && best == best; ++i) {
    const float v = running.best[i];
    const int64_t at = running.place[i] + i;
    if (v > best || v != v || (v == best && at < first)) {
      best = v;
      first = at;
    }
  }
  return {best, first % p.width, first / p.width};
}

// Any other.
template <class T>
Peak find_peak(const DecodeParams& p, const T* map) {
  Peak peak{-__builtin_inff(), 0, 0};
  for (int64_t y = 0; y < p.height; ++y) {
    for (int64_t x = 0; x < p.width; ++x) {
      const float v = value(map + y * p.stride_h + x * p.stride_w);
      if (v > peak.value || v != v) peak = {v, x, y};
    }
  }
  return peak;
}

// Heatmaps side by side, one per lane.
template <class T, class Lanes>
void find_peaks(const DecodeParams& p, const T* maps, Lanes lanes, Peak* peaks) {
  Running running;
  for (int64_t y = 0; y < p.height; ++y) {
    for (int64_t x = 0; x < p.width; ++x) {
      const T* pixel = maps + y * p.stride_h + x * p.stride_w;
      running.see(load(pixel, lanes), y * p.width + x);
    }
  }
  for (int i = 0; i < kLanes; ++i)
    peaks[i] = {running.best[i], running.place[i] % p.width, running.place[i] / p.width};
}

float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }

template <class T>
void write_joint(const DecodeParams& p, const T* map, const Peak& peak, float* coords,
                 float* score) {
  const auto at = [&](int64_t x, int64_t y) {
    return value(map + y * p.stride_h + x * p.stride_w);
  };
  const auto [best, x, y] = peak;
  coords[0] = coords[1] = 0;
  *score = best;
  if (!(best > 0)) return;  // invisible, or NaN
  coords[0] = static_cast<float>(x);
  coords[1] = static_cast<float>(y);
  if (1 < x && x < p.width - 1 && 1 < y && y < p.height - 1) {
    coords[0] += 0.25f * sign(at(x + 1, y) - at(x - 1, y));
    coords[1] += 0.25f * sign(at(x, y + 1) - at(x, y - 1));
  }
}

// Heatmaps per task.
int64_t task_joints(const DecodeParams& p) { return p.stride_k == 1 ? kLanes : 1; }

template <class T>
void decode_heatmaps(const DecodeParams& p, int64_t begin, int64_t end) {
  const int64_t together = task_joints(p), groups = ceil_div(p.joints, together);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / groups, first = task % groups * together;
    const int64_t count = min(together, p.joints - first);
    const T* maps = static_cast<const T*>(p.data) + image * p.stride_b + first * p.stride_k;
    Peak peaks[kLanes];
    if (together == 1) {
      const bool dense = p.stride_w == 1 && p.width >= kLanes;
      peaks[0] = dense ? find_peak_dense(p, maps) : find_peak(p, maps);
    } else if (count == kLanes) {
      find_peaks(p, maps, Whole{}, peaks);
    } else {
      find_peaks(p, maps, Part{static_cast<int>(count)}, peaks);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t joint = image * p.joints + first + i;
      write_joint(p, maps + i * p.stride_k, peaks[i], p.coords + 2 * joint, p.scores + joint);
    }
  }
}

}  // namespace

Work plan_decode(const DecodeParams& p, int) {
  return {.tasks = p.batch * ceil_div(p.joints, task_joints(p)), .scratch = 0};
}

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
