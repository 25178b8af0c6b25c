// Any convolution: y = act(conv(relu(scale * x + shift)) + bias) [+ add].
//
// A task is a block of output pixels, wherever in the batch they fall. A 1x1 convolution with
// stride 1 reads x where it lies, if the product can; otherwise each output pixel's window is
// gathered into scratch, through the prologue, and multiplied from there (im2col, but of a block
// that stays in L2). The gathering costs one pass over the window per pixel, against `out`
// multiply-adds for each of its values.
#include "operand.h"
#include "table.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

struct Geometry {
  int64_t height, width;  // of y
  int64_t pixels;         // of y, over the batch
  Depth depth;
  bool pointwise;
  int64_t block;  // pixels per task

  template <class Operand>
  static Geometry of(const ConvParams& p, int threads, Operand) {
    Geometry g;
    g.height = (p.height + 2 * p.pad_h - p.kernel_h) / p.stride_h + 1;
    g.width = (p.width + 2 * p.pad_w - p.kernel_w) / p.stride_w + 1;
    g.pixels = p.batch * g.height * g.width;
    g.depth = depth_of<Operand>(p.in, p.kernel_h, p.kernel_w);
    g.pointwise = p.kernel_h == 1 && p.kernel_w == 1 && p.stride_h == 1 && p.stride_w == 1 &&
                  p.pad_h == 0 && p.pad_w == 0;
    constexpr int64_t kGathered = 512 << 10;  // bytes: half of a small L2
    const int64_t row = g.depth.total() * static_cast<int64_t>(sizeof(Operand));
    const int64_t most = max(32, min(kBlock, kGathered / row / 32 * 32));
    const int64_t tasks = max(1, round_up(ceil_div(g.pixels, most), threads));
    g.block = max(1, round_up(ceil_div(g.pixels, tasks), Tiling<Operand>::kGroup));
    return g;
  }
};

// One output pixel's window of `image`, from (top, left), which may lie outside: zeros there.
template <class Operand, class E>
void gather_window(const ConvParams& p, const Depth& depth, const E* image, int64_t top,
                   int64_t left, Operand* a) {
  const int64_t tap = depth.runs > 1 ? depth.stride : p.in;  // from one tap to the next in a
  const int64_t y_first = max(0, -top), y_last = min(p.kernel_h, p.height - top);
  const int64_t x_first = max(0, -left), x_last = min(p.kernel_w, p.width - left);
  const int64_t inside = max(0, y_last - y_first) * max(0, x_last - x_first);
  if (inside * p.in != depth.total())
    memset(static_cast<void*>(a), 0, depth.total() * sizeof(Operand));
  if (inside == 0) return;
  for (int64_t y = y_first; y < y_last; ++y) {
    const E* x = image + ((top + y) * p.width + left + x_first) * p.in;
    Operand* to = a + (y * p.kernel_w + x_first) * tap;
    if (!p.scale && tap == p.in) {  // neighbours in a as they are in x
      prologue(x, (x_last - x_first) * p.in, nullptr, nullptr, to);
    } else {
      for (int64_t j = x_first; j < x_last; ++j, x += p.in, to += tap)
        prologue(x, p.in, p.scale, p.shift, to);
    }
  }
}

// The windows of output pixels first ... first + pixels - 1, one row of a each.
template <class Operand, class E>
void gather(const ConvParams& p, const Geometry& g, int64_t first, int64_t pixels, Operand* a) {
  Cursor at(first, g.width);    // rows are numbered through the batch,
  Cursor in(at.row, g.height);  // here by image
  for (; pixels > 0; --pixels, a += g.depth.total()) {
    const E* image = static_cast<const E*>(p.x) + in.row * p.height * p.width * p.in;
    gather_window(p, g.depth, image, in.column * p.stride_h - p.pad_h,
                  at.column * p.stride_w - p.pad_w, a);
    at.next();
    if (at.column == 0) in.next();
  }
}

template <class Operand, class E>
void run(const ConvParams& p, int threads, int64_t begin, int64_t end, void* memory) {
  const Geometry g = Geometry::of(p, threads, Operand{});
  Operand* a = Scratch(memory).take<Operand>(round_up(g.block, 32) * g.depth.total());
  [[maybe_unused]] const typename Tiling<Operand>::Scope scope{};
  int64_t a_at[kBlock], y_at[kBlock];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * g.block, pixels = min(g.block, g.pixels - first);
    for (int64_t i = 0; i < round_up(pixels, Tiling<Operand>::kGroup); ++i) {
      a_at[i] = i * g.depth.total();
      y_at[i] = i < pixels ? (first + i) * p.out : -1;
    }
    auto segment = Segment<Operand>::dense(a, a_at, g.depth.total(), p.weight);
    const E* x = static_cast<const E*>(p.x) + first * p.in;
    if (g.pointwise && !p.scale && readable<Operand>(x, pixels, p.in)) {
      segment.a = reinterpret_cast<const Operand*>(x);
    } else if (g.pointwise) {
      prologue_pixels(x, pixels, p.in, p.scale, p.shift, a);
    } else {
      gather<Operand, E>(p, g, first, pixels, a);
    }
    gemm(&segment, 1, pixels, p.out,
         Epilogue<E>{.bias = p.bias,
                     .relu = p.relu,
                     .y = static_cast<E*>(p.y),
                     .y_at = y_at,
                     .add = static_cast<const E*>(p.add)});
  }
}

}  // namespace

Work plan_conv(const ConvParams& p, int threads) {
  Work work;
  with_types(p.element, [&](auto operand, auto) {
    using Operand = decltype(operand);
    const Geometry g = Geometry::of(p, threads, operand);
    Scratch scratch(nullptr);
    scratch.take<Operand>(round_up(g.block, 32) * g.depth.total());
    work = {.tasks = ceil_div(g.pixels, g.block), .scratch = scratch.used()};
  });
  return work;
}

void conv(const ConvParams& p, int threads, int64_t begin, int64_t end, void* scratch) {
  with_types(p.element, [&](auto operand, auto element) {
    run<decltype(operand), decltype(element)>(p, threads, begin, end, scratch);
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
