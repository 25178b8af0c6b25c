// The instances of the bottleneck kernel for Hopper, and their launch.
#include <algorithm>

#include "hopper_bottleneck.cuh"

namespace hgfast::cuda {

template <class Visit>
void visit_arrays(const HopperTileParams& p, Visit&& visit) {
  const BottleneckParams& b = p.block;
  const int64_t pixels = b.batch * b.height * b.width;
  visit(b.x, pixels * b.in * 2, false);
  if (b.low) visit(b.low, pixels / 4 * b.out * 2, false);
  visit(b.y, pixels * b.out * 2, true);
  if (p.pooled) visit(p.pooled, b.batch * (b.height / 2) * (b.width / 2) * b.out * 2, true);
  if (b.scale) {
    visit(b.scale, int64_t{4} * b.in, false, true);
    visit(b.shift, int64_t{4} * b.in, false, true);
  }
  visit(b.b1, int64_t{4} * b.middle, false, true);
  visit(b.b2, int64_t{4} * b.middle, false, true);
  visit(b.b3, int64_t{4} * b.out, false, true);
  visit(b.tape, p.tape.end * 2, false, true);
}

namespace {

constexpr const char* kNames[] = {"hopper_bottleneck<bfloat16>", "hopper_bottleneck<float16>"};

bool sensible(const HopperBottleneckParams& params) {
  const BottleneckParams& p = params.block;
  return is_sensible(p) && hopper_bottleneck_fits(p.in, p.middle, p.out) && !p.pool &&
         !(params.pooled && (p.height < 2 || p.width < 2));
}

}  // namespace

bool hopper_bottleneck_fits(int in, int middle, int out) {
  return middle == HopperTape::kMiddle && in > 0 && in % HopperTape::kColumns == 0 && out > 0 &&
         out % HopperTape::kOut == 0;
}

std::vector<BottleneckVariant> hopper_bottleneck_variants() {
  std::vector<BottleneckVariant> variants;
  for (const char* name : kNames)
    variants.push_back({name, HopperLayout::kThreads, 0, HopperLayout::kEnd});
  return variants;
}

cudaError_t hopper_bottleneck(const HopperBottleneckParams& params, cudaStream_t stream,
                              const char** variant) {
  using Layout = HopperLayout;
  const BottleneckParams& b = params.block;
  if (b.batch == 0) return cudaSuccess;
  if (!sensible(params)) return cudaErrorInvalidValue;
  Device device{};
  if (const auto error = current_device(device)) return error;
  if (device.major != 9 || device.minor != 0) return cudaErrorNotSupported;

  HopperTileParams p{};
  p.block = b;
  p.pooled = params.pooled;
  p.tape = hopper_tape(b.in, b.out, b.project);
  const int64_t tiles_x = (b.width + Layout::kTile - 1) / Layout::kTile;
  const int64_t tiles_y = (b.height + Layout::kTile - 1) / Layout::kTile;
  const int64_t pairs = (tiles_x * tiles_y * b.batch + 1) / Layout::kCluster;
  if (pairs > INT32_MAX / Layout::kCluster - 1) return cudaErrorInvalidValue;
  p.tiles_x = static_cast<int>(tiles_x);
  p.tiles_y = static_cast<int>(tiles_y);
  p.pairs = static_cast<int>(pairs);

  const bool bfloat16 = b.element == Element::bfloat16;
  cudaError_t error = cudaSuccess;
  const auto map = [&](TensorMap& to, const void* address, int64_t shrink, int channels, int width,
                       int height) {
    if (error != cudaSuccess) return;
    error = make_tensor_map(to, address,
                            {b.batch, b.height / shrink, b.width / shrink, channels, Layout::kSlice,
                             width, height, Swizzle::rows_of_64},
                            bfloat16);
  };
  map(p.x_quarter, b.x, 1, b.in, 8, 8);
  map(p.x_row, b.x, 1, b.in, Layout::kHalo, 1);
  map(p.x_column, b.x, 1, b.in, 1, Layout::kTile);
  map(p.y, b.y, 1, b.out, 8, 2);
  if (b.low) map(p.low, b.low, 2, b.out, 8, 8);
  if (p.pooled) map(p.y_pooled, p.pooled, 2, b.out, 4, 1);
  if (error != cudaSuccess) return error;

  const char* const name = kNames[bfloat16 ? 0 : 1];
  if (variant) *variant = name;
  const int64_t room = std::max(1, device.multiprocessors / Layout::kCluster);
  Grid grid{(pairs < room ? pairs : room) * Layout::kCluster, Layout::kThreads, Layout::kEnd,
            Layout::kEnd};
  grid.cluster = Layout::kCluster;
  grid.registers = Layout::kRegisters;
  return bfloat16 ? launch<hopper_bottleneck_kernel<BFloat16>>(name, grid, stream, p)
                  : launch<hopper_bottleneck_kernel<Float16>>(name, grid, stream, p);
}

}  // namespace hgfast::cuda
