// What follows an hourglass, fused: a chain of 1x1 convolutions for each pixel.
//
//   z = relu(features(x)) -> heatmaps(z)
//                         -> next(z) [+ add]
//
// A task is a block of pixels, wherever in the batch they fall. Their z stays in scratch, in L2,
// where both convolutions behind it find it: it is neither written to memory nor read from there,
// and those make up half of what the three convolutions, one after the other, read and write.
//
// The heatmaps can leave as the caller wants them: a block's lie in scratch until they are
// finished, and go from there into the caller's layout and element type.
//
// z is rounded to the element type and the sums are formed in the order of conv.cpp, so the bits
// are those of the convolutions one after the other.
#include "layout.h"
#include "operand.h"
#include "table.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

// In a task. z and the weights share L2 with what passes through: with 256 channels, on a Cascade
// Lake core, 64 took 2 to 8 % less time than 128 or 256 (benchmarks/bench_head.py).
constexpr int64_t kMostPixels = 64;

// Pixels per task, evenly, and whole groups of slots.
int64_t block_of(const HeadParams& p, int threads) {
  const int64_t share = max(1, ceil_div(p.batch * p.pixels, threads));
  return round_up(ceil_div(share, ceil_div(share, kMostPixels)), 32);
}

template <class Operand, class E>
struct Buffers {
  static constexpr bool kRounded = !is_same<Operand, E>;
  Operand* a;  // (block, in), where the product cannot read x as it lies
  Operand* z;  // (block, middle)
  E* rounded;  // the same, before it is an operand
  E* maps;     // (block, joints), where they are not finished in place
  int64_t z_bytes;

  Buffers(const HeadParams& p, int64_t block, Scratch& scratch) {
    z_bytes = block * padded<Operand>(p.middle) * sizeof(Operand);
    a = scratch.take<Operand>(block * padded<Operand>(p.in));
    z = scratch.take<Operand>(block * padded<Operand>(p.middle));
    rounded = kRounded ? scratch.take<E>(block * p.middle) : reinterpret_cast<E*>(z);
    maps = p.as_wanted ? scratch.take<E>(block * p.joints) : nullptr;
  }
};

// The heatmaps of some pixels, numbered through the batch, into the caller's map.
template <class E>
void hand_over(const HeadParams& p, const E* maps, int64_t first, int64_t pixels) {
  const Strides dense{0, 1, 0, p.joints};
  with_element(p.maps_element, [&](auto to) {
    for (int64_t done = 0; done < pixels;) {
      const int64_t image = (first + done) / p.pixels, pixel = (first + done) % p.pixels;
      const int64_t count = min(pixels - done, p.pixels - pixel);
      auto* y = static_cast<decltype(to)*>(p.heatmaps) + image * p.maps_strides.batch +
                pixel * p.maps_strides.width;
      copy_pixels(maps + done * p.joints, dense, y, p.maps_strides, p.joints, count);
      done += count;
    }
  });
}

template <class Operand, class E>
void run(const HeadParams& p, int threads, int64_t begin, int64_t end, void* memory) {
  const int64_t block = block_of(p, threads);
  Scratch scratch(memory);
  const Buffers<Operand, E> buffers(p, block, scratch);
  const int64_t in = padded<Operand>(p.in), middle = padded<Operand>(p.middle);
  if (middle != p.middle)  // zeros beyond the last channel, for good
    memset(static_cast<void*>(buffers.z), 0, buffers.z_bytes);
  [[maybe_unused]] const typename Tiling<Operand>::Scope scope{};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * block, pixels = min(block, p.batch * p.pixels - first);
    int64_t a_at[kMostPixels], z_at[kMostPixels], z_to[kMostPixels], maps_at[kMostPixels],
        next_at[kMostPixels];
    for (int64_t i = 0; i < round_up(pixels, Tiling<Operand>::kGroup); ++i) {
      const bool is_pixel = i < pixels;
      a_at[i] = i * in;
      z_at[i] = i * middle;
      z_to[i] = is_pixel ? i * (buffers.kRounded ? p.middle : middle) : -1;
      maps_at[i] = is_pixel ? (buffers.maps ? i : first + i) * p.joints : -1;
      next_at[i] = is_pixel ? (first + i) * p.out : -1;
    }
    auto features = Segment<Operand>::dense(buffers.a, a_at, in, p.w1);
    const E* x = static_cast<const E*>(p.x) + first * p.in;
    if (readable<Operand>(x, pixels, p.in)) {
      features.a = reinterpret_cast<const Operand*>(x);
    } else {
      prologue_pixels(x, pixels, p.in, nullptr, nullptr, buffers.a);
    }
    gemm(&features, 1, pixels, 0, p.middle,
         Epilogue<E>{.bias = p.b1, .relu = true, .y = buffers.rounded, .y_at = z_to});
    if (buffers.kRounded)
      prologue_pixels(buffers.rounded, pixels, p.middle, nullptr, nullptr, buffers.z);

    if (p.joints > 0) {
      const auto z = Segment<Operand>::dense(buffers.z, z_at, middle, p.w_maps);
      gemm(&z, 1, pixels, 0, p.joints,
           Epilogue<E>{.bias = p.b_maps,
                       .relu = false,
                       .y = buffers.maps ? buffers.maps : static_cast<E*>(p.heatmaps),
                       .y_at = maps_at});
      if (buffers.maps) hand_over(p, buffers.maps, first, pixels);
    }
    if (p.out > 0) {
      const auto z = Segment<Operand>::dense(buffers.z, z_at, middle, p.w_next);
      gemm(&z, 1, pixels, 0, p.out,
           Epilogue<E>{.bias = p.b_next,
                       .relu = false,
                       .y = static_cast<E*>(p.next),
                       .y_at = next_at,
                       .add = static_cast<const E*>(p.add)});
    }
  }
}

}  // namespace

Work plan_head(const HeadParams& p, int threads) {
  Work work;
  with_types(p.precision, [&](auto operand, auto element) {
    const int64_t block = block_of(p, threads);
    Scratch scratch(nullptr);
    Buffers<decltype(operand), decltype(element)>(p, block, scratch);
    work = {.tasks = ceil_div(p.batch * p.pixels, block), .scratch = scratch.used()};
  });
  return work;
}

void head(const HeadParams& p, int threads, int64_t begin, int64_t end, void* scratch) {
  with_types(p.precision, [&](auto operand, auto element) {
    run<decltype(operand), decltype(element)>(p, threads, begin, end, scratch);
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
