// Weights into the order in which the products of gemm.h and gemm_amx.h read them.
#include "gemm.h"
#include "table.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

// The weight of output channel n at place k of its padded depth; 0 in the padding.
struct Weights {
  const float* weight;  // (out, in, taps)
  int64_t out, in, taps;
  Depth depth;

  float at(int64_t n, int64_t k) const {
    const int64_t within = k % depth.stride;
    if (n >= out || within >= depth.length) return 0;
    const int64_t flat = k / depth.stride * depth.length + within;  // (tap, in channel)
    return weight[(n * in + flat % in) * taps + flat / in];
  }
};

// [panel][k][channel]
void pack_panels(const Weights& weights, float* packed) {
  const int64_t out = round_up(weights.out, kLanes);
  for (int64_t n0 = 0; n0 < out; n0 += kPanel) {
    const int64_t width = min(kPanel, out - n0);
    for (int64_t k = 0; k < weights.depth.total(); ++k) {
      for (int64_t n = n0; n < n0 + width; ++n) *packed++ = weights.at(n, k);
    }
  }
}

#if defined(__AMX_TILE__) || defined(HGFAST_AMX_MODEL)
// [panel][k / 32][half of the panel][k pair][channel][2]
void pack_panels(const Weights& weights, bf16* packed) {
  for (int64_t n0 = 0; n0 < weights.out; n0 += kTilePanel) {
    for (int64_t k0 = 0; k0 < weights.depth.total(); k0 += 32) {
      for (int64_t i = 0; i < 2 * kTileOfB; ++i) {
        const int64_t n = n0 + i / kTileOfB * 16 + i % 32 / 2,
                      k = k0 + i % kTileOfB / 32 * 2 + i % 2;
        store(packed++, splat(weights.at(n, k)), Part{1});
      }
    }
  }
}
#endif

}  // namespace

size_t packed_bytes(Element element, int64_t out, int64_t in, int64_t kernel_h, int64_t kernel_w) {
  size_t bytes = 0;
  with_types(element, [&](auto operand, auto) {
    using Operand = decltype(operand);
    const int64_t channels = round_up(out, sizeof(Operand) == 2 ? 32 : kLanes);
    bytes = depth_of<Operand>(in, kernel_h, kernel_w).total() * channels * sizeof(Operand);
  });
  return round_up(bytes, kAlign);
}

void pack(Element element, int64_t out, int64_t in, int64_t kernel_h, int64_t kernel_w,
          const float* weight, void* packed) {
  with_types(element, [&](auto operand, auto) {
    using Operand = decltype(operand);
    const Depth depth = depth_of<Operand>(in, kernel_h, kernel_w);
    pack_panels({weight, out, in, kernel_h * kernel_w, depth}, static_cast<Operand*>(packed));
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
