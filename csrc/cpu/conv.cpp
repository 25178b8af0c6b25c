// Any convolution: y = act_sum(act(conv(relu(scale * x + shift)) + bias) [+ add]); and the
// transposed one, which is several.
//
// A task is a block of output pixels by some of the channels. How its product comes to its windows:
//
// - A 1x1 convolution with stride 1 reads x where it lies, if the product can.
// - In float32 each tap of a window is a pixel of x, and the product is told where each begins; a
//   tap in the padding is a pixel of zeros. With few channels a row of taps is one run, and only
//   where it reaches into the padding is it copied. Else nothing is, unless x has to be converted,
//   to go through the prologue, or to lie at other distances: then the block's rows of x are, once.
// - AMX reads sixteen windows at even distances. There each window is gathered into scratch,
//   through the prologue (im2col, but of a block that stays in L2). That costs one pass over the
//   window per pixel, against `out` multiply-adds for each of its values. To split a float32 in two
//   costs several times a copy: so where windows overlap the block's rows of x are split before.
// - Of few channels AMX gathers none (Method::lines). The rows of x that a task needs are copied
//   with their padding, at kLineTap values a pixel: there windows lie at even distances, though
//   they overlap, and a row of their taps is one step of K. The tiles' rows straddle cache lines,
//   but that costs less than the copies: a stem of 7x7 has 21 values in a row of a window, which
//   are moved to any place, for 64 products each.
// - A 3x3 convolution with stride 1 may go by tiles (winograd.h): then the pixels of x that a task
//   needs are copied once, zero-padded, through the prologue.
//
// The first convolution of a network takes the caller's image in any layout: a task's rows of it
// are laid out in scratch, those that it shares with the task before only once.
//
// Threads share the pixels; but where the weights are larger than the map, as at the bottom of a
// network, they share the channels, and each reads only its own part of the weights.
//
// A sum is formed in the order of the weights, whatever task it falls in.
#include "layout.h"
#include "operand.h"
#include "table.h"
#include "winograd.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

// A convolution that computes height x width pixels of each image of y: the pixels
// (first + i * step) of a map of full_height x full_width.
struct Job : ConvParams {
  int64_t out_height, out_width;    // of those pixels
  int64_t full_height, full_width;  // of y
  int64_t first_h = 0, first_w = 0, step_h = 1, step_w = 1;

  explicit Job(const ConvParams& p) : ConvParams(p) {
    out_height = full_height = reach(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
    out_width = full_width = reach(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w);
  }

  static int64_t reach(int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                       int64_t dilation) {
    return (size + 2 * pad - (kernel - 1) * dilation - 1) / stride + 1;
  }
};

// The rows of x, numbered through the batch, that the windows of some rows of y reach.
struct Reach {
  int64_t first, last;

  Reach(const Job& p, int64_t row_first, int64_t row_last) {
    const int64_t above = row_first % p.out_height * p.stride_h - p.pad_h;
    const int64_t below = row_last % p.out_height * p.stride_h - p.pad_h + span(p);
    first = row_first / p.out_height * p.height + max(0, min(above, p.height));
    last = row_last / p.out_height * p.height + max(0, min(below, p.height));
  }

  // At most how many for so many rows of y, wherever in the batch they begin.
  static int64_t most(const Job& p, int64_t rows) {
    const int64_t images = (rows - 1) / p.out_height + 1;  // that end among them
    const int64_t gaps = images * max(0, p.height - p.out_height * p.stride_h);
    const int64_t above = max(0, (p.out_height - 1) * p.stride_h - p.pad_h - p.height);
    const int64_t below = max(0, p.pad_h - span(p));
    return min(p.batch * p.height, (rows - 1) * p.stride_h + span(p) + gaps + above + below);
  }

 private:
  static int64_t span(const Job& p) { return (p.kernel_h - 1) * p.dilation_h + 1; }
};

// What finishes the sums of any method; `y_at` says where in y each slot goes.
template <class E>
Epilogue<E> epilogue_of(const Job& p, const int64_t* y_at) {
  return {.bias = p.bias,
          .relu = p.relu,
          .relu_sum = p.relu_sum,
          .y = static_cast<E*>(p.y),
          .y_at = y_at,
          .add = static_cast<const E*>(p.add)};
}

// Whether each tap's channels are a run of the product; else those of several are.
template <class Operand>
bool is_per_tap(const Job& p, const Depth& depth) {
  return depth.tap == padded<Operand>(p.in);
}

constexpr int64_t kMostPixels = 256;     // in a task
constexpr int64_t kInCache = 512 << 10;  // bytes: half of a small L2
constexpr int64_t kShort = 128;          // channels: so few that a tap alone is a short run

// Pixels so many values apart share the sets of the first-level cache, whose eight lines do not
// hold a tile's twelve rows.
constexpr int64_t kWay = 4096 / sizeof(float);

// How many channels each task computes, by the split of the work that costs the busiest thread
// least: cycles for its products, and for what it reads from beyond its caches. There are `units`
// to share, with so many products for each channel; the weights have so many bytes for each
// channel.
int64_t share_channels(const Job& p, int threads, int64_t units, int64_t products,
                       int64_t weight_bytes, int64_t element_bytes) {
  const int64_t panels = ceil_div(p.out, kPanel);
  const int64_t weights = weight_bytes * p.out;
  const int64_t map = p.batch * p.height * p.width * p.in * element_bytes;
  constexpr int64_t kBytesPerCycle = 4;
  int64_t least = INT64_MAX, best = 1;
  for (int64_t parts = 1; parts <= min(threads, panels); ++parts) {
    if (threads % parts) continue;
    const int64_t others = threads / parts;
    const int64_t cost = ceil_div(panels, parts) * products * ceil_div(units, others) +
                         (weights / parts + map / others) / kBytesPerCycle;
    if (cost >= least) continue;
    least = cost;
    best = parts;
  }
  return ceil_div(panels, best) * kPanel;
}

struct Geometry {
  int64_t pixels;  // of the job, over the batch
  Depth depth;
  enum { pointwise, gathered, in_place, converted } windows;
  int64_t run;    // taps that are neighbours in x, and one run of the product: 1 or kernel_w
  int64_t pitch;  // from pixel to pixel of x, as the product reads it
  int64_t block, blocks;     // pixels per task; tasks that share all pixels
  int64_t channels, groups;  // per task; tasks that share all channels
  int64_t rows = 0;          // of x that a block converts, or splits, at most

  int64_t tasks() const { return blocks * groups; }
  int64_t runs(const Job& p) const { return p.kernel_h * (p.kernel_w / run); }
  // Rows of x that a block reaches, at most: it may begin and end in the middle of a row of y.
  int64_t given_rows(const Job& p) const {
    return Reach::most(p, ceil_div(block - 1, p.out_width) + 1);
  }

  template <class Operand, class E>
  static Geometry of(const Job& p, int threads, Operand, E) {
    constexpr bool tiles = Tiling<Operand>::kGroup > 1;
    Geometry g{};
    g.pixels = p.batch * p.out_height * p.out_width;
    g.depth = depth_of<Operand>(p.in, p.kernel_h, p.kernel_w);
    const bool as_it_is = !p.scale && is_same<Operand, E>;
    const bool single = p.kernel_h == 1 && p.kernel_w == 1;
    if (single && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0 &&
        p.out_height == p.height && p.out_width == p.width) {
      g.windows = pointwise;
    } else if (tiles) {
      g.windows = gathered;
    } else {
      g.windows = as_it_is ? in_place : converted;
    }
    g.run = p.in <= kShort && p.dilation_w == 1 ? max(1, p.kernel_w) : 1;
    g.pitch = p.in;
    if (!tiles && p.in * p.stride_w % kWay == 0 && g.run == 1) {
      g.pitch = p.in + 64 / static_cast<int64_t>(sizeof(Operand));
      if (g.windows == in_place) g.windows = converted;
    }

    const int64_t pixel =
        (g.windows == gathered ? g.depth.total : p.in) * static_cast<int64_t>(sizeof(Operand));
    const int64_t most = max(32, min(kMostPixels, kInCache / max(1, pixel) / 32 * 32));
    g.share(p, threads, sizeof(Operand), sizeof(E));
    const int64_t share = ceil_div(g.pixels, ceil_div(threads, g.groups));
    // A block that converts rows has whole rows of y, so that it converts few for its neighbours.
    const int64_t unit = g.windows == converted ? p.out_width : Tiling<Operand>::kGroup;
    g.block = round_up(ceil_div(share, ceil_div(share, max(most, unit))), unit);
    if (g.windows == converted) g.block = min(g.block, max(most / unit, 1) * unit);
    g.blocks = ceil_div(g.pixels, g.block);
    if (g.windows == converted) {
      g.rows = Reach::most(p, g.block / p.out_width);
    } else if (g.windows == gathered && !is_of_maps<Operand> && is_per_tap<Operand>(p, g.depth)) {
      const int64_t rows = Reach::most(p, (g.block - 2) / p.out_width + 2);
      if (2 * rows * p.width <= g.block * p.kernel_h * p.kernel_w) g.rows = rows;
    }
    return g;
  }

  void share(const Job& p, int threads, int64_t operand_bytes, int64_t element_bytes) {
    channels =
        share_channels(p, threads, pixels, depth.total, depth.total * operand_bytes, element_bytes);
    groups = ceil_div(p.out, channels);
  }
};

template <class Operand>
struct Buffers {
  Operand* a = nullptr;      // windows, or pixels of x, as the product reads them
  Operand* zeros = nullptr;  // a run
  Operand* edges = nullptr;  // runs that begin or end in the padding
  int64_t* at = nullptr;     // (runs, block)
  float* window = nullptr;   // of one pixel, where its taps begin anywhere in a run
  void* rows = nullptr;      // of x where it comes as given, of the element type
  Operand* split = nullptr;  // rows of x

  Buffers(const Job& p, const Geometry& g, Scratch& scratch) {
    if (p.as_given) {
      const int64_t bytes = p.precision == Precision::medium ? sizeof(bf16) : sizeof(float);
      rows = scratch.take<char>(g.given_rows(p) * p.width * p.in * bytes);
    }
    if (g.windows == Geometry::pointwise)
      a = scratch.take<Operand>(round_up(g.block, 32) * max(g.pitch, g.depth.total));
    if (g.windows == Geometry::gathered)
      a = scratch.take<Operand>(round_up(g.block, 32) * g.depth.total);
    if (g.windows == Geometry::gathered && !is_of_maps<Operand> && !is_per_tap<Operand>(p, g.depth))
      window = scratch.take<float>(g.depth.total);
    if (g.windows == Geometry::gathered)
      split = scratch.take<Operand>(g.rows * p.width * g.depth.tap);
    if (g.windows == Geometry::converted) a = scratch.take<Operand>(g.rows * p.width * g.pitch);
    if (g.windows == Geometry::in_place || g.windows == Geometry::converted) {
      zeros = scratch.take<Operand>(g.run * p.in);
      at = scratch.take<int64_t>(g.runs(p) * g.block);
      if (g.run > 1) edges = scratch.take<Operand>(g.runs(p) * g.block * g.run * p.in);
    }
  }
};

// Which of `count` places, the first at `origin` and each `step` further, lie in 0 ... size - 1.
struct Inside {
  int64_t first, last;

  Inside(int64_t origin, int64_t step, int64_t count, int64_t size) : first(0), last(count) {
    if (origin >= 0 && origin + (count - 1) * step < size) return;  // no division
    if (origin < 0) first = min(count, ceil_div(-origin, step));
    last = origin < size ? min(count, ceil_div(size - origin, step)) : 0;
  }
  int64_t size() const { return max(0, last - first); }
};

// A run of values as they are. A call, or a register's part, costs as much as the run of a stem: so
// in whole registers, of which the last overlaps the one before.
inline void copy_run(const bf16* x, int64_t count, bf16* y) {
  const auto move = [&](int64_t i) {
    const Halves values = load_halves(x + i, Whole{});
    memcpy(static_cast<void*>(y + i), &values, sizeof values);
  };
  if (count < kLanes) {
    for (int64_t i = 0; i < count; ++i) y[i] = x[i];
    return;
  }
  for (int64_t i = 0; i + kLanes <= count; i += kLanes) move(i);
  if (count % kLanes) move(count - kLanes);
}

// One output pixel's window of `image`, from (top, left), which may lie outside: zeros there.
template <class Operand, class E>
void gather_window(const Job& p, const Depth& depth, const E* image, int64_t top, int64_t left,
                   Operand* a) {
  const int64_t tap = depth.tap;
  const Inside rows(top, p.dilation_h, p.kernel_h, p.height);
  const Inside columns(left, p.dilation_w, p.kernel_w, p.width);
  const int64_t inside = rows.size() * columns.size();
  // Zeros where nothing will be written, if that is at the end, as within the map.
  const int64_t written = inside == p.kernel_h * p.kernel_w && tap == p.in ? inside * tap : 0;
  if (inside * p.in != depth.total) clear(a, written, depth.total);
  if (inside == 0) return;
  const int64_t step = p.dilation_w * p.in;
  for (int64_t y = rows.first; y < rows.last; ++y) {
    const E* x = image + ((top + y * p.dilation_h) * p.width + left) * p.in + columns.first * step;
    Operand* to = a + y * depth.row + columns.first * tap;
    if (!p.scale && tap == p.in && step == p.in) {  // neighbours in a as they are in x
      if constexpr (is_same<Operand, E> && is_same<E, bf16>) {
        copy_run(x, columns.size() * p.in, to);
      } else {
        prologue(x, columns.size() * p.in, nullptr, nullptr, to);
      }
    } else {
      for (int64_t j = columns.first; j < columns.last; ++j, x += step, to += tap)
        prologue(x, p.in, p.scale, p.shift, to);
    }
  }
}

// The windows of output pixels first ... first + pixels - 1, one row of a each.
template <class Operand, class E>
void gather(const Job& p, const Geometry& g, int64_t first, int64_t pixels,
            const Buffers<Operand>& buffers) {
  Operand* a = buffers.a;
  const E* x = static_cast<const E*>(p.x);
  Cursor at(first, p.out_width);    // rows are numbered through the batch,
  Cursor in(at.row, p.out_height);  // here by image
  for (; pixels > 0; --pixels, a += g.depth.total) {
    const E* image = x + in.row * p.height * p.width * p.in;
    const int64_t top = in.column * p.stride_h - p.pad_h, left = at.column * p.stride_w - p.pad_w;
    if (buffers.window) {
      gather_window(p, g.depth, image, top, left, buffers.window);
      prologue(buffers.window, g.depth.total, nullptr, nullptr, a);
    } else {
      gather_window(p, g.depth, image, top, left, a);
    }
    at.next();
    if (at.column == 0) in.next();
  }
}

// Runs f(slot, count, row, column) for each stretch of the block's pixels that lies in one row.
template <class F>
void each_stretch(const Job& p, int64_t first, int64_t pixels, F f) {
  int64_t row = first / p.out_width, column = first % p.out_width;
  for (int64_t slot = 0; slot < pixels; ++row, column = 0) {
    const int64_t count = min(p.out_width - column, pixels - slot);
    f(slot, count, row, column);
    slot += count;
  }
}

// In elements; the two need not lie in one array.
template <class T>
int64_t distance(const T* from, const T* to) {
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from)) /
         static_cast<int64_t>(sizeof(T));
}

// Where each run of each window begins: `at` as the product wants it, in elements from `a`, the
// first pixel of row `origin` of x; rows are numbered through the batch.
template <class Operand>
void find_runs(const Job& p, const Geometry& g, const Buffers<Operand>& buffers, int64_t first,
               int64_t pixels, const Operand* a, int64_t origin) {
  const int64_t step = p.stride_w * g.pitch;
  const int64_t zeros = distance(a, static_cast<const Operand*>(buffers.zeros));
  Operand* edge = buffers.edges;
  each_stretch(p, first, pixels, [&](int64_t slot, int64_t count, int64_t row, int64_t column) {
    const int64_t image = row / p.out_height;
    const int64_t top = row % p.out_height * p.stride_h - p.pad_h;
    int64_t* to = buffers.at + slot;
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      const int64_t y = top + i * p.dilation_h;
      const bool in_map = y >= 0 && y < p.height;
      const int64_t line = (image * p.height + y - origin) * p.width;
      for (int64_t j = 0; j < p.kernel_w; j += g.run, to += g.block) {
        const int64_t left = column * p.stride_w - p.pad_w + j * p.dilation_w;
        // The window's run at `slot + s`, where it does not lie in the map as a whole.
        const auto at_the_edge = [&](int64_t s) {
          const int64_t from = left + s * p.stride_w;
          const int64_t before = max(0, -from), beyond = min(g.run, p.width - from);
          if (!in_map || before >= beyond) return zeros;
          const int64_t size = g.run * p.in;
          memset(static_cast<void*>(edge), 0, size * sizeof(Operand));
          memcpy(static_cast<void*>(edge + before * p.in), a + (line + from + before) * p.in,
                 (beyond - before) * p.in * sizeof(Operand));
          edge += size;
          return distance(a, static_cast<const Operand*>(edge - size));
        };
        const Inside inside(left, p.stride_w, in_map ? count : 0, p.width - g.run + 1);
        const int64_t pixel = (line + left) * g.pitch;
        int64_t s = 0;
        for (; s < inside.first; ++s) to[s] = at_the_edge(s);
        for (; s < inside.last; ++s) to[s] = pixel + s * step;
        for (; s < count; ++s) to[s] = at_the_edge(s);
      }
    }
  });
}

// Pixels first ... first + pixels - 1 of y as a product of one segment.
template <class Operand, class E>
Segment<Operand> windows(const Job& p, const Geometry& g, const Buffers<Operand>& buffers,
                         int64_t first, int64_t pixels, int64_t* a_at) {
  const E* x = static_cast<const E*>(p.x);
  if (g.windows == Geometry::in_place || g.windows == Geometry::converted) {
    const Operand* a = buffers.a;
    int64_t origin = 0;
    if (g.windows == Geometry::in_place) {
      a = reinterpret_cast<const Operand*>(x);
    } else {
      const Reach rows(p, first / p.out_width, (first + pixels - 1) / p.out_width);
      origin = rows.first;
      prologue_pixels(x + origin * p.width * p.in, max(0, rows.last - origin) * p.width, p.in,
                      p.scale, p.shift, buffers.a, g.pitch);
    }
    find_runs(p, g, buffers, first, pixels, a, origin);
    return {.a = a,
            .at = buffers.at,
            .stride = 0,
            .taps = g.runs(p),
            .tap_stride = 0,
            .depth = g.run * p.in,
            .b = p.weight,
            .at_step = g.block};
  }
  x += first * p.in;
  const bool dense = g.windows == Geometry::pointwise && !p.scale && g.pitch == p.in &&
                     readable<Operand>(x, pixels, p.in);
  const int64_t stride =
      g.windows == Geometry::pointwise && g.pitch > p.in ? g.pitch : g.depth.total;
  for (int64_t i = 0; i < round_up(pixels, Tiling<Operand>::kGroup); ++i) a_at[i] = i * stride;
  auto segment = Segment<Operand>::dense(buffers.a, a_at, g.depth.total, p.weight);
  if (!is_of_maps<Operand> && g.windows == Geometry::gathered && g.rows > 0) {
    const Reach rows(p, first / p.out_width, (first + pixels - 1) / p.out_width);
    const E* from = static_cast<const E*>(p.x) + rows.first * p.width * p.in;
    prologue_pixels(from, max(0, rows.last - rows.first) * p.width, p.in, p.scale, p.shift,
                    buffers.split);
    Job split = p;  // the same, of an x that has been through the prologue
    split.in = g.depth.tap;
    split.x = buffers.split - rows.first * p.width * split.in;
    split.scale = split.shift = nullptr;
    gather<Operand, Operand>(split, g, first, pixels, buffers);
  } else if (g.windows == Geometry::gathered) {
    gather<Operand, E>(p, g, first, pixels, buffers);
  } else if (dense) {
    segment.a = reinterpret_cast<const Operand*>(x);
  } else {
    prologue_pixels(x, pixels, p.in, p.scale, p.shift, buffers.a, stride);
  }
  return segment;
}

// Rows of a map as given, dense in NHWC: those that a block reaches, kept for the next one.
template <class E>
class GivenRows {
 public:
  GivenRows(const Job& p, void* memory)
      : p_(p), row_(p.width * p.in), rows_(static_cast<E*>(memory)) {}

  // The whole map, of which the rows in reach are there.
  const E* map(const Reach& reach) {
    int64_t kept = 0;
    if (first_ <= reach.first && reach.first < last_) {
      kept = max(0, min(last_, reach.last) - reach.first);
      memmove(static_cast<void*>(rows_), rows_ + (reach.first - first_) * row_,
              kept * row_ * sizeof(E));
    }
    first_ = reach.first;
    last_ = max(reach.first, reach.last);
    with_element(p_.x_element, [&](auto from) {
      const auto* x = static_cast<const decltype(from)*>(p_.x);
      const Strides dense{0, 1, 0, p_.in}, &given = p_.x_strides;
      for (int64_t row = first_ + kept; row < last_; ++row)
        copy_pixels(x + row / p_.height * given.batch + row % p_.height * given.height, given,
                    rows_ + (row - first_) * row_, dense, p_.in, p_.width);
    });
    return rows_ - first_ * row_;
  }

 private:
  const Job& p_;
  int64_t row_;
  E* rows_;
  int64_t first_ = 0, last_ = 0;  // that are there
};

template <class Operand, class E>
void run(const Job& job, int threads, int64_t begin, int64_t end, void* memory) {
  Job p = job;
  const Geometry g = Geometry::of(p, threads, Operand{}, E{});
  Scratch scratch(memory);
  const Buffers<Operand> buffers(p, g, scratch);
  if (buffers.zeros) memset(static_cast<void*>(buffers.zeros), 0, g.run * p.in * sizeof(Operand));
  [[maybe_unused]] const typename Tiling<Operand>::Scope scope{};
  GivenRows<E> given(job, buffers.rows);
  int64_t a_at[kMostPixels], y_at[kMostPixels];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / g.blocks * g.channels, block = task % g.blocks * g.block;
    // A block of one long row may have more pixels than a product takes.
    for (int64_t first = block; first < min(block + g.block, g.pixels); first += kMostPixels) {
      const int64_t pixels = min(min(block + g.block, g.pixels) - first, kMostPixels);
      if (p.as_given) p.x = given.map({p, first / p.out_width, (first + pixels - 1) / p.out_width});
      const auto segment = windows<Operand, E>(p, g, buffers, first, pixels, a_at);
      each_stretch(p, first, pixels, [&](int64_t slot, int64_t count, int64_t row, int64_t column) {
        const int64_t y =
            row / p.out_height * p.full_height + p.first_h + row % p.out_height * p.step_h;
        const int64_t pixel = y * p.full_width + p.first_w + column * p.step_w;
        for (int64_t i = 0; i < count; ++i) y_at[slot + i] = (pixel + i * p.step_w) * p.out;
      });
      for (int64_t i = pixels; i < round_up(pixels, Tiling<Operand>::kGroup); ++i) y_at[i] = -1;
      gemm(&segment, 1, pixels, n, min(p.out, n + g.channels), epilogue_of<E>(p, y_at));
    }
  }
}

// ---- By tiles ----

// A task is a group of tiles of one image by some of the channels.
struct TileTasks {
  int64_t side;
  Grouping group;
  int64_t down, across;      // groups in an image
  int64_t channels, groups;  // per task; tasks that share all channels

  TileTasks(const Job& p, int threads, int64_t element_bytes)
      : side(tile_side(p.method)),
        group(ceil_div(p.out_height, side), ceil_div(p.out_width, side)),
        down(ceil_div(group.down, group.tall)),
        across(ceil_div(group.across, group.wide)) {
    const int64_t products = (side + 2) * (side + 2) * p.in;
    channels = share_channels(p, threads, p.batch * down * across, group.most() * products,
                              products * sizeof(float), element_bytes);
    groups = ceil_div(p.out, channels);
  }
  int64_t count(const Job& p) const { return p.batch * down * across * groups; }
};

struct TileScratch {
  float* x;  // a group's pixels and those around them
  TileBuffers tiles;

  TileScratch(const Job& p, const TileTasks& tasks, Scratch& scratch)
      : x(scratch.take<float>((tasks.group.tall * tasks.side + 2) *
                              (tasks.group.wide * tasks.side + 2) * p.in)),
        tiles(p.method, tasks.group, p.in, scratch) {}
};

// rows x columns pixels of an image from (top, left), which may lie outside: zeros there.
template <class E>
void copy_padded(const Job& p, const E* image, int64_t top, int64_t left, int64_t rows,
                 int64_t columns, float* to) {
  const Inside in_rows(top, 1, rows, p.height), in_columns(left, 1, columns, p.width);
  const int64_t width = in_columns.size();
  for (int64_t i = 0; i < rows; ++i, to += columns * p.in) {
    const bool is_inside = i >= in_rows.first && i < in_rows.last && width > 0;
    const int64_t before = is_inside ? in_columns.first * p.in : columns * p.in;
    memset(to, 0, before * sizeof(float));
    if (!is_inside) continue;
    prologue_pixels(image + ((top + i) * p.width + left + in_columns.first) * p.in, width, p.in,
                    p.scale, p.shift, to + before);
    memset(to + in_columns.last * p.in, 0, (columns - in_columns.last) * p.in * sizeof(float));
  }
}

template <class Tiles, class E>
void run_tiles(Tiles, const Job& p, const TileTasks& tasks, int64_t begin, int64_t end,
               const TileScratch& scratch) {
  constexpr int64_t side = Tiles::kPixels;
  int64_t y_at[kTilesAtOnce * side * side];
  for (int64_t task = begin; task < end; ++task) {
    // Neighbouring tasks share weights: they are groups of one image by the same channels.
    const int64_t per_image = tasks.down * tasks.across, groups = p.batch * per_image;
    const int64_t n = task / groups * tasks.channels, image = task % groups / per_image;
    const int64_t down = task % per_image / tasks.across, across = task % tasks.across;
    const int64_t top = down * tasks.group.tall * side, left = across * tasks.group.wide * side;
    const int64_t tall = min(tasks.group.tall, tasks.group.down - down * tasks.group.tall);
    const int64_t wide = min(tasks.group.wide, tasks.group.across - across * tasks.group.wide);
    for (int64_t i = 0; i < tall * wide * side * side; ++i) {
      const int64_t tile = i / (side * side), pixel = i % (side * side);
      const int64_t row = top + tile / wide * side + pixel / side;
      const int64_t column = left + tile % wide * side + pixel % side;
      y_at[i] = row < p.out_height && column < p.out_width
                    ? ((image * p.out_height + row) * p.out_width + column) * p.out
                    : -1;
    }
    const int64_t pitch = wide * side + 2;
    copy_padded(p, static_cast<const E*>(p.x) + image * p.height * p.width * p.in, top - p.pad_h,
                left - p.pad_w, tall * side + 2, pitch, scratch.x);
    Tiles::convolve(scratch.x, pitch * p.in, p.in, tall, wide, static_cast<const float*>(p.weight),
                    n, min(p.out, n + tasks.channels), scratch.tiles, epilogue_of<E>(p, y_at));
  }
}

// ---- By lines ----

// A task is some rows of y in one image by some of the channels.
template <class Operand>
struct LineTasks {
  int64_t across;            // slots in a row of y: whole groups
  int64_t tall, blocks;      // rows of y; tasks that share an image's rows
  int64_t channels, groups;  // per task; tasks that share all channels
  int64_t lines, line;       // of a task; values in each

  LineTasks(const Job& p, int threads) {
    across = round_up(p.out_width, Tiling<Operand>::kGroup);
    const Depth depth = depth_of_lines<Operand>(p.kernel_h);
    channels = share_channels(p, threads, p.batch * p.out_height * across, depth.total,
                              depth.total * sizeof(Operand), sizeof(Operand));
    groups = ceil_div(p.out, channels);
    const int64_t share = ceil_div(p.batch * p.out_height, ceil_div(threads, groups));
    blocks = ceil_div(p.out_height, min(share, max(1, kMostPixels / across)));
    tall = ceil_div(p.out_height, blocks);
    blocks = ceil_div(p.out_height, tall);
    lines = (tall - 1) * p.stride_h + p.kernel_h;
    // Conversion goes by whole registers, and writes so many pixels more.
    line =
        round_up(max((across - 1) * p.stride_w + p.kernel_w, p.pad_w + p.width + kLanes) * kLineTap,
                 Tiling<Operand>::kDepth);
  }
  int64_t count(const Job& p) const { return p.batch * blocks * groups; }
  Operand* take(Scratch& scratch) const { return scratch.take<Operand>(lines * line); }
};

// Pixels of x with kLineTap values each, zeros behind the channels, and up to kLanes - 1 more; each
// part `apart` values behind the one before.
template <class Operand, class From>
void widen(const Job& p, const From* x, const Strides& strides, bf16* to, int64_t apart) {
  constexpr int kParts = sizeof(Operand) / sizeof(bf16);
  const Operand* const type = nullptr;
  const auto put = [&](Vec values, auto lanes) {
    Halves parts[kParts];
    split(values, type, parts);
    for (int i = 0; i < kParts; ++i) store(to + i * apart, parts[i], lanes);
  };
  if (strides.width == 1 && !p.scale) {  // planes: in registers of pixels
    each(p.width, [&](int64_t i, auto lanes) {
      Bits pairs[kParts][2] = {};  // of channels
      for (int64_t c = 0; c < p.in; ++c) {
        Halves parts[kParts];
        split(load(x + c * strides.channels + i, lanes), type, parts);
        for (int part = 0; part < kParts; ++part)
          pairs[part][c / 2] |= __builtin_convertvector(parts[part], Bits) << (c % 2 * 16);
      }
      for (int part = 0; part < kParts; ++part) {
        const Vec low = (Vec)pairs[part][0], high = (Vec)pairs[part][1];
        const Vec both[2] = {Zip<kLanes>::low(low, high), Zip<kLanes>::high(low, high)};
        memcpy(static_cast<void*>(to + part * apart + i * kLineTap), both, sizeof both);
      }
    });
    return;
  }
  int64_t done = 0;
  if constexpr (kLanes == 16) {
    if (p.in == 3 && strides.channels == 1 && strides.width == 3 && !p.scale) {  // four at a time
      for (; done + 4 <= p.width; done += 4, x += 12, to += 4 * kLineTap)
        put(__builtin_shufflevector(load(x, Part{12}), Vec{}, 0, 1, 2, 16, 3, 4, 5, 16, 6, 7, 8, 16,
                                    9, 10, 11, 16),
            Whole{});
    }
  }
  const Part all{static_cast<int>(p.in)};
  for (int64_t i = done; i < p.width; ++i, x += strides.width, to += kLineTap) {
    Vec values{};
    if (strides.channels == 1) {
      values = load(x, all);
    } else {
      for (int64_t c = 0; c < p.in; ++c) values[c] = value(x[c * strides.channels]);
    }
    if (p.scale) {
      if (is_of_maps<Operand>) values = from_bf16(to_bf16(values));  // as activations are
      values = relu(fma(values, load(p.scale, all), load(p.shift, all)));
    }
    put(values, Part{kLineTap});
  }
}

// The lines of one task after the other; those of the one before are kept. A split operand's line
// is one of high parts and one of low parts.
template <class Operand, class E>
class Lines {
 public:
  Lines(const Job& p, const LineTasks<Operand>& tasks, Operand* memory)
      : p_(p), tasks_(tasks), to_(memory) {
    if (!p.as_given) {
      p_.x_element = is_same<E, bf16> ? Element::bfloat16 : Element::float32;
      p_.x_strides = {p.height * p.width * p.in, 1, p.width * p.in, p.in};
    }
  }

  // From row `top` of an image on, which may lie outside.
  void read(int64_t image, int64_t top) {
    int64_t kept = 0;
    if (image == image_ && top >= top_ && top < top_ + tasks_.lines) {
      kept = top_ + tasks_.lines - top;
      memmove(static_cast<void*>(to_), to_ + (top - top_) * tasks_.line,
              kept * tasks_.line * sizeof(Operand));
    }
    image_ = image;
    top_ = top;
    for (int64_t i = kept; i < tasks_.lines; ++i) read_row(top + i, to_ + i * tasks_.line);
  }

 private:
  void read_row(int64_t row, Operand* to) {
    const bool is_inside = row >= 0 && row < p_.height;
    const int64_t begin = p_.pad_w * kLineTap, end = begin + p_.width * kLineTap;
    bf16* line = reinterpret_cast<bf16*>(to);
    const auto clear_parts = [&](int64_t first, int64_t last) {
      for (size_t i = 0; i < sizeof(Operand) / sizeof(bf16); ++i)
        clear(line + i * tasks_.line, first, last);
    };
    clear_parts(0, is_inside ? begin : tasks_.line);
    if (!is_inside) return;
    with_element(p_.x_element, [&](auto from) {
      const auto* x = static_cast<const decltype(from)*>(p_.x);
      widen<Operand>(p_, x + image_ * p_.x_strides.batch + row * p_.x_strides.height, p_.x_strides,
                     line + begin, tasks_.line);
    });
    clear_parts(end, tasks_.line);
  }

  Job p_;
  const LineTasks<Operand>& tasks_;
  Operand* to_;
  int64_t image_ = -1, top_ = 0;
};

template <class Operand, class E>
void run_lines(const Job& p, int threads, int64_t begin, int64_t end, void* memory) {
  const LineTasks<Operand> tasks(p, threads);
  Scratch scratch(memory);
  Operand* to = tasks.take(scratch);
  Lines<Operand, E> lines(p, tasks, to);
  const typename Tiling<Operand>::Scope scope(p.kernel_w * kLineTap);
  // From one slot to the next, in operands, though their parts lie in two lines.
  const int64_t step = p.stride_w * kLineTap * sizeof(bf16) / sizeof(Operand);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image_block = task % (p.batch * tasks.blocks);
    const int64_t n = task / (p.batch * tasks.blocks) * tasks.channels;
    const int64_t image = image_block / tasks.blocks;
    const int64_t first = image_block % tasks.blocks * tasks.tall;
    const int64_t rows = min(tasks.tall, p.out_height - first);
    lines.read(image, first * p.stride_h - p.pad_h);
    const int64_t slots = rows * tasks.across;
    for (int64_t done = 0; done < slots; done += kMostPixels) {
      const int64_t count = min(kMostPixels, slots - done);
      int64_t a_at[kMostPixels], y_at[kMostPixels];
      Cursor at(done, tasks.across);
      for (int64_t i = 0; i < count; ++i, at.next()) {
        a_at[i] = at.row * p.stride_h * tasks.line + at.column * step;
        const int64_t row = image * p.out_height + first + at.row;
        y_at[i] = at.column < p.out_width ? (row * p.out_width + at.column) * p.out : -1;
      }
      const Segment<Operand> segment{.a = to,
                                     .at = a_at,
                                     .stride = step,
                                     .taps = p.kernel_h,
                                     .tap_stride = tasks.line,
                                     .depth = Tiling<Operand>::kDepth,
                                     .b = p.weight,
                                     .parts = tasks.line * int64_t{sizeof(bf16)}};
      gemm(&segment, 1, count, n, min(p.out, n + tasks.channels), epilogue_of<E>(p, y_at));
    }
  }
}

// ---- Either way ----

Work plan(const Job& p, int threads) {
  Work work;
  if (p.method == Method::tiles2 || p.method == Method::tiles4) {
    with_types(p.precision, [&](auto, auto element) {
      const TileTasks tasks(p, threads, sizeof element);
      Scratch scratch(nullptr);
      TileScratch(p, tasks, scratch);
      work = {.tasks = tasks.count(p), .scratch = scratch.used()};
    });
    return work;
  }
  with_types(p.precision, [&](auto operand, auto element) {
    using Operand = decltype(operand);
    Scratch scratch(nullptr);
    if (p.method == Method::lines) {
      const LineTasks<Operand> tasks(p, threads);
      tasks.take(scratch);
      work = {.tasks = tasks.count(p), .scratch = scratch.used()};
      return;
    }
    const Geometry g = Geometry::of(p, threads, operand, element);
    Buffers<Operand>(p, g, scratch);
    work = {.tasks = g.tasks(), .scratch = scratch.used()};
  });
  return work;
}

void run(const Job& p, int threads, int64_t begin, int64_t end, void* scratch) {
  if (p.method == Method::tiles2 || p.method == Method::tiles4) {
    with_types(p.precision, [&](auto, auto element) {
      using E = decltype(element);
      const TileTasks tasks(p, threads, sizeof(E));
      Scratch memory(scratch);
      const TileScratch buffers(p, tasks, memory);
      with_tiles(p.method, [&](auto tiles) {
        run_tiles<decltype(tiles), E>(tiles, p, tasks, begin, end, buffers);
      });
    });
    return;
  }
  with_types(p.precision, [&](auto operand, auto element) {
    using Operand = decltype(operand);
    using E = decltype(element);
    if constexpr (has_lines<Operand>) {
      if (p.method == Method::lines) return run_lines<Operand, E>(p, threads, begin, end, scratch);
    }
    run<Operand, E>(p, threads, begin, end, scratch);
  });
}

// One axis of a transposed convolution's phase.
struct Phase {
  int64_t taps, first, count, pad;  // of y: the first pixel, and how many

  Phase(int64_t rest, int64_t kernel, int64_t stride, int64_t pad_of_x, int64_t size)
      : taps(rest < kernel ? ceil_div(kernel - rest, stride) : 0),
        first(((rest - pad_of_x) % stride + stride) % stride),
        count(first < size ? ceil_div(size - first, stride) : 0),
        // Pixel i sees pixels i + origin, i + origin - 1, ... of x; the last of them comes first.
        pad(taps - 1 - (first + pad_of_x - rest) / stride) {}
};

// f(job) for each phase.
template <class F>
void each_phase(const ConvTransposeParams& p, F f) {
  const char* weight = static_cast<const char*>(p.weight);
  for (int64_t i = 0; i < p.stride_h; ++i) {
    const Phase h(i, p.kernel_h, p.stride_h, p.pad_h, p.out_height);
    for (int64_t j = 0; j < p.stride_w; ++j) {
      const Phase w(j, p.kernel_w, p.stride_w, p.pad_w, p.out_width);
      Job job(ConvParams{.precision = p.precision,
                         .method = Method::direct,
                         .batch = p.batch,
                         .height = p.height,
                         .width = p.width,
                         .in = p.in,
                         .out = p.out,
                         .kernel_h = h.taps,
                         .kernel_w = w.taps,
                         .stride_h = 1,
                         .stride_w = 1,
                         .pad_h = h.pad,
                         .pad_w = w.pad,
                         .dilation_h = 1,
                         .dilation_w = 1,
                         .relu = p.relu,
                         .relu_sum = p.relu_sum,
                         .x = p.x,
                         .add = p.add,
                         .y = p.y,
                         .scale = nullptr,
                         .shift = nullptr,
                         .weight = weight,
                         .bias = p.bias});
      weight += packed_bytes(p.precision, Method::direct, p.out, p.in, h.taps, w.taps);
      job.out_height = h.count;
      job.out_width = w.count;
      job.full_height = p.out_height;
      job.full_width = p.out_width;
      job.first_h = h.first;
      job.first_w = w.first;
      job.step_h = p.stride_h;
      job.step_w = p.stride_w;
      if (h.count * w.count > 0) f(job);
    }
  }
}

}  // namespace

bool goes_by_lines(const ConvParams& p) {
  bool result = false;
  with_types(p.precision, [&](auto operand, auto) {
    using Operand = decltype(operand);
    result = has_lines<Operand> && p.in <= kLineTap && p.kernel_h * p.kernel_w > 1 &&
             p.kernel_w * kLineTap < Tiling<Operand>::kDepth && p.dilation_h == 1 &&
             p.dilation_w == 1 && p.stride_h <= p.kernel_h && p.stride_w <= p.kernel_w;
  });
  return result;
}

Work plan_conv(const ConvParams& p, int threads) { return plan(Job(p), threads); }

void conv(const ConvParams& p, int threads, int64_t begin, int64_t end, void* scratch) {
  run(Job(p), threads, begin, end, scratch);
}

// A task is a part of every phase, since they may differ in work.
Work plan_conv_transpose(const ConvTransposeParams& p, int threads) {
  Work work{threads, 0};
  each_phase(p, [&](const Job& job) {
    const size_t scratch = plan(job, threads).scratch;
    if (scratch > work.scratch) work.scratch = scratch;
  });
  return work;
}

void conv_transpose(const ConvTransposeParams& p, int threads, int64_t begin, int64_t end,
                    void* scratch) {
  each_phase(p, [&](const Job& job) {
    const int64_t tasks = plan(job, threads).tasks;
    run(job, threads, tasks * begin / threads, tasks * end / threads, scratch);
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
