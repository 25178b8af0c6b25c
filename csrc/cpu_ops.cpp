// The ops on a CPU: Tensor -> parameters -> kernel. Each call packs its weights afresh: right,
// not fastest. What runs one network again and again is CpuPlan (cpu_plan.h).
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
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

Tensor bottleneck(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                  const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                  const Tensor& w3, const Tensor& b3, const OptionalTensor& wp,
                  const OptionalTensor& bp, const OptionalTensor& low, bool relu) {
  const char* where = "hgfast::bottleneck";
  const auto& kernels = cpu::kernels();
  const Shape shape = map_shape(where, "x", x);
  const BottleneckWeights weights(where, kernels, precision_of(x), scale, shift, w1, b1, w2, b2, w3,
                                  b3, wp, bp, relu);
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
            const OptionalTensor& add, at::IntArrayRef dilation, bool relu_sum) {
  const char* where = "hgfast::conv";
  const auto& kernels = cpu::kernels();
  const Shape shape = map_shape(where, "x", x);
  const ConvWeights weights(where, kernels, precision_of(x), weight, bias, scale, shift, stride,
                            padding, dilation, relu, relu_sum);
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

// The convolution of any shape, behind a normalisation in PyTorch. As in the GPU's kernel, the
// normalised image and the weights are rounded to the result's dtype.
Tensor stem(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
            const OptionalTensor& shift, std::optional<at::ScalarType> dtype) {
  const at::AutoDispatchBelowADInplaceOrView no_gradient;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const char* where = "hgfast::stem";
  check_image(where, x);
  check_stem(where, x.device(), weight, bias, scale, shift);
  const at::ScalarType type = stem_dtype(x, dtype);
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, where,
                    ": expected a result in float32, bfloat16 or float16, asked for ", type);
  Tensor t =
      x.to(at::kFloat, /*non_blocking=*/false, /*copy=*/false, at::MemoryFormat::ChannelsLast);
  const auto channels = [](const Tensor& v) { return v.to(at::kFloat).view({1, -1, 1, 1}); };
  if (scale) t = at::addcmul(channels(*shift), t, channels(*scale));
  // There are no kernels of float16. Its products are exact in float32.
  const at::ScalarType inside = type == at::kHalf ? at::kFloat : type;
  const std::vector<int64_t> two(2, 2), three(2, 3), one(2, 1);
  const Tensor y = conv(t.to(type).to(inside), weight.to(type).to(inside), bias, {}, {}, two, three,
                        /*relu=*/true, {}, one, /*relu_sum=*/false);
  last_path() = {cpu::kernels().name, "stem"};
  return y.to(type);
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

using cpu::DecodeMethod;

constexpr std::pair<const char*, DecodeMethod> kDecodeMethods[] = {
    {"argmax", DecodeMethod::argmax},
    {"quarter", DecodeMethod::quarter},
    {"newell", DecodeMethod::newell},
    {"princeton", DecodeMethod::princeton},
    {"msra", DecodeMethod::msra},
    {"dark", DecodeMethod::dark},
    {"udp", DecodeMethod::udp},
    {"megvii", DecodeMethod::megvii},
    {"softargmax", DecodeMethod::softargmax},
};

// Whether a method starts from a cell, so that several peaks can be refined.
bool refines_a_cell(DecodeMethod method) {
  return method != DecodeMethod::megvii && method != DecodeMethod::softargmax;
}

DecodeMethod decode_method(const char* where, std::string_view name, bool topk) {
  std::string known;
  for (const auto& [other, method] : kDecodeMethods) {
    if (topk && !refines_a_cell(method)) continue;
    if (name == other) return method;
    known += std::string(known.empty() ? "" : ", ") + other;
  }
  TORCH_CHECK_VALUE(false, where, ": expected a method out of ", known, ", given \"", name, "\"");
}

cpu::Heatmaps heatmaps_of(const Tensor& maps) {
  return {maps.const_data_ptr(), maps.stride(0), maps.stride(1), maps.stride(2), maps.stride(3)};
}

// The weights of the Gaussian from the middle outwards, as reference.gaussian_taps has them.
std::vector<float> gaussian_taps(int64_t blur) {
  const auto normed = [](const std::vector<double>& taps) {
    double rest = 0;
    for (size_t i = 1; i < taps.size(); ++i) rest += taps[i];
    std::vector<float> result;
    for (const double tap : taps) result.push_back(static_cast<float>(tap / (taps[0] + 2 * rest)));
    return result;
  };
  switch (blur) {
    case 3:
      return normed({2, 1});
    case 5:
      return normed({6, 4, 1});
    case 7:
      return normed({36, 28, 14, 4});
    case 9:
      return normed({60, 51, 30, 13, 4});
  }
  const double sigma = 0.3 * (static_cast<double>(blur - 1) / 2 - 1) + 0.8;
  std::vector<double> taps;
  for (int64_t i = 0; i <= blur / 2; ++i)
    taps.push_back(std::exp(-static_cast<double>(i * i) / (2 * sigma * sigma)));
  return normed(taps);
}

// What both overloads take beside the heatmaps and the method.
struct DecodeOptions {
  const OptionalTensor& flipped;
  at::IntArrayRef joints;
  bool shift, mean;
  const OptionalTensor& matrix;
  double origin_x, origin_y;
  bool truncate;
  int64_t blur;
};

void check_flipped(const char* where, const Tensor& flipped, const Tensor& heatmaps,
                   at::IntArrayRef joints) {
  TORCH_CHECK_VALUE(flipped.sizes() == heatmaps.sizes() &&
                        flipped.scalar_type() == heatmaps.scalar_type() &&
                        flipped.device() == heatmaps.device(),
                    where, ": expected flipped like the heatmaps, ", heatmaps.sizes(), " ",
                    heatmaps.scalar_type(), " on ", heatmaps.device(), ", given ", flipped.sizes(),
                    " ", flipped.scalar_type(), " on ", flipped.device());
  const auto count = heatmaps.size(1);
  TORCH_CHECK_VALUE(static_cast<int64_t>(joints.size()) == count, where, ": expected ", count,
                    " joints, one per map, with flipped, given ", joints.size());
  for (const auto joint : joints)
    TORCH_CHECK_VALUE(0 <= joint && joint < count, where, ": expected joints from 0 to ", count - 1,
                      ", given ", joint);
}

void check_matrix(const char* where, const Tensor& matrix, const Tensor& heatmaps) {
  TORCH_CHECK_VALUE(matrix.dim() == 3 && matrix.size(0) == heatmaps.size(0) &&
                        matrix.size(1) == 2 && matrix.size(2) == 3,
                    where, ": expected matrix of shape [", heatmaps.size(0), ", 2, 3], given ",
                    matrix.sizes());
  TORCH_CHECK_VALUE(matrix.scalar_type() == at::kDouble, where,
                    ": expected matrix in float64, given ", matrix.scalar_type());
  TORCH_CHECK_VALUE(matrix.device() == heatmaps.device(), where, ": expected matrix on ",
                    heatmaps.device(), ", given ", matrix.device());
}

// k = 0: one joint per map, and the results have no dimension of peaks.
std::tuple<Tensor, Tensor> decode_maps(const char* where, const Tensor& heatmaps,
                                       std::string_view method, int64_t k, int64_t window,
                                       const DecodeOptions& options, double beta) {
  cpu::DecodeParams p{};
  p.method = decode_method(where, method, k > 0);
  TORCH_CHECK_VALUE(heatmaps.dim() == 4, where,
                    ": expected heatmaps of shape (batch, joints, height, width), given ",
                    heatmaps.sizes());
  TORCH_CHECK_VALUE(heatmaps.size(2) > 0 && heatmaps.size(3) > 0, where,
                    ": expected heatmaps with at least one row and column, given ",
                    heatmaps.sizes());
  p.type = heatmap_type(where, heatmaps);
  if (options.flipped) check_flipped(where, *options.flipped, heatmaps, options.joints);
  if (options.matrix) check_matrix(where, *options.matrix, heatmaps);
  TORCH_CHECK_VALUE(options.blur >= 3 && options.blur % 2 == 1, where,
                    ": expected an odd blur of at least 3 cells, given ", options.blur);
  TORCH_CHECK_VALUE(beta > 0 && std::isfinite(beta), where,
                    ": expected a positive, finite beta, given ", beta);

  p.batch = heatmaps.size(0);
  p.joints = heatmaps.size(1);
  p.height = heatmaps.size(2);
  p.width = heatmaps.size(3);
  at::DimVector shape{p.batch, p.joints};
  if (k) shape.push_back(k);
  Tensor scores = at::empty(shape, heatmaps.options().dtype(at::kFloat));
  shape.push_back(2);
  Tensor coords = at::empty(shape, scores.options());
  if (scores.numel() == 0) return {coords, scores};

  p.maps = heatmaps_of(heatmaps);
  if (options.flipped) p.flipped = heatmaps_of(*options.flipped);
  p.mirror = options.joints.data();
  p.shift = options.shift;
  p.mean = options.mean;
  Tensor matrix;
  if (options.matrix) {
    matrix = options.matrix->contiguous();
    p.matrix = matrix.const_data_ptr<double>();
  }
  p.origin_x = options.origin_x;
  p.origin_y = options.origin_y;
  p.truncate = options.truncate;
  std::vector<float> taps;
  if (p.method == DecodeMethod::dark || p.method == DecodeMethod::udp ||
      p.method == DecodeMethod::megvii) {
    taps = gaussian_taps(options.blur);
    p.taps = taps.data();
    // Taps that reach from every cell across both borders only add zeros.
    p.reach = std::min(options.blur / 2, std::max(p.height, p.width) - 1);
  }
  p.beta = beta;
  p.k = k;
  p.window = window;
  p.coords = coords.mutable_data_ptr<float>();
  p.scores = scores.mutable_data_ptr<float>();

  const auto& kernels = cpu::kernels();
  const int threads = at::get_num_threads();
  run_tasks(kernels.plan_decode(p, threads), [&](int64_t begin, int64_t end, void* scratch) {
    kernels.decode(p, threads, begin, end, scratch);
  });
  last_path() = {kernels.name, "decode"};
  return {coords, scores};
}

std::tuple<Tensor, Tensor> decode(const Tensor& heatmaps, std::string_view method,
                                  const OptionalTensor& flipped, at::IntArrayRef joints, bool shift,
                                  bool mean, const OptionalTensor& matrix, double origin_x,
                                  double origin_y, bool truncate, int64_t blur, double beta) {
  return decode_maps("hgfast::decode", heatmaps, method, 0, 0,
                     {flipped, joints, shift, mean, matrix, origin_x, origin_y, truncate, blur},
                     beta);
}

std::tuple<Tensor, Tensor> decode_topk(const Tensor& heatmaps, std::string_view method, int64_t k,
                                       int64_t window, const OptionalTensor& flipped,
                                       at::IntArrayRef joints, bool shift, bool mean,
                                       const OptionalTensor& matrix, double origin_x,
                                       double origin_y, bool truncate, int64_t blur) {
  const char* where = "hgfast::decode.topk";
  TORCH_CHECK_VALUE(k >= 1, where, ": expected k of at least 1, given ", k);
  TORCH_CHECK_VALUE(window == 3 || window == 5, where, ": expected a window of 3 or 5, given ",
                    window);
  return decode_maps(where, heatmaps, method, k, window,
                     {flipped, joints, shift, mean, matrix, origin_x, origin_y, truncate, blur}, 1);
}

}  // namespace
}  // namespace hgfast

TORCH_LIBRARY_IMPL(hgfast, CPU, m) {
  m.impl("bottleneck", &hgfast::bottleneck);
  m.impl("conv", &hgfast::conv);
  m.impl("stem", &hgfast::stem);
  m.impl("upsample_add", &hgfast::upsample_add);
  m.impl("upsample_add.maps", &hgfast::upsample_add_maps);
  m.impl("decode", &hgfast::decode);
  m.impl("decode.topk", &hgfast::decode_topk);
}
