// What kernels do with the sums of their matrix instructions before they leave the registers.
#pragma once

#include "device.cuh"

namespace hgfast::cuda {

HGFAST_DEVICE float2 exchange(float2 value, int mask) {
  return {shuffle_xor(value.x, mask), shuffle_xor(value.y, mask)};
}
HGFAST_DEVICE uint32_t exchange(uint32_t value, int mask) { return shuffle_xor(value, mask); }

// A quad's four lanes hold, of a pixel, two columns each of four fragments, as a float2 or packed;
// afterwards all eight columns of one fragment, the one with the number of the lane in its quad.
// All lanes must take part.
template <class Pair>
HGFAST_DEVICE void transpose_quad(Pair (&v)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = thread_index() & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const Pair taken = exchange(upper ? v[i] : v[i + bit], bit);
      if (upper)
        v[i] = taken;
      else
        v[i + bit] = taken;
    }
  }
}

// Adds eight elements of memory.
template <class T>
HGFAST_DEVICE void add(float2 (&v)[4], uint4 piece) {
  const uint32_t pairs[] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 value = unpack<T>(pairs[i]);
    v[i] = {v[i].x + value.x, v[i].y + value.y};
  }
}

}  // namespace hgfast::cuda
