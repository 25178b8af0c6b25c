// The maximum over windows of pixels: for pools, and for blocks that pool what they read.
#pragma once

#include "vec.h"

namespace hgfast::cpu::HGFAST_ISA {

// One pixel of y from `height` x `width` pixels of x, whose rows lie `pitch` elements apart. Both
// numbers may be known to the compiler: Sides are integers or Fixed.
template <int N>
struct Fixed {
  constexpr operator int64_t() const { return N; }
};

template <class E, class Height, class Width>
inline void largest(const E* x, int64_t pitch, int64_t channels, Height height, Width width, E* y) {
  each(channels, [&](int64_t c, auto lanes) {
    Vec most = load(x + c, lanes);
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        if (i + j > 0) most = maximum(most, load(x + i * pitch + j * channels + c, lanes));
      }
    }
    store(y + c, most, lanes);
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
