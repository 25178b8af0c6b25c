// The pre-activation bottleneck, fused:
//
//   x -> BN, ReLU -> conv1 (1x1) -> ReLU -> conv2 (3x3) -> ReLU -> conv3 (1x1) -> + x [+ low] -> y
//
// A task is a band of rows of one image. conv1 fills t, the band's rows of the middle map and one
// more above and below, zero-padded; conv2 and conv3 then run over it block by block, through u.
// Only x (and low) is read and only y is written: the maps between, which unfused go out to memory
// and back five times, are t, read from L2, and u, a block of pixels. The price is that the two
// rows around a band are computed by its neighbour too: conv1 is about a seventh of the work of a
// block that halves its channels, so bands of 16 rows repeat 2 % of it.
//
// A pixel's sums do not depend on the band or block it falls in, so neither do their bits.
#include "operand.h"
#include "table.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

template <class Operand>
struct Buffers {
  Operand* t;   // (rows + 2, width + 2, middle)
  Operand* u;   // (kBlock, middle)
  Operand* a;   // (kBlock, in): prologue(x), and later x for the projected shortcut
  float* bias;  // b3 + bp
  int64_t t_bytes, u_bytes;

  Buffers(const BottleneckParams& p, int64_t rows, Scratch& scratch) {
    const int64_t middle = padded<Operand>(p.middle);
    // The last group of slots may run past the end of t.
    const int64_t beyond = Tiling<Operand>::kGroup - 1;
    const int64_t t_count = ((rows + 2) * (p.width + 2) + beyond) * middle;
    t_bytes = t_count * sizeof(Operand);
    u_bytes = kBlock * middle * sizeof(Operand);
    t = scratch.take<Operand>(t_count);
    u = scratch.take<Operand>(kBlock * middle);
    a = scratch.take<Operand>(kBlock * padded<Operand>(p.in));
    bias = scratch.take<float>(p.out);
  }
};

// The height of bands that leaves the busiest thread the least to do, among those whose t
// fits the cache.
template <class Operand>
int64_t band_rows(const BottleneckParams& p, int threads) {
  constexpr int64_t kCache = 1 << 20;  // bytes of t
  const int64_t row_bytes = (p.width + 2) * padded<Operand>(p.middle) * sizeof(Operand);
  const int64_t conv1 = p.in * p.middle;
  const int64_t rest = 9 * p.middle * p.middle + (p.middle + (p.wp ? p.in : 0)) * p.out;
  int64_t best = 1, least = INT64_MAX;
  for (int64_t bands = 1; bands <= p.height; ++bands) {
    const int64_t rows = ceil_div(p.height, bands);
    if (rows > 1 && (rows + 2) * row_bytes > kCache) continue;
    const int64_t tasks = ceil_div(p.batch * ceil_div(p.height, rows), threads);
    const int64_t halo = min(2, p.height - rows);
    const int64_t slots =
        round_up(Slots<Operand>(rows, p.width, p.width + 2).count(), Tiling<Operand>::kGroup);
    const int64_t cost = tasks * ((rows + halo) * p.width * conv1 + slots * rest);
    if (cost < least) {
      least = cost;
      best = rows;
    }
  }
  return best;
}

template <class Operand, class E>
class Band {
 public:
  Band(const BottleneckParams& p, const Buffers<Operand>& buffers, int64_t image, int64_t top,
       int64_t rows)
      : p(p),
        buffers(buffers),
        top(top),
        rows(rows),
        pitch(p.width + 2),
        middle(padded<Operand>(p.middle)) {
    x = static_cast<const E*>(p.x) + image * p.height * p.width * p.in;
    y = static_cast<E*>(p.y) + image * p.height * p.width * p.out;
    if (p.low) low = static_cast<const E*>(p.low) + image * (p.height / 2) * (p.width / 2) * p.out;
  }

  void run() const {
    clear_border();
    const int64_t first = max(0, top - 1) * p.width, last = min(p.height, top + rows + 1) * p.width;
    for (int64_t pixel = first; pixel < last; pixel += kBlock)
      conv1(pixel, min(kBlock, last - pixel));
    const Slots<Operand> slots(rows, p.width, pitch);
    for (int64_t slot = 0; slot < slots.count(); slot += kBlock)
      conv2_conv3(slots, slot, min(kBlock, slots.count() - slot));
  }

 private:
  // The zeros around t: a column on either side, the rows beyond the map.
  void clear_border() const {
    for (int64_t r = 0; r < rows + 2; ++r) {
      Operand* row = buffers.t + r * pitch * middle;
      const bool beyond = top + r < 1 || top + r > p.height;
      memset(static_cast<void*>(row), 0, (beyond ? pitch : 1) * middle * sizeof(Operand));
      memset(static_cast<void*>(row + (pitch - 1) * middle), 0, middle * sizeof(Operand));
    }
  }

  // `count` pixels of x, from `pixel`, into t.
  void conv1(int64_t pixel, int64_t count) const {
    const int64_t in = padded<Operand>(p.in);
    prologue_pixels(x + pixel * p.in, count, p.in, p.scale, p.shift, buffers.a);
    int64_t a_at[kBlock], t_at[kBlock];
    Cursor at(pixel, p.width);
    for (int64_t i = 0; i < round_up(count, Tiling<Operand>::kGroup); ++i, at.next()) {
      a_at[i] = i * in;
      t_at[i] = i < count ? ((at.row - top + 1) * pitch + at.column + 1) * middle : -1;
    }
    const Segment<Operand> segment{.a = buffers.a,
                                   .at = a_at,
                                   .stride = in,
                                   .taps = 1,
                                   .tap_stride = 0,
                                   .depth = in,
                                   .b = p.w1};
    gemm(&segment, 1, count, p.middle,
         Epilogue<Operand>{.bias = p.b1, .relu = true, .y = buffers.t, .y_at = t_at});
  }

  // `count` slots of the band, from `slot`: t to u to y.
  void conv2_conv3(const Slots<Operand>& slots, int64_t slot, int64_t count) const {
    int64_t t_at[kBlock], u_at[kBlock], y_at[kBlock], low_at[kBlock], x_at[kBlock];
    int64_t pixels = 0, first = 0;
    Cursor at = slots.from(slot);
    for (int64_t i = 0; i < round_up(count, Tiling<Operand>::kGroup); ++i, at.next()) {
      t_at[i] = (at.row * pitch + at.column) * middle;
      u_at[i] = -1;
      if (!slots.is_pixel(at)) continue;
      const int64_t row = top + at.row, pixel = row * p.width + at.column;
      if (pixels == 0) first = pixel;
      y_at[pixels] = pixel * p.out;
      low_at[pixels] = (row / 2 * (p.width / 2) + at.column / 2) * p.out;
      u_at[i] = pixels++ * middle;
    }
    const Segment<Operand> conv2{.a = buffers.t,
                                 .at = t_at,
                                 .stride = middle,
                                 .taps = 3,
                                 .tap_stride = pitch * middle,
                                 .depth = 3 * middle,
                                 .b = p.w2};
    gemm(&conv2, 1, count, p.middle,
         Epilogue<Operand>{.bias = p.b2, .relu = true, .y = buffers.u, .y_at = u_at});

    // The pixels lie one after the other in u, as they do in x and y.
    const int64_t in = padded<Operand>(p.in);
    const int64_t last = round_up(pixels, Tiling<Operand>::kGroup);
    for (int64_t i = 0; i < last; ++i) {
      u_at[i] = i * middle;
      x_at[i] = i * in;
      if (i >= pixels) y_at[i] = -1;
    }
    Segment<Operand> conv3[2] = {{.a = buffers.u,
                                  .at = u_at,
                                  .stride = middle,
                                  .taps = 1,
                                  .tap_stride = 0,
                                  .depth = middle,
                                  .b = p.w3},
                                 {.a = buffers.a,
                                  .at = x_at,
                                  .stride = in,
                                  .taps = 1,
                                  .tap_stride = 0,
                                  .depth = in,
                                  .b = p.wp}};
    if (p.wp) {
      const E* from = x + first * p.in;
      if (readable<Operand>(from, pixels, p.in)) {
        conv3[1].a = reinterpret_cast<const Operand*>(from);
      } else {
        prologue_pixels(from, pixels, p.in, nullptr, nullptr, buffers.a);
      }
    }
    gemm(conv3, p.wp ? 2 : 1, pixels, p.out,
         Epilogue<E>{.bias = p.wp ? buffers.bias : p.b3,
                     .relu = false,
                     .y = y,
                     .y_at = y_at,
                     .add = p.wp ? nullptr : x,
                     .low = low,
                     .low_at = low_at});
  }

  const BottleneckParams& p;
  const Buffers<Operand>& buffers;
  const E* x;
  E* y;
  const E* low = nullptr;
  int64_t top, rows;  // of the band in its image
  int64_t pitch;      // pixels in a row of t
  int64_t middle;     // values in a pixel of t and u
};

template <class Operand, class E>
void run(const BottleneckParams& p, int threads, int64_t begin, int64_t end, void* memory) {
  const int64_t rows = band_rows<Operand>(p, threads), bands = ceil_div(p.height, rows);
  Scratch scratch(memory);
  const Buffers<Operand> buffers(p, rows, scratch);
  if (padded<Operand>(p.middle) != p.middle) {  // zeros beyond the last channel, for good
    memset(static_cast<void*>(buffers.t), 0, buffers.t_bytes);
    memset(static_cast<void*>(buffers.u), 0, buffers.u_bytes);
  }
  if (p.wp) {
    each(p.out, [&](int64_t n, auto lanes) {
      store(buffers.bias + n, load(p.b3 + n, lanes) + load(p.bp + n, lanes), lanes);
    });
  }
  [[maybe_unused]] const ProductScope scope;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t top = task % bands * rows;
    Band<Operand, E>(p, buffers, task / bands, top, min(rows, p.height - top)).run();
  }
}

}  // namespace

Work plan_bottleneck(const BottleneckParams& p, int threads) {
  Work work;
  with_types(p.element, [&](auto operand, auto) {
    using Operand = decltype(operand);
    const int64_t rows = band_rows<Operand>(p, threads);
    Scratch scratch(nullptr);
    Buffers<Operand>(p, rows, scratch);
    work = {.tasks = p.batch * ceil_div(p.height, rows), .scratch = scratch.used()};
  });
  return work;
}

void bottleneck(const BottleneckParams& p, int threads, int64_t begin, int64_t end, void* scratch) {
  with_types(p.element, [&](auto operand, auto element) {
    run<decltype(operand), decltype(element)>(p, threads, begin, end, scratch);
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
