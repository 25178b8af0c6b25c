// The stem, a 7x7 convolution with stride 2 on an image, in one kernel (see kernels.h).
//
// Why a kernel of its own. Libraries of convolutions want the image's three channels padded to
// eight, in the dtype of the products and normalised: each of these is a pass over memory of its
// own, and five of eight products are with zeros. Here the image is read once as it is, uint8 if
// need be. An output pixel of 64 channels is 18.8 kFLOP and 128 bytes, and 12 (uint8) to 48
// (float32) bytes of the image: 107 to 134 FLOP per byte, less than what a large GPU multiplies
// while a byte arrives (about 180). So memory is the limit, and the products must only keep out of
// its way: 147 columns are padded to 160, 8.8 % more.
//
// A block computes tiles of 8x16 output pixels, all channels of them, one after the other:
//
//   weights   20 KB for 64 channels: copied to shared memory once for all tiles of the block.
//   image     21x37 pixels, normalised, rounded to 16 bits, zeros outside of the image. They lie in
//             shared memory as rows of (column, channel). Two buffers take turns, so that one
//             barrier a tile is enough, and warps that are through with a tile fetch the next while
//             others multiply.
//   products  rows are pixels, columns (ky, kx, channel). A kernel row is 21 neighbours in shared
//             memory, whatever the pixel: no im2col, and a pair of columns of a fragment is one
//             aligned load of 4 bytes. (ldmatrix wants rows of 16 aligned bytes, and pixels are 12
//             bytes apart.) A fragment's eight pixels by four pairs are 25 words, one behind the
//             other: no bank conflicts, but for the 5 of 20 whose pairs belong to two kernel rows,
//             where a bank is asked for two words at most.
//
// The 22nd column of a kernel row meets the next pixel, whatever it is, and its weight of 0 would
// make NaN of infinity: so it is masked.
#pragma once

#include "fragments.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace hgfast::cuda {

// An instance for up to 8 * n channels.
template <class Element_, int n_>
struct StemConfig {
  using T = Element_;
  static constexpr int n = n_;  // fragments of channels

  static constexpr int warps = 4, m = 2;  // and fragments of pixels of each: output rows
  static constexpr int threads = warps * kWarp, resident = 4;
  static constexpr int tile_h = warps * m, tile_w = 16;
  static constexpr int patch_h = 2 * (tile_h - 1) + StemParams::kKernel;
  static constexpr int patch_w = 2 * (tile_w - 1) + StemParams::kKernel;
  static constexpr int patch_row = (patch_w * StemParams::kChannels + 1) / 2;  // words
  static constexpr int patch_bytes = patch_h * patch_row * 4;
  static constexpr int weights_bytes = kStemColumns * 8 * n * 2;
  static constexpr int shared_bytes = weights_bytes + 2 * patch_bytes;

  static_assert(n % 4 == 0, "a quad of lanes exchanges four fragments");
  static_assert(weights_bytes % (threads * 16) == 0, "all threads copy weights alike");
};

// Of the pairs of columns that begin at 8 * i + 2 * quad, for the four lanes of a quad: the first
// that belongs to the next kernel row, and the one that ends a row; 4: none.
HGFAST_HOST_DEVICE constexpr int stem_row_begins(int i) {
  for (int quad = 1; quad < 4; ++quad)
    if ((8 * i + 2 * quad) / kStemRow > 8 * i / kStemRow) return quad;
  return 4;
}
HGFAST_HOST_DEVICE constexpr int stem_row_ends(int i) {
  for (int quad = 0; quad < 4; ++quad)
    if ((8 * i + 2 * quad) % kStemRow == kStemRow - 2) return quad;
  return 4;
}

// One thread's part.
template <class Config>
struct StemTile {
  using T = typename Config::T;
  static constexpr int kRowBytes = Config::patch_row * 4;

  const StemParams& p;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int sum_row = lane / 4, quad = lane % 4;

  int image, y0, x0;  // the tile's place in y

  HGFAST_DEVICE explicit StemTile(const StemParams& params) : p(params) {}

  HGFAST_DEVICE int height() const { return static_cast<int>(p.height + 1) / 2; }
  HGFAST_DEVICE int width() const { return static_cast<int>(p.width + 1) / 2; }
  HGFAST_DEVICE int tiles_x() const { return (width() + Config::tile_w - 1) / Config::tile_w; }
  HGFAST_DEVICE int tiles_y() const { return (height() + Config::tile_h - 1) / Config::tile_h; }

  HGFAST_DEVICE void go_to(int tile) {
    const int of_image = tiles_x() * tiles_y();
    image = tile / of_image;
    y0 = tile % of_image / tiles_x() * Config::tile_h;
    x0 = tile % of_image % tiles_x() * Config::tile_w;
  }

  HGFAST_DEVICE Shared weights() const { return shared_memory(); }
  HGFAST_DEVICE Shared patch(int buffer) const {
    return shared_memory() + Config::weights_bytes + buffer * Config::patch_bytes;
  }

  HGFAST_DEVICE void ask_for_weights() const {
    const int thread = thread_index() * 16;
#pragma unroll
    for (int i = 0; i < Config::weights_bytes; i += Config::threads * 16)
      copy_async(weights() + i + thread, static_cast<const char*>(p.tape) + i + thread);
    commit_copies();
  }

  // ---- The image ----

  template <Pixel pixel>
  HGFAST_DEVICE static float load_pixel(const void* x, int64_t element) {
    const char* const bytes = static_cast<const char*>(x);
    if constexpr (pixel == Pixel::uint8)
      return static_cast<float>(load_global<uint8_t>(bytes + element));
    else if constexpr (pixel == Pixel::bfloat16)
      return unpack<BFloat16>(load_global<uint16_t>(bytes + element * 2)).x;
    else if constexpr (pixel == Pixel::float16)
      return unpack<Float16>(load_global<uint16_t>(bytes + element * 2)).x;
    else
      return load_global<float>(bytes + element * 4);
  }

  // Two neighbours of a row at a time: what a thread writes are whole words.
  template <Pixel pixel>
  HGFAST_DEVICE void fill(Shared to) const {
    constexpr int words = Config::patch_h * Config::patch_row;
    const int64_t begin = image * p.x_batch;
    const int row0 = 2 * y0 - StemParams::kKernel / 2, column0 = 2 * x0 - StemParams::kKernel / 2;
    const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
    const int row_stride = static_cast<int>(p.x_row), column_stride = static_cast<int>(p.x_column);
    const int channel_stride = static_cast<int>(p.x_channel);
    const int thread = forget(thread_index());
#pragma unroll 5  // ten loads under way
    for (int i = 0; i < words; i += Config::threads) {
      const int word = i + thread;
      if (words % Config::threads && word >= words) break;
      const int row = row0 + word / Config::patch_row;
      float values[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int entry = word % Config::patch_row * 2 + j, channel = entry % StemParams::kChannels;
        const int column = column0 + entry / StemParams::kChannels;
        values[j] = 0;
        if (row < 0 || row >= height || column < 0 || column >= width) continue;
        const int element = row * row_stride + column * column_stride + channel * channel_stride;
        values[j] = load_pixel<pixel>(p.x, begin + element);
        if (p.scale)
          values[j] = fmaf(load_global<float>(p.scale + channel), values[j],
                           load_global<float>(p.shift + channel));
      }
      store_shared(to + word * 4, pack<T>(values[0], values[1]));
    }
  }

  HGFAST_DEVICE void fill(Shared to) const {
    switch (p.pixel) {
      case Pixel::uint8:
        return fill<Pixel::uint8>(to);
      case Pixel::bfloat16:
        return fill<Pixel::bfloat16>(to);
      case Pixel::float16:
        return fill<Pixel::float16>(to);
      case Pixel::float32:
        return fill<Pixel::float32>(to);
    }
  }

  // ---- Products ----

  HGFAST_DEVICE void multiply(float (&sums)[Config::m][Config::n][4], Shared patch) const {
    const Shared b_begin = weights() + lane * 16;
    // Or what is said of columns below is kept in registers from tile to tile.
    const int quad = forget(this->quad);
    // The first pixel of this lane's in the first of the warp's output rows, and its pair.
    const Shared a_begin = patch + warp * Config::m * 2 * kRowBytes + sum_row * 12 + quad * 4;
#pragma unroll
    for (int step = 0; step < kStemColumns / 16; ++step) {
      uint4 b[Config::n / 2];
#pragma unroll
      for (int n = 0; n < Config::n / 2; ++n)
        b[n] = load_shared<uint4>(b_begin + (step * (Config::n / 2) + n) * 512);
#pragma unroll
      for (int i = 0; i < Config::m; ++i) {
        uint32_t a[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pairs = 2 * step + half;  // the columns 8 * pairs + 2 * quad and the next
          const int row = 8 * pairs / kStemRow + (quad >= stem_row_begins(pairs) ? 1 : 0);
          const Shared at =
              a_begin + i * 2 * kRowBytes + pairs * 16 + row * (kRowBytes - kStemRow * 2);
          // Behind the last kernel row there are no pixels.
          const bool real = pairs < 19 || quad == 0;
          const uint32_t mask = quad == stem_row_ends(pairs) ? 0x0000ffffu : 0xffffffffu;
#pragma unroll
          for (int lower = 0; lower < 2; ++lower)
            a[half * 2 + lower] = real ? load_shared<uint32_t>(at + lower * 8 * 12) & mask : 0u;
        }
#pragma unroll
        for (int n = 0; n < Config::n / 2; ++n) {
          multiply_add<T>(sums[i][2 * n], a, b[n].x, b[n].y);
          multiply_add<T>(sums[i][2 * n + 1], a, b[n].z, b[n].w);
        }
      }
    }
  }

  // ---- Output ----

  HGFAST_DEVICE void store(const float (&sums)[Config::m][Config::n][4]) const {
    char* const out = static_cast<char*>(p.y) + int64_t{image} * height() * width() * p.out * 2;
#pragma unroll
    for (int i = 0; i < Config::m; ++i) {
      const int y = y0 + warp * Config::m + i;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int x = x0 + half * 8 + sum_row;
#pragma unroll
        for (int n = 0; n < Config::n; n += 4) {
          uint32_t v[4];
#pragma unroll
          for (int j = 0; j < 4; ++j)
            v[j] = pack_relu<T>(sums[i][n + j][2 * half], sums[i][n + j][2 * half + 1]);
          transpose_quad(v);  // by all lanes, also where nothing is stored

          const int channel = (n + quad) * 8;
          if (y >= height() || x >= width() || channel >= p.out) continue;
          store_global(out + ((int64_t{y} * width() + x) * p.out + channel) * 2,
                       uint4{v[0], v[1], v[2], v[3]});
        }
      }
    }
  }

  HGFAST_DEVICE void run() {
    ask_for_weights();
    const int tiles = static_cast<int>(p.batch) * tiles_x() * tiles_y();
    const int first = block_index() * p.tiles_a_block;
#pragma unroll 1
    for (int i = 0; i < p.tiles_a_block && first + i < tiles; ++i) {
      go_to(first + i);
      fill(patch(i % 2));
      if (i == 0) wait_copies<0>();
      sync_block();
      float sums[Config::m][Config::n][4];
#pragma unroll
      for (int n = 0; n < Config::n; ++n) {
        const float2 b = load_global<float2>(p.b + n * 8 + quad * 2);
#pragma unroll
        for (int j = 0; j < Config::m; ++j) {
          sums[j][n][0] = sums[j][n][2] = b.x;
          sums[j][n][1] = sums[j][n][3] = b.y;
        }
      }
      multiply(sums, patch(i % 2));
      store(sums);
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::resident)
    stem_kernel(const __grid_constant__ StemParams p) {
  StemTile<Config> tile(p);
  tile.run();
}

}  // namespace hgfast::cuda
