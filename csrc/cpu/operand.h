// Activations into the form that products read: converted to the operand type, through the
// BatchNorm and ReLU before the convolution where there is one, padded with zeros.
#pragma once

#include "gemm.h"

namespace hgfast::cpu::HGFAST_ISA {

// y = relu(scale * x + shift), or x where scale is null.
template <class Operand, class E>
inline void prologue(const E* x, int64_t channels, const float* scale, const float* shift,
                     Operand* y) {
  if constexpr (!is_of_maps<E>) {  // has been through it
    memcpy(static_cast<void*>(y), x, channels * sizeof(E));
  } else if (scale) {
    each(channels, [&](int64_t c, auto lanes) {
      put(y, c, relu(fma(load(x + c, lanes), load(scale + c, lanes), load(shift + c, lanes))),
          lanes);
    });
  } else {
    each(channels, [&](int64_t c, auto lanes) { put(y, c, load(x + c, lanes), lanes); });
  }
}

// Whole pixels, dense in x, `stride` apart and padded in y.
template <class Operand, class E>
inline void prologue_pixels(const E* x, int64_t pixels, int64_t channels, const float* scale,
                            const float* shift, Operand* y, int64_t stride) {
  for (int64_t i = 0; i < pixels; ++i, x += channels, y += stride) {
    prologue(x, channels, scale, shift, y);
    clear(y, channels, stride);
  }
}

template <class Operand, class E>
inline void prologue_pixels(const E* x, int64_t pixels, int64_t channels, const float* scale,
                            const float* shift, Operand* y) {
  prologue_pixels(x, pixels, channels, scale, shift, y, padded<Operand>(channels));
}

// Products can read dense pixels of x where they lie: nothing to convert, nothing to pad, and
// no group of slots that runs past the end.
template <class Operand, class E>
inline bool readable(const E* x, int64_t pixels, int64_t channels) {
  constexpr int64_t group = Tiling<Operand>::kGroup;
  return is_same<Operand, E> && padded<Operand>(channels) == channels && pixels % group == 0 &&
         (group == 1 || reinterpret_cast<uintptr_t>(x) % kAlign == 0);
}

}  // namespace hgfast::cpu::HGFAST_ISA
