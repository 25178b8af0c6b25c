// The ops on a CPU: Tensor -> parameters -> kernel. Each call packs its weights afresh: right,
// not fastest. What runs one network again and again is CpuPlan (cpu_plan.h).
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "cpu_binding.h"

namespace hgfast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor channels_last(const Tensor& map) { return map.contiguous(at::MemoryFormat::ChannelsLast); }

Tensor empty_map(const Shape& shape, const Tensor& like) {
  return at::empty(shape.sizes(), like.options(), at::MemoryFormat::ChannelsLast);
}

// A second map, which the kernel reads beside the first: dense, of the shape it must have.
Tensor second_map(const char* where, const char* name, const Tensor& map, const Shape& expected,
                  const Tensor& first) {
  check_shape(where, name, map_shape(where, name, map), expected);
  TORCH_CHECK_VALUE(map.scalar_type() == first.scalar_type(), where, ": expected ", name, " in ",
                    first.scalar_type(), " as the first map is, given ", map.scalar_type());
  return channels_last(map);
}

Tensor bottleneck(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& w1,
                  const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& w3,
                  const Tensor& b3, const OptionalTensor& wp, const OptionalTensor& bp,
                  const OptionalTensor& low) {
  const char* where = "hgfast::bottleneck";
  const auto& kernels = cpu::kernels();
  const Shape shape = map_shape(where, "x", x);
  const BottleneckWeights weights(where, kernels, element_of(x), scale, shift, w1, b1, w2, b2, w3,
                                  b3, wp, bp);
  auto p = weights.at(where, shape);
  const Shape result = result_of(p);
  Tensor half;
  if (low) half = second_map(where, "low", *low, half_of(where, result), x);
  const Tensor dense = channels_last(x);
  Tensor y = empty_map(result, x);
  if (y.numel() == 0) return y;

  p.x = dense.const_data_ptr();
  p.low = low ? half.const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  const int threads = at::get_num_threads();
  run_tasks(kernels.plan_bottleneck(p, threads), [&](int64_t begin, int64_t end, void* scratch) {
    kernels.bottleneck(p, threads, begin, end, scratch);
  });
  last_path() = {kernels.name, "bottleneck"};
  return y;
}

Tensor conv(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
            const OptionalTensor& shift, at::IntArrayRef stride, at::IntArrayRef padding, bool relu,
            const OptionalTensor& add) {
  const char* where = "hgfast::conv";
  const auto& kernels = cpu::kernels();
  const Shape shape = map_shape(where, "x", x);
  const ConvWeights weights(where, kernels, element_of(x), weight, bias, scale, shift, stride,
                            padding, relu);
  auto p = weights.at(where, shape);
  const Shape result = result_of(p);
  Tensor other;
  if (add) other = second_map(where, "add", *add, result, x);
  const Tensor dense = channels_last(x);
  Tensor y = empty_map(result, x);
  if (y.numel() == 0) return y;

  p.x = dense.const_data_ptr();
  p.add = add ? other.const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  const int threads = at::get_num_threads();
  run_tasks(kernels.plan_conv(p, threads), [&](int64_t begin, int64_t end, void* scratch) {
    kernels.conv(p, threads, begin, end, scratch);
  });
  last_path() = {kernels.name, "conv"};
  return y;
}

static_assert(cpu::UpsampleAddParams::kMaps == kUpsampledMaps);

Tensor upsample_add_maps(at::TensorList lows, const Tensor& skip, bool relu) {
  const char* where = "hgfast::upsample_add";
  const auto& kernels = cpu::kernels();
  const Shape shape = map_shape(where, "skip", skip);
  check_map_count(where, lows.size());
  cpu::UpsampleAddParams p{};
  p.element = element_of(skip);
  p.batch = shape.batch;
  p.height = shape.height;
  p.width = shape.width;
  p.channels = shape.channels;
  std::vector<Tensor> dense;
  for (const Tensor& low : lows) {
    const int shift = doublings(where, map_shape(where, "low", low), shape);
    dense.push_back(second_map(where, "low", low, reduced(where, shape, shift), skip));
    p.shift[p.maps] = shift;
    p.low[p.maps++] = dense.back().const_data_ptr();
  }
  dense.push_back(channels_last(skip));
  Tensor y = empty_map(shape, skip);
  if (y.numel() == 0) return y;

  p.relu = relu;
  p.skip = dense.back().const_data_ptr();
  p.y = y.mutable_data_ptr();
  const int threads = at::get_num_threads();
  run_tasks(kernels.plan_upsample_add(p, threads), [&](int64_t begin, int64_t end, void* scratch) {
    kernels.upsample_add(p, threads, begin, end, scratch);
  });
  last_path() = {kernels.name, "upsample_add"};
  return y;
}

Tensor upsample_add(const Tensor& low, const Tensor& skip) {
  check_shape("hgfast::upsample_add", "low", map_shape("hgfast::upsample_add", "low", low),
              half_of("hgfast::upsample_add", map_shape("hgfast::upsample_add", "skip", skip)));
  return upsample_add_maps(low, skip, false);
}

cpu::HeatmapType heatmap_type(const char* where, const Tensor& heatmaps) {
  switch (heatmaps.scalar_type()) {
    case at::kFloat:
      return cpu::HeatmapType::float32;
    case at::kBFloat16:
      return cpu::HeatmapType::bfloat16;
    case at::kHalf:
      return cpu::HeatmapType::float16;
    default:
      TORCH_CHECK_VALUE(false, where, ": expected heatmaps in float32, bfloat16 or float16, given ",
                        heatmaps.scalar_type());
  }
}

std::tuple<Tensor, Tensor> decode(const Tensor& heatmaps, std::string_view method) {
  const char* where = "hgfast::decode";
  TORCH_CHECK_VALUE(method == "quarter", where, ": expected the method \"quarter\", given \"",
                    method, "\"");
  TORCH_CHECK_VALUE(heatmaps.dim() == 4, where,
                    ": expected heatmaps of shape (batch, joints, height, width), given ",
                    heatmaps.sizes());
  TORCH_CHECK_VALUE(heatmaps.size(2) > 0 && heatmaps.size(3) > 0, where,
                    ": expected heatmaps with at least one row and column, given ",
                    heatmaps.sizes());
  const auto type = heatmap_type(where, heatmaps);
  const auto batch = heatmaps.size(0), joints = heatmaps.size(1);
  const auto options = heatmaps.options().dtype(at::kFloat);
  Tensor coords = at::empty({batch, joints, 2}, options);
  Tensor scores = at::empty({batch, joints}, options);
  if (scores.numel() == 0) return {coords, scores};

  const auto& kernels = cpu::kernels();
  const cpu::DecodeParams p{type,
                            batch,
                            joints,
                            heatmaps.size(2),
                            heatmaps.size(3),
                            heatmaps.stride(0),
                            heatmaps.stride(1),
                            heatmaps.stride(2),
                            heatmaps.stride(3),
                            heatmaps.const_data_ptr(),
                            coords.mutable_data_ptr<float>(),
                            scores.mutable_data_ptr<float>()};
  const int threads = at::get_num_threads();
  run_tasks(kernels.plan_decode(p, threads), [&](int64_t begin, int64_t end, void* scratch) {
    kernels.decode(p, threads, begin, end, scratch);
  });
  last_path() = {kernels.name, "decode"};
  return {coords, scores};
}

}  // namespace
}  // namespace hgfast

TORCH_LIBRARY_IMPL(hgfast, CPU, m) {
  m.impl("bottleneck", &hgfast::bottleneck);
  m.impl("conv", &hgfast::conv);
  m.impl("upsample_add", &hgfast::upsample_add);
  m.impl("upsample_add.maps", &hgfast::upsample_add_maps);
  m.impl("decode", &hgfast::decode);
}
