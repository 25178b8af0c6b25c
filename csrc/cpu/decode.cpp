// Heatmaps to joints.
#include <math.h>

#include "blur.h"
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

// ---- a heatmap, gathered
// -------------------------------------------------------------------------

float merged(const DecodeParams& p, float a, float b) { return p.mean ? (a + b) * 0.5f : a + b; }

// A heatmap as dense float32, merged with that of the mirrored image.
template <class T>
void gather(const DecodeParams& p, const Heatmap<T>& map, const Heatmap<T>* flipped, float* to) {
  for (int64_t y = 0; y < p.height; ++y) {
    float* row = to + y * p.width;
    for (int64_t x = 0; x < p.width; ++x) {
      row[x] = map.at(x, y);
      if (flipped)
        row[x] = merged(p, row[x], flipped->at(min(p.width - 1 - x + p.shift, p.width - 1), y));
    }
  }
}

// ---- the methods that start from a cell
// ----------------------------------------------------------

// The logarithm of the blurred map around a cell, for dark and udp.
class Sharp {
 public:
  Sharp(const DecodeParams& p, Scratch& scratch)
      : p_(p), window_(p, 5, 5, scratch), whole_(p, p.height, p.width, scratch) {}

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
             int64_t y, Sharp* sharp) {
  if (p.method == Method::dark || p.method == Method::udp) return sharp->refine(map, highest, x, y);
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

// ---- results
// -------------------------------------------------------------------------------------

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
                 int64_t joint, Sharp* sharp) {
  const double mark = mark_of(p.method);
  Place place{mark, mark};
  if (peak.value > 0) place = refine(p, map, peak, peak.x, peak.y, sharp);
  write(p, image, image * p.joints + joint, place, peak.value);
}

// ---- several peaks
// -------------------------------------------------------------------------------

struct Cell {
  float value;
  int64_t at;
};

void write_peaks(const DecodeParams& p, const Heatmap<float>& map, int64_t image, int64_t joint,
                 Cell* best, Sharp* sharp) {
  const Peak highest = find_peak(map);
  const int64_t most = min(p.k, p.height * p.width), reach = p.window / 2;
  int64_t found = 0;
  for (int64_t y = 0; y < p.height && highest.value > 0; ++y) {
    for (int64_t x = 0; x < p.width; ++x) {
      const float v = map.at(x, y);
      if (!(v > 0) || (found == most && v <= best[found - 1].value)) continue;
      bool exceeded = false;
      for (int64_t j = max(0, y - reach); j <= min(p.height - 1, y + reach); ++j)
        for (int64_t i = max(0, x - reach); i <= min(p.width - 1, x + reach); ++i)
          exceeded |= map.at(i, j) > v;
      if (exceeded) continue;
      int64_t rank = found < most ? found++ : found - 1;
      for (; rank > 0 && best[rank - 1].value < v; --rank) best[rank] = best[rank - 1];
      best[rank] = {v, y * p.width + x};
    }
  }
  const double mark = mark_of(p.method);
  for (int64_t i = 0; i < p.k; ++i) {
    Place place{mark, mark};
    if (i < found)
      place = refine(p, map, highest, best[i].at % p.width, best[i].at / p.width, sharp);
    const float score = i < found ? best[i].value : highest.value != highest.value ? kNan : 0.0f;
    write(p, image, (image * p.joints + joint) * p.k + i, place, score);
  }
}

// ---- the methods that need the whole map
// ---------------------------------------------------------

void write_megvii(const DecodeParams& p, const Heatmap<float>& map, int64_t image, int64_t joint,
                  Blur* blur) {
  const Peak highest = find_peak(map);
  Place place{-1, -1};
  double score = highest.value;
  if (highest.value > 0) {
    blur->part(map, 0, 0, p.height, p.width);
    const Heatmap<float> blurred = blur->dense();
    Peak peak = find_peak(blurred);
    double top = highest.value;
    const bool down = peak.value < 0;  // blurred, the map is negative throughout
    if (down) {
      const double least = peak.value;
      blur->negate();
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
  bool flat = true;
  double total = 0, sum_x = 0, sum_y = 0;
  for (int64_t y = 0; y < p.height; ++y) {
    for (int64_t x = 0; x < p.width; ++x) {
      const float v = map.at(x, y);
      flat &= !(highest.value > v);
      const double weight =
          v == highest.value ? 1 : exp(p.beta * (static_cast<double>(v) - highest.value));
      total += weight;
      sum_x += weight * static_cast<double>(x);
      sum_y += weight * static_cast<double>(y);
    }
  }
  if (!flat) place = {sum_x / total, sum_y / total};
  write(p, image, image * p.joints + joint, place, highest.value);
}

// ---- tasks
// ---------------------------------------------------------------------------------------

bool blurs(Method method) {
  return method == Method::dark || method == Method::udp || method == Method::megvii;
}

// A thread's scratch.
struct Workspace {
  float* plane;
  Cell* cells;
  Sharp sharp;
  Blur whole;

  Workspace(const DecodeParams& p, Scratch& scratch)
      : plane(scratch.take<float>(p.height * p.width)),
        cells(scratch.take<Cell>(min(p.k, p.height * p.width))),
        sharp(p, scratch),
        whole(p, p.height, p.width, scratch) {}
};

template <class T>
Heatmap<T> heatmap(const DecodeParams& p, const Heatmaps& maps, int64_t image, int64_t joint) {
  return {static_cast<const T*>(maps.data) + image * maps.stride_b + joint * maps.stride_k,
          p.height, p.width, maps.stride_h, maps.stride_w};
}

template <class T>
void decode_heatmaps(const DecodeParams& p, int64_t begin, int64_t end, Workspace& work) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / p.joints, joint = task % p.joints;
    const Heatmap<T> map = heatmap<T>(p, p.maps, image, joint);
    Heatmap<T> other{};
    if (p.flipped.data) other = heatmap<T>(p, p.flipped, image, p.mirror[joint]);
    gather(p, map, p.flipped.data ? &other : nullptr, work.plane);
    const Heatmap<float> plane{work.plane, p.height, p.width, p.width, 1};
    work.sharp.begin_map();
    if (p.k) {
      write_peaks(p, plane, image, joint, work.cells, &work.sharp);
    } else if (p.method == Method::megvii) {
      write_megvii(p, plane, image, joint, &work.whole);
    } else if (p.method == Method::softargmax) {
      write_softargmax(p, plane, image, joint);
    } else {
      write_joint(p, plane, find_peak(plane), image, joint, &work.sharp);
    }
  }
}

}  // namespace

Work plan_decode(const DecodeParams& p, int) {
  Scratch scratch(nullptr);
  Workspace(p, scratch);
  return {.tasks = p.batch * p.joints, .scratch = scratch.used()};
}

void decode(const DecodeParams& p, int, int64_t begin, int64_t end, void* memory) {
  Scratch scratch(memory);
  Workspace work(p, scratch);
  switch (p.type) {
    case HeatmapType::float32:
      return decode_heatmaps<float>(p, begin, end, work);
    case HeatmapType::bfloat16:
      return decode_heatmaps<bf16>(p, begin, end, work);
    case HeatmapType::float16:
      return decode_heatmaps<f16>(p, begin, end, work);
  }
}

}  // namespace hgfast::cpu::HGFAST_ISA
