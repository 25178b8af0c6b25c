// Weights into the order in which the products of gemm.h and gemm_amx.h read them.
#include "gemm.h"
#include "table.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

struct Weights {
  const float* weight;  // (out, in, taps)
  int64_t out, in, taps;
  Depth depth;

  // to(i, weight of channel n0 + i at place k of the padded depth), 0 in the padding.
  template <class F>
  void each_channel(int64_t n0, int64_t count, int64_t k, F to) const {
    const int64_t within = k % depth.stride;
    const int64_t flat = k / depth.stride * depth.length + within;  // (tap, in channel)
    const float* from = weight + (n0 * in + flat % in) * taps + flat / in;
    const int64_t real = within < depth.length ? min(count, out - n0) : 0;
    for (int64_t i = 0; i < real; ++i, from += in * taps) to(i, *from);
    for (int64_t i = real; i < count; ++i) to(i, 0.0f);
  }
};

// [panel][k][channel]
void pack_panels(const Weights& weights, float* packed) {
  const int64_t out = round_up(weights.out, kLanes);
  for (int64_t n0 = 0; n0 < out; n0 += kPanel) {
    const int64_t width = min(kPanel, out - n0);
    for (int64_t k = 0; k < weights.depth.total(); ++k, packed += width)
      weights.each_channel(n0, width, k, [&](int64_t i, float w) { packed[i] = w; });
  }
}

#if defined(__AMX_TILE__) || defined(HGFAST_AMX_MODEL)
// [panel][k / 32][half of the panel][k pair][channel][2]
void pack_panels(const Weights& weights, bf16* packed) {
  for (int64_t n0 = 0; n0 < weights.out; n0 += kTilePanel) {
    for (int64_t k = 0; k < weights.depth.total(); ++k) {
      bf16* pair = packed + k / 32 * (2 * kTileOfB) + k % 32 / 2 * 32 + k % 2;
      weights.each_channel(n0, kTilePanel, k, [&](int64_t i, float w) {
        store(pair + i / 16 * kTileOfB + i % 16 * 2, splat(w), Part{1});
      });
    }
    packed += weights.depth.total() * kTilePanel;
  }
}

// [panel][k / 32][high or low parts][half of the panel][k pair][channel][2]
void pack_panels(const Weights& weights, bf16x2* packed) {
  for (int64_t n0 = 0; n0 < weights.out; n0 += kTilePanel) {
    for (int64_t k = 0; k < weights.depth.total(); ++k) {
      bf16* pair =
          reinterpret_cast<bf16*>(packed) + k / 32 * (4 * kTileOfB) + k % 32 / 2 * 32 + k % 2;
      weights.each_channel(n0, kTilePanel, k, [&](int64_t i, float w) {
        const Parts parts(splat(w));
        bf16* high = pair + i / 16 * kTileOfB + i % 16 * 2;
        store(high, parts.high, Part{1});
        store(high + 2 * kTileOfB, parts.low, Part{1});
      });
    }
    packed += weights.depth.total() * kTilePanel;
  }
}
#endif

}  // namespace

size_t packed_bytes(Precision precision, int64_t out, int64_t in, int64_t kernel_h,
                    int64_t kernel_w) {
  size_t bytes = 0;
  with_types(precision, [&](auto operand, auto) {
    using Operand = decltype(operand);
    const int64_t channels = round_up(out, Tiling<Operand>::kWidth);
    bytes = depth_of<Operand>(in, kernel_h, kernel_w).total() * channels * sizeof(Operand);
  });
  return round_up(bytes, kAlign);
}

void pack(Precision precision, int64_t out, int64_t in, int64_t kernel_h, int64_t kernel_w,
          const float* weight, void* packed) {
  with_types(precision, [&](auto operand, auto) {
    using Operand = decltype(operand);
    const Depth depth = depth_of<Operand>(in, kernel_h, kernel_w);
    pack_panels({weight, out, in, kernel_h * kernel_w, depth}, static_cast<Operand*>(packed));
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
