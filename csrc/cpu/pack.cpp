// Weights into the order in which the products of gemm.h and gemm_amx.h read them.
#include "gemm.h"
#include "table.h"
#include "winograd.h"

namespace hgfast::cpu::HGFAST_ISA {

namespace {

struct Weights {
  const float* weight;  // (out, in, kernel_h, kernel_w)
  int64_t out, in, kernel_h, kernel_w;
  Depth depth;

  // to(i, weight of channel n0 + i at place k of the padded depth), 0 in the padding.
  template <class F>
  void each_channel(int64_t n0, int64_t count, int64_t k, F to) const {
    const int64_t taps = kernel_h * kernel_w;
    const int64_t row = k / depth.row, column = k % depth.row / depth.tap, c = k % depth.tap;
    const bool is_tap = row < kernel_h && column < kernel_w && c < in;
    const int64_t real = is_tap ? min(count, out - n0) : 0;
    const float* from = is_tap ? weight + (n0 * in + c) * taps + row * kernel_w + column : nullptr;
    for (int64_t i = 0; i < real; ++i, from += in * taps) to(i, *from);
    for (int64_t i = real; i < count; ++i) to(i, 0.0f);
  }
};

// [panel][k][channel]
void pack_panels(const Weights& weights, float* packed) {
  const int64_t out = round_up(weights.out, kLanes);
  for (int64_t n0 = 0; n0 < out; n0 += kPanel) {
    const int64_t width = min(kPanel, out - n0);
    for (int64_t k = 0; k < weights.depth.total; ++k, packed += width)
      weights.each_channel(n0, width, k, [&](int64_t i, float w) { packed[i] = w; });
  }
}

#if defined(__AMX_TILE__) || defined(HGFAST_AMX_MODEL)
// [panel][k / 32][half of the panel][k pair][channel][2]
void pack_panels(const Weights& weights, bf16* packed) {
  for (int64_t n0 = 0; n0 < weights.out; n0 += kTilePanel) {
    for (int64_t k = 0; k < weights.depth.total; ++k) {
      bf16* pair = packed + k / 32 * (2 * kTileOfB) + k % 32 / 2 * 32 + k % 2;
      weights.each_channel(n0, kTilePanel, k, [&](int64_t i, float w) {
        store(pair + i / 16 * kTileOfB + i % 16 * 2, splat(w), Part{1});
      });
    }
    packed += weights.depth.total * kTilePanel;
  }
}

// [panel][k / 32][high or low parts][half of the panel][k pair][channel][2]
void pack_panels(const Weights& weights, bf16x2* packed) {
  for (int64_t n0 = 0; n0 < weights.out; n0 += kTilePanel) {
    for (int64_t k = 0; k < weights.depth.total; ++k) {
      bf16* pair =
          reinterpret_cast<bf16*>(packed) + k / 32 * (4 * kTileOfB) + k % 32 / 2 * 32 + k % 2;
      weights.each_channel(n0, kTilePanel, k, [&](int64_t i, float w) {
        const Parts parts(splat(w));
        bf16* high = pair + i / 16 * kTileOfB + i % 16 * 2;
        store(high, parts.high, Part{1});
        store(high + 2 * kTileOfB, parts.low, Part{1});
      });
    }
    packed += weights.depth.total * kTilePanel;
  }
}
#endif

// G g G' of a kernel's nine weights, [panel][place][k][channel]. Formed in float64, rounded once.
template <int M>
void pack_tiles(const float* weight, int64_t out, int64_t in, float* packed) {
  constexpr int kSide = Tiles<M>::kSide, kPlaces = Tiles<M>::kPlaces;
  const auto& g = Winograd<M>::kWeights;
  for (int64_t n0 = 0; n0 < out; n0 += kPanel) {
    const int64_t width = min(kPanel, round_up(out, kLanes) - n0), real = min(width, out - n0);
    for (int64_t k = 0; k < in; ++k) {
      double taps[9][kPanel] = {}, rows[kSide][3][kPanel];
      for (int64_t i = 0; i < real; ++i)
        for (int tap = 0; tap < 9; ++tap) taps[tap][i] = weight[((n0 + i) * in + k) * 9 + tap];
      for (int a = 0; a < kSide; ++a)
        for (int c = 0; c < 3; ++c)
          for (int64_t i = 0; i < kPanel; ++i)
            rows[a][c][i] =
                g[a][0] * taps[c][i] + g[a][1] * taps[3 + c][i] + g[a][2] * taps[6 + c][i];
      for (int place = 0; place < kPlaces; ++place) {
        const auto& row = rows[place / kSide];
        const double* b = g[place % kSide];
        float* to = packed + (place * in + k) * width;
        for (int64_t i = 0; i < width; ++i)
          to[i] = static_cast<float>(b[0] * row[0][i] + b[1] * row[1][i] + b[2] * row[2][i]);
      }
    }
    packed += kPlaces * in * width;
  }
}

template <class Operand>
Depth depth_by(Method method, int64_t in, int64_t kernel_h, int64_t kernel_w) {
  return method == Method::lines ? depth_of_lines<Operand>(kernel_h)
                                 : depth_of<Operand>(in, kernel_h, kernel_w);
}

}  // namespace

// What the products take, in turns of the FMA units, and the weights on their way from memory: a
// network's do not fit into a cache. The transforms add a tenth and a sixth. The larger weights
// have to save a ninth, since they are the larger part of a network's memory.
Method choose(Precision precision, int64_t height, int64_t width, int64_t in, int64_t out) {
  Method best = Method::direct;
  with_types(precision, [&](auto operand, auto) {
    if (!is_same<decltype(operand), float> || min(in, out) < kFewestChannels) return;
    constexpr int64_t kBytesPerCycle = 4, kPerCycle = 2 * kLanes;
    const int64_t pairs = in * out;
    const auto cycles = [&](int64_t products, int64_t weights) {
      return products * pairs / kPerCycle +
             weights * pairs * int64_t{sizeof(float)} / kBytesPerCycle;
    };
    const auto by_tiles = [&](int64_t side, int64_t percent) {
      const int64_t places = (side + 2) * (side + 2);
      return cycles(ceil_div(height, side) * ceil_div(width, side) * places * percent / 100,
                    places);
    };
    const int64_t direct = cycles(9 * height * width, 9), two = by_tiles(2, 110);
    const int64_t four = precision == Precision::highest ? INT64_MAX / 2 : by_tiles(4, 117);
    if (two + two / 8 < direct) best = Method::tiles2;
    if (four + four / 8 < min(direct, two)) best = Method::tiles4;
  });
  return best;
}

size_t packed_bytes(Precision precision, Method method, int64_t out, int64_t in, int64_t kernel_h,
                    int64_t kernel_w) {
  size_t bytes = 0;
  if (method == Method::tiles2 || method == Method::tiles4) {
    const int64_t places = method == Method::tiles2 ? Tiles<2>::kPlaces : Tiles<4>::kPlaces;
    return places * in * round_up(out, kLanes) * sizeof(float);
  }
  with_types(precision, [&](auto operand, auto) {
    using Operand = decltype(operand);
    const int64_t channels = round_up(out, Tiling<Operand>::kWidth);
    bytes = depth_by<Operand>(method, in, kernel_h, kernel_w).total * channels * sizeof(Operand);
  });
  return round_up(bytes, kAlign);
}

void pack(Precision precision, Method method, int64_t out, int64_t in, int64_t kernel_h,
          int64_t kernel_w, const float* weight, void* packed) {
  if (method == Method::tiles2) return pack_tiles<2>(weight, out, in, static_cast<float*>(packed));
  if (method == Method::tiles4) return pack_tiles<4>(weight, out, in, static_cast<float*>(packed));
  with_types(precision, [&](auto operand, auto) {
    using Operand = decltype(operand);
    const Depth depth = depth_by<Operand>(method, in, kernel_h, kernel_w);
    pack_panels({weight, out, in, kernel_h, kernel_w, depth}, static_cast<Operand*>(packed));
  });
}

}  // namespace hgfast::cpu::HGFAST_ISA
