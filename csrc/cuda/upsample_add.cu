// y = skip + maps enlarged by nearest neighbour, and the ReLU behind it: the way up in an
// hourglass (one map, x2), and the fusion of resolutions in HRNet (up to three, x2 to x8).
//
// Layout: NHWC. A thread makes 8 channels of a pixel, 16 bytes, which is the widest access there
// is; the threads of a block lie side by side in a row of the image.
//
// Bytes: skip and y pass once. A pixel of a map is read by 4 to 64 threads, of the same block or
// of blocks that run at the same time, so that all but the first find it in L1 or L2: at x2, 2.25
// elements cross the memory bus for each of y. There are 1 to 3 additions for each, so memory is
// the limit, and nothing beside width and independent accesses matters.
#include "kernels.h"
#include "launch.cuh"

namespace hgfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 8;  // channels

int64_t blocks_per_row(const UpsampleAddParams& p) {
  return (p.width * (p.channels / kPiece) + kThreads - 1) / kThreads;
}

template <class T>
HGFAST_DEVICE void add(float2 (&sum)[4], uint4 piece) {
  const float2 values[] = {unpack<T>(piece.x), unpack<T>(piece.y), unpack<T>(piece.z),
                           unpack<T>(piece.w)};
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = {sum[i].x + values[i].x, sum[i].y + values[i].y};
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    upsample_add_kernel(const __grid_constant__ UpsampleAddParams p) {
  const int pieces = p.channels / kPiece, width = static_cast<int>(p.width);
  const int blocks = (width * pieces + kThreads - 1) / kThreads;
  const int row = block_index() / blocks, height = static_cast<int>(p.height);
  const int i = block_index() % blocks * kThreads + thread_index();
  if (i >= width * pieces) return;
  const int image = row / height, y = row % height, x = i / pieces, piece = i % pieces;
  const auto at = [&](int shift) {  // byte offset of this thread's piece in a map
    const int64_t line = static_cast<int64_t>(image) * (height >> shift) + (y >> shift);
    return ((line * (width >> shift) + (x >> shift)) * pieces + piece) * 16;
  };

  float2 sum[4] = {};
  add<T>(sum, load_global<uint4>(static_cast<const char*>(p.skip) + at(0)));
#pragma unroll
  for (int map = 0; map < UpsampleAddParams::kMaps; ++map) {
    if (map == p.maps) break;
    const char* low = static_cast<const char*>(p.low[map]);
    add<T>(sum, load_global<uint4>(low + at(p.shift[map])));
  }
  const auto result = [&](float2 values) {
    return p.relu ? pack_relu<T>(values.x, values.y) : pack<T>(values.x, values.y);
  };
  store_global(static_cast<char*>(p.y) + at(0),
               uint4{result(sum[0]), result(sum[1]), result(sum[2]), result(sum[3])});
}

bool sensible(const UpsampleAddParams& p) {
  if (p.batch < 0 || p.height < 1 || p.width < 1 || p.channels < kPiece || p.channels % kPiece)
    return false;
  if (p.width * (p.channels / kPiece) > INT32_MAX - kThreads || p.height > INT32_MAX) return false;
  if (p.maps < 1 || p.maps > UpsampleAddParams::kMaps || !p.skip || !p.y) return false;
  for (int i = 0; i < p.maps; ++i) {
    if (p.shift[i] < 0 || p.shift[i] > 3 || !p.low[i]) return false;
    const int64_t rest = (int64_t{1} << p.shift[i]) - 1;
    if ((p.height & rest) || (p.width & rest)) return false;
  }
  return true;
}

}  // namespace

cudaError_t runs_here() {
#ifdef HGFAST_EMULATE
  return cudaSuccess;
#else
  cudaFuncAttributes attributes;  // of any kernel: all are built for the same architectures
  return forgotten(cudaFuncGetAttributes(&attributes, upsample_add_kernel<BFloat16>));
#endif
}

cudaError_t upsample_add(const UpsampleAddParams& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  if (!sensible(p)) return cudaErrorInvalidValue;
  const Grid grid{p.batch * p.height * blocks_per_row(p), kThreads, 0, 0};
  if (p.element == Element::bfloat16)
    return launch<upsample_add_kernel<BFloat16>>("upsample_add<bfloat16>", grid, stream, p);
  return launch<upsample_add_kernel<Float16>>("upsample_add<float16>", grid, stream, p);
}

}  // namespace hgfast::cuda
