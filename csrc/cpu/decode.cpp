// Heatmaps to joints: nine methods (formulas: hgfast/decoding/reference.py), one joint per map or
// its highest peaks, merged with the maps of the mirror image and mapped into the image on the way.
//
// The argument. A map is read once, and what a method does beyond that should cost little beside
// it. Of 17 maps of 64x48 cells in float32 that are 209 kB, which a core reads from its L2 cache in
// 3 to 5 us, and from a shared cache or memory in 10; the maximum takes a comparison per value and
// half a one to notice NaN, 16 values at a time: 2 us. So
//
// - the pass over the map finds only the maximum, without its place, and the place is looked up in
//   a chunk that is still in L1 (heatmap.h). argmax, quarter, newell, princeton and msra then read
//   four values.
// - dark and udp need the blurred map in 5x5 or 3x3 cells: with a Gaussian of 11 taps 15x15 values,
//   15 + 5 registers' worth of 11 taps, 500 instructions instead of 7000 for the map, and 13 or 7
//   logarithms of 20 ns, which cost as much again. Only where clipping bites is the whole map
//   blurred, for its maximum. megvii always does that: 2 x 3072 x 11 products, 5 us per map.
// - softargmax takes an exponential per value, 25 instructions (softmax.h): 10 times a comparison.
// - joints that are neighbours in memory (channels_last) are compared as they lie. Where more is
//   done than comparing, squares of pixels and joints are transposed in registers (gather.h) into
//   planes, which stay in the L2 cache; so are maps to be merged: 12 kB per joint, written once.
//
// A thread takes images one after another; none shares a map with another.
#include <math.h>

#include "blur.h"
#include "gather.h"
#include "softmax.h"
#include "table.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

using Method = DecodeMethod;

constexpr double kEpsilon = 0x1p-23;  // what UDP adds to the diagonal: float32's epsilon

struct Place {
  double x, y;
};

// The coordinates that say: no joint here.
double mark_of(Method method) {
  switch (method) {
    case Method::newell:
      return -0.5;
    case Method::msra:
    case Method::dark:
    case Method::udp:
    case Method::megvii:
      return -1;
    default:
      return 0;
  }
}

bool between(int64_t low, int64_t x, int64_t high) { return low < x && x < high; }

double sign_of_difference(float a, float b) { return (a > b) - (a < b); }

// ---- the methods that start from a cell ----

bool blurs_around(const DecodeParams& p) {
  return p.method == Method::dark || p.method == Method::udp;
}

// The Newton step on the logarithm of the blurred map, for dark and udp.
class Newton {
 public:
  Newton(const DecodeParams& p, Scratch& scratch)
      : p_(p),
        window_(p, 5, 5, scratch),
        whole_(p, blurs_around(p) ? p.height : 0, p.width, scratch) {}

  void begin_map() { known_ = false; }

  template <class T>
  Place refine(const Heatmap<T>& map, const Peak& highest, int64_t x, int64_t y) {
    const Place cell{static_cast<double>(x), static_cast<double>(y)};
    double l[5][5], dx, dy, dxx, dyy, dxy;
    const auto at = [&](int i, int j) { return l[j + 2][i + 2]; };
    if (p_.method == Method::dark) {
      if (!between(1, x, p_.width - 2) || !between(1, y, p_.height - 2)) return cell;
      static constexpr int kNear[][2] = {{0, 0},  {1, 0},  {-1, 0}, {0, 1},  {0, -1},
                                         {2, 0},  {-2, 0}, {0, 2},  {0, -2}, {1, 1},
                                         {-1, 1}, {1, -1}, {-1, -1}};
      logarithms(map, highest, x, y, 2, kNear, 1e-10, __builtin_inf(), l);
      dxx = 0.25 * (at(2, 0) - 2 * at(0, 0) + at(-2, 0));
      dyy = 0.25 * (at(0, 2) - 2 * at(0, 0) + at(0, -2));
      dxy = 0.25 * (at(1, 1) - at(-1, 1) - at(1, -1) + at(-1, -1));
    } else {
      static constexpr int kNear[][2] = {{0, 0},  {1, 0}, {-1, 0}, {0, 1},
                                         {0, -1}, {1, 1}, {-1, -1}};
      logarithms(map, highest, x, y, 1, kNear, 1e-3, 50, l);
      dxx = at(1, 0) - 2 * at(0, 0) + at(-1, 0) + kEpsilon;
      dyy = at(0, 1) - 2 * at(0, 0) + at(0, -1) + kEpsilon;
      dxy = 0.5 *
            (at(1, 1) - at(1, 0) - at(0, 1) + 2 * at(0, 0) - at(-1, 0) - at(0, -1) + at(-1, -1));
    }
    dx = 0.5 * (at(1, 0) - at(-1, 0));
    dy = 0.5 * (at(0, 1) - at(0, -1));
    const double determinant = dxx * dyy - dxy * dxy;
    const double step_x = (dxy * dy - dyy * dx) / determinant;
    const double step_y = (dxy * dx - dxx * dy) / determinant;
    if (!__builtin_isfinite(step_x) || !__builtin_isfinite(step_y)) return cell;
    return {cell.x + step_x, cell.y + step_y};
  }

 private:
  // l[2 + j][2 + i] = log clip(c b, low, high) for the cells (i, j) of `near` around (x, y).
  template <class T, size_t N>
  void logarithms(const Heatmap<T>& map, const Peak& highest, int64_t x, int64_t y, int64_t reach,
                  const int (&near)[N][2], double low, double high, double (&l)[5][5]) {
    const int64_t left = max(0, x - reach), right = min(p_.width, x + reach + 1);
    const int64_t top = max(0, y - reach), bottom = min(p_.height, y + reach + 1);
    const Blurred blurred = window_.part(map, left, top, bottom - top, right - left);
    double values[N];
    bool clipped = highest.value > high;
    for (size_t n = 0; n < N; ++n) {
      values[n] = blurred.at(min(max(0, x + near[n][0]), p_.width - 1),
                             min(max(0, y + near[n][1]), p_.height - 1));
      clipped |= !(values[n] >= low);
    }
    const double scale = clipped ? contrast(map, highest) : 1;
    for (size_t n = 0; n < N; ++n) {
      double v = scale * values[n];
      if (v < low) v = low;
      if (v > high) v = high;
      l[2 + near[n][1]][2 + near[n][0]] = log(v);
    }
  }

  // c: what the map's maximum is to that of the blurred map.
  template <class T>
  double contrast(const Heatmap<T>& map, const Peak& highest) {
    if (!known_) {
      whole_.part(map, 0, 0, p_.height, p_.width);
      contrast_ =
          static_cast<double>(highest.value) / static_cast<double>(find_peak(whole_.dense()).value);
      known_ = true;
    }
    return contrast_;
  }

  const DecodeParams& p_;
  Blur window_, whole_;
  bool known_ = false;
  double contrast_ = 0;
};

template <class T>
Place refine(const DecodeParams& p, const Heatmap<T>& map, const Peak& highest, int64_t x,
             int64_t y, Newton& newton) {
  if (blurs_around(p)) return newton.refine(map, highest, x, y);
  Place place{static_cast<double>(x), static_cast<double>(y)};
  if (p.method == Method::argmax) return place;

  const int64_t w = p.width, h = p.height;
  const float right = map.at(min(x + 1, w - 1), y), left = map.at(max(x - 1, 0), y);
  const float below = map.at(x, min(y + 1, h - 1)), above = map.at(x, max(y - 1, 0));
  double dx = sign_of_difference(right, left), dy = sign_of_difference(below, above);
  switch (p.method) {
    case Method::quarter:
      if (!between(1, x, w - 1) || !between(1, y, h - 1)) dx = dy = 0;
      break;
    case Method::newell:
      if (!between(0, x, w - 1) || !between(0, y, h - 1)) dx = dy = 0;
      place = {place.x + 0.5, place.y + 0.5};
      break;
    case Method::princeton:
      dx = right > left ? 1 : -1;
      dy = below > above ? 1 : -1;
      place = {place.x + 0.5, place.y + 0.5};
      break;
    default:  // msra
      if (!between(1, x, w - 1) || y == 0) dx = 0;
      if (!between(1, y, h - 1) || x == 0) dy = 0;
  }
  return {place.x + 0.25 * dx, place.y + 0.25 * dy};
}

// ---- results ----

// The result number `index` of all.
void write(const DecodeParams& p, int64_t image, int64_t index, Place at, float score) {
  if (p.matrix) {
    const double* m = p.matrix + 6 * image;
    const double x = at.x - p.origin_x, y = at.y - p.origin_y;
    at = {(m[0] * x + m[1] * y) + m[2], (m[3] * x + m[4] * y) + m[5]};
    if (p.truncate) at = {__builtin_trunc(at.x), __builtin_trunc(at.y)};
  }
  p.coords[2 * index] = static_cast<float>(at.x);
  p.coords[2 * index + 1] = static_cast<float>(at.y);
  p.scores[index] = score;
}

template <class T>
void write_joint(const DecodeParams& p, const Heatmap<T>& map, const Peak& peak, int64_t image,
                 int64_t joint, Newton& newton) {
  newton.begin_map();
  const double mark = mark_of(p.method);
  Place place{mark, mark};
  if (peak.value > 0) place = refine(p, map, peak, peak.x, peak.y, newton);
  write(p, image, image * p.joints + joint, place, peak.value);
}

// ---- several peaks ----

// The highest peaks of a heatmap, in order.
class Ranking {
 public:
  Ranking(const DecodeParams& p, Scratch& scratch)
      : most_(p.k ? min(p.k, p.height * p.width) : 0),
        best_(scratch.take<Peak>(most_)),
        line_(scratch.take<float>(p.k ? round_up(p.width, kLanes) + p.window : 0)) {}

  // Of a map with a positive value and without NaN; no cell of window x window exceeds a peak.
  void rank(const Heatmap<float>& map, int64_t window) {
    found_ = 0;
    const int64_t reach = window / 2;
    for (int64_t i = 0; i < reach; ++i) line_[i] = line_[reach + map.width + i] = -kInfinity;
    for (int64_t y = 0; y < map.height; ++y) {
      const int64_t first = max(0, y - reach), last = min(map.height - 1, y + reach);
      each(map.width, [&](int64_t x, auto lanes) {
        const float* from = map.data + x;
        Vec top = load(from + first * map.stride_h, lanes);
        for (int64_t row = first + 1; row <= last; ++row)
          top = larger(load(from + row * map.stride_h, lanes), top);
        store(line_ + reach + x, top, lanes);
      });
      each(map.width, [&](int64_t x, auto lanes) {
        Vec top = load(line_ + x, lanes);
        for (int64_t i = 1; i < window; ++i) top = larger(load(line_ + x + i, lanes), top);
        const Vec v = load(map.data + y * map.stride_h + x, lanes);
        const Vec peak = v == top ? v : Vec{};
        for (unsigned higher = larger_lanes(peak, splat(least())); higher; higher &= higher - 1) {
          const int i = __builtin_ctz(higher);
          add({peak[i], x + i, y});
        }
      });
    }
  }

  void clear() { found_ = 0; }
  int64_t count() const { return found_; }
  const Peak& operator[](int64_t i) const { return best_[i]; }

 private:
  // What a peak must exceed.
  float least() const { return found_ == most_ ? best_[found_ - 1].value : 0; }

  // Cells come in row order: of equal ones the first stays ahead.
  void add(Peak peak) {
    if (!(peak.value > least())) return;
    int64_t rank = found_ < most_ ? found_++ : found_ - 1;
    for (; rank > 0 && best_[rank - 1].value < peak.value; --rank) best_[rank] = best_[rank - 1];
    best_[rank] = peak;
  }

  int64_t most_, found_ = 0;
  Peak* best_;
  float* line_;
};

void write_peaks(const DecodeParams& p, const Heatmap<float>& map, int64_t image, int64_t joint,
                 Ranking& ranking, Newton& newton) {
  const Peak highest = find_peak(map);
  newton.begin_map();
  ranking.clear();
  if (highest.value > 0) ranking.rank(map, p.window);
  const double mark = mark_of(p.method);
  const int64_t first = (image * p.joints + joint) * p.k;
  for (int64_t i = 0; i < p.k; ++i) {
    if (i < ranking.count()) {
      const Peak peak = ranking[i];
      write(p, image, first + i, refine(p, map, highest, peak.x, peak.y, newton), peak.value);
    } else {
      write(p, image, first + i, {mark, mark}, highest.value == highest.value ? 0 : kNan);
    }
  }
}

// ---- the methods that need the whole map ----

void write_megvii(const DecodeParams& p, const Heatmap<float>& map, int64_t image, int64_t joint,
                  Blur& blur) {
  const Peak highest = find_peak(map);
  Place place{-1, -1};
  double score = highest.value;
  if (highest.value > 0) {
    blur.part(map, 0, 0, p.height, p.width);
    const Heatmap<float> blurred = blur.dense();
    Peak peak = find_peak(blurred);
    double top = highest.value;
    const bool down = peak.value < 0;  // blurred, the map is negative throughout
    if (down) {
      const double least = peak.value;
      blur.negate();
      peak = find_peak(blurred);
      top = top * (-static_cast<double>(peak.value) / least);
    }
    if (peak.value != peak.value) peak = first_nan(blurred);
    place = {static_cast<double>(peak.x), static_cast<double>(peak.y)};
    if (between(1, peak.x, p.width - 1) && between(1, peak.y, p.height - 1)) {
      const auto at = [&](int64_t x, int64_t y) { return blurred.at(peak.x + x, peak.y + y); };
      place.x += 0.25 * sign_of_difference(at(1, 0), at(-1, 0)) + 0.5;
      place.y += 0.25 * sign_of_difference(at(0, 1), at(0, -1)) + 0.5;
    }
    score = top / 255 + 0.5;
  }
  write(p, image, image * p.joints + joint, place, static_cast<float>(score));
}

void write_softargmax(const DecodeParams& p, const Heatmap<float>& map, int64_t image,
                      int64_t joint) {
  const Peak highest = find_peak(map);
  Place place{0, 0};
  if (highest.value == highest.value) {
    const Mean mean = mean_place(map, highest.value, p.beta);
    if (!mean.flat) place = {mean.x, mean.y};
  }
  write(p, image, image * p.joints + joint, place, highest.value);
}

// ---- tasks ----

bool from_cell(const DecodeParams& p) {
  return p.k == 0 && p.method != Method::megvii && p.method != Method::softargmax;
}

// channels_last: joints are neighbours in memory.
bool interleaved(const Heatmaps& maps) { return maps.stride_k == 1 && maps.stride_w != 1; }

constexpr int64_t kTogether = 32;  // a bound for planes: 400 kB of 64x48 cells

int64_t joints_together(const DecodeParams& p) {
  return interleaved(p.maps) ? min(p.joints, kTogether) : 1;
}

// Whether maps are read as they lie, and nothing is gathered.
bool compares_in_place(const DecodeParams& p) {
  const bool dense = p.maps.stride_w == 1 && p.maps.stride_h == p.width;
  return from_cell(p) && !p.flipped.data && (dense || interleaved(p.maps));
}

// What is decoded without a break: a map, or those that are read together.
int64_t units_of(const DecodeParams& p) { return p.batch * ceil_div(p.joints, joints_together(p)); }

// A task per thread, but none that is shorter than waking a thread up for it. Measured in cells
// that are compared; the factors are rough, from measurements.
int64_t tasks_of(const DecodeParams& p, int threads) {
  constexpr int64_t kLeast = 1 << 16;
  int64_t each_cell = 1;
  if (p.flipped.data) each_cell += 4;
  if (p.k) each_cell += 8;
  if (p.method == Method::softargmax) each_cell += 10;
  if (p.method == Method::megvii) each_cell += 40;
  int64_t cells = p.height * p.width * each_cell;
  if (blurs_around(p)) cells += 8000 * max(1, p.k);
  const int64_t most = max(1, p.batch * p.joints * cells / kLeast);
  return min(min(most, threads), units_of(p));
}

Heatmap<float> as_floats(const Heatmap<float>& map, float*) { return map; }
template <class T>
Heatmap<float> as_floats(const Heatmap<T>& map, float* plane) {
  return gather(map, plane);
}

// One thread's way through its tasks, with its scratch.
class Worker {
 public:
  Worker(const DecodeParams& p, Scratch& scratch)
      : p_(p),
        // An odd number of cache lines: planes a power of two apart would share a few sets of the
        // L1 cache, and they are written side by side.
        plane_size_(kAlign / 4 * (ceil_div(p.height * p.width, kAlign / 4) | 1)),
        planes_(scratch.take<float>(compares_in_place(p) ? 0 : joints_together(p) * plane_size_)),
        mirrored_(scratch.take<float>(p.flipped.data ? joints_together(p) * plane_size_ : 0)),
        spare_(scratch.take<float>(p.flipped.data ? plane_size_ : 0)),
        newton_(p, scratch),
        blur_(p, p.method == Method::megvii ? p.height : 0, p.width, scratch),
        ranking_(p, scratch) {}

  template <class T>
  void run(int64_t begin, int64_t end) {
    const int64_t together = joints_together(p_), units = ceil_div(p_.joints, together);
    int64_t image = begin / units, first = begin % units * together;
    for (int64_t unit = begin; unit < end; ++unit, first += together) {
      if (first >= p_.joints) {
        ++image;
        first = 0;
      }
      const int64_t count = min(together, p_.joints - first);
      if (!interleaved(p_.maps)) {
        one<T>(image, first);
      } else if (compares_in_place(p_)) {
        Peak peaks[kTogether];
        find_peaks<kTogether>(heatmap<T>(p_.maps, image, first), count, peaks);
        for (int64_t i = 0; i < count; ++i)
          write_joint(p_, heatmap<T>(p_.maps, image, first + i), peaks[i], image, first + i,
                      newton_);
      } else {
        several<T>(image, first, count);
      }
    }
  }

 private:
  template <class T>
  void one(int64_t image, int64_t joint) {
    const auto map = heatmap<T>(p_.maps, image, joint);
    if (p_.flipped.data) {
      const auto other = heatmap<T>(p_.flipped, image, p_.mirror[joint]);
      if (map.stride_w == 1) {
        decode(merged(map, other, planes_), image, joint);
      } else {
        decode(merged(gather(map, planes_), other, planes_), image, joint);
      }
    } else if (!map.dense()) {
      decode(gather(map, planes_), image, joint);
    } else if (from_cell(p_)) {
      write_joint(p_, map, find_peak(map), image, joint, newton_);
    } else {
      decode(as_floats(map, planes_), image, joint);
    }
  }

  template <class T>
  void several(int64_t image, int64_t first, int64_t count) {
    gather_joints(heatmap<T>(p_.maps, image, first), count, planes_, plane_size_);
    const bool both = p_.flipped.data && interleaved(p_.flipped);
    if (both) gather_joints(heatmap<T>(p_.flipped, image, first), count, mirrored_, plane_size_);
    for (int64_t i = 0; i < count; ++i) {
      float* to = planes_ + i * plane_size_;
      const Heatmap<float> map = plane(to);
      const int64_t joint = first + i;
      if (!p_.flipped.data) {
        decode(map, image, joint);
        continue;
      }
      const int64_t source = p_.mirror[joint] - first;
      if (both && 0 <= source && source < count) {
        decode(merged(map, plane(mirrored_ + source * plane_size_), to), image, joint);
      } else {
        const auto other = heatmap<T>(p_.flipped, image, p_.mirror[joint]);
        decode(merged(map, other, to), image, joint);
      }
    }
  }

  void decode(const Heatmap<float>& map, int64_t image, int64_t joint) {
    if (p_.k) {
      write_peaks(p_, map, image, joint, ranking_, newton_);
    } else if (p_.method == Method::megvii) {
      write_megvii(p_, map, image, joint, blur_);
    } else if (p_.method == Method::softargmax) {
      write_softargmax(p_, map, image, joint);
    } else {
      write_joint(p_, map, find_peak(map), image, joint, newton_);
    }
  }

  // A map with dense rows and one of the mirrored image.
  template <class A, class B>
  Heatmap<float> merged(const Heatmap<A>& map, const Heatmap<B>& other, float* to) {
    const float factor = p_.mean ? 0.5f : 1;
    if (other.stride_w == 1) return merge(map, other, p_.shift, factor, to);
    return merge(map, gather(other, spare_), p_.shift, factor, to);
  }

  template <class T>
  Heatmap<T> heatmap(const Heatmaps& maps, int64_t image, int64_t joint) const {
    return {static_cast<const T*>(maps.data) + image * maps.stride_b + joint * maps.stride_k,
            p_.height, p_.width, maps.stride_h, maps.stride_w};
  }
  Heatmap<float> plane(const float* data) const { return {data, p_.height, p_.width, p_.width, 1}; }

  const DecodeParams& p_;
  int64_t plane_size_;
  float *planes_, *mirrored_, *spare_;
  Newton newton_;
  Blur blur_;
  Ranking ranking_;
};

}  // namespace

Work plan_decode(const DecodeParams& p, int threads) {
  Scratch scratch(nullptr);
  Worker(p, scratch);
  return {.tasks = tasks_of(p, threads), .scratch = scratch.used()};
}

void decode(const DecodeParams& p, int threads, int64_t begin, int64_t end, void* memory) {
  Scratch scratch(memory);
  Worker worker(p, scratch);
  const int64_t units = units_of(p), tasks = tasks_of(p, threads);
  begin = units * begin / tasks;
  end = units * end / tasks;
  switch (p.type) {
    case HeatmapType::float32:
      return worker.run<float>(begin, end);
    case HeatmapType::bfloat16:
      return worker.run<bf16>(begin, end);
    case HeatmapType::float16:
      return worker.run<f16>(begin, end);
  }
}

}  // namespace hgfast::cpu::HGFAST_ISA
