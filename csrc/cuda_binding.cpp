#include "cuda_binding.h"

#include <c10/core/DeviceGuard.h>

#include <vector>

#include "cuda_tensors.h"

namespace hgfast {
namespace {

using at::Tensor;

// A matrix in the order of the tape: see BottleneckTape in cuda/kernels.h, whose r and c are taken
// apart here: r = (chunk, group of 16, 8s, rest), c = (slice, half, 8s, pair, element).
Tensor wind(const Tensor& matrix, int64_t chunk) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  return matrix.view({rows / chunk, chunk / 16, 2, 8, columns / cuda::kSliceColumns, 2, 2, 4, 2})
      .permute({0, 4, 5, 1, 3, 7, 2, 6, 8})
      .reshape({-1});
}

}  // namespace

CudaBottleneck::CudaBottleneck(const std::string& where, at::ScalarType element,
                               const OptionalTensor& scale, const OptionalTensor& shift,
                               const Tensor& w1, const Tensor& b1, const Tensor& w2,
                               const Tensor& b2, const Tensor& w3, const Tensor& b3,
                               const OptionalTensor& wp, const OptionalTensor& bp, bool relu)
    : PackedBlock(where, element) {
  const at::Device device = w1.device();
  check_packable(where, "w1", device, element);
  const auto [in, middle, out] =
      check_bottleneck(where, device, scale, shift, w1, b1, w2, b2, w3, b3, wp, bp);
  TORCH_CHECK_VALUE(in % 16 == 0 && middle % 16 == 0 && out % 16 == 0, where,
                    ": expected channels in multiples of 16 on a GPU, given ", in, " -> ", middle,
                    " -> ", out);
  const c10::OptionalDeviceGuard guard(device);
  const cuda::BottleneckTape tape =
      cuda::bottleneck_tape(static_cast<int>(in), static_cast<int>(middle), static_cast<int>(out));

  const Tensor conv1 = pad_matrix(w1.flatten(1), tape.middle, tape.in);
  Tensor taps = at::zeros({tape.middle, 9, tape.middle}, w2.options().dtype(at::kFloat));
  taps.narrow(0, 0, middle).narrow(2, 0, middle).copy_(w2.permute({0, 2, 3, 1}).flatten(1, 2));
  Tensor conv3 = pad_matrix(w3.flatten(1), tape.out, tape.middle);
  if (wp) conv3 = at::cat({conv3, pad_matrix(wp->flatten(1), tape.out, tape.in)}, 1);
  tape_ =
      at::cat({wind(conv1, tape.chunk), wind(taps.flatten(1), tape.chunk), wind(conv3, tape.chunk)})
          .to(element);
  keep({in, middle, out}, {tape.in, tape.middle, tape.out}, scale, shift, b1, b2, b3, bp, relu);
}

Tensor CudaBottleneck::run(const Tensor& x, const OptionalTensor& low, bool pool) const {
  const c10::OptionalDeviceGuard guard(x.device());
  Call made = call(x, low, pool);
  if (made.y.numel() == 0) return made.y;
  const char* variant = "bottleneck";
  check_launched(where_, cuda::bottleneck(made.params, current_stream(x.device()), &variant));
  last_path() = {"cuda", variant};
  return made.y;
}

std::string CudaBottleneck::obstacle(const at::Device& device, int64_t in, int64_t middle,
                                     int64_t out, bool project) {
  if (in % 16 || middle % 16 || out % 16)
    return c10::str("its channels (", in, ", ", middle, ", ", out, ") are not multiples of 16");
  cuda::BottleneckParams p{};
  p.batch = p.height = p.width = p.x_height = p.x_width = 1;
  p.in = static_cast<int>(in);
  p.middle = static_cast<int>(middle);
  p.out = static_cast<int>(out);
  p.project = project;
  const c10::OptionalDeviceGuard guard(device);
  int shared_bytes = 0;
  check_launched("bottleneck", cuda::shared_memory_of_a_block(shared_bytes));
  cuda::BottleneckVariant variant{};
  if (cuda::choose_bottleneck(p, 1, shared_bytes, variant)) return "";
  return c10::str("its ", middle, " middle channels need ", variant.shared_bytes,
                  " bytes of shared memory, and this GPU has ", shared_bytes);
}

// ---- Stem ----

static_assert(kImageChannels == cuda::StemParams::kChannels);
static_assert(kStemKernel == cuda::StemParams::kKernel);

CudaStem::CudaStem(const std::string& where, at::ScalarType element, const Tensor& weight,
                   const Tensor& bias, const OptionalTensor& scale, const OptionalTensor& shift)
    : where_(where), element_(element) {
  const at::Device device = weight.device();
  check_packable(where, "weight", device, element);
  const int64_t out = check_stem(where, device, weight, bias, scale, shift);
  TORCH_CHECK_VALUE(out % 16 == 0 && out <= 64, where,
                    ": expected a multiple of 16 channels up to 64 on a GPU, given ", out);
  const c10::OptionalDeviceGuard guard(device);
  const int rows = cuda::stem_rows(static_cast<int>(out));
  const int64_t row = kStemKernel * kImageChannels;
  Tensor taps = at::zeros({out, kStemKernel, cuda::kStemRow}, weight.options().dtype(at::kFloat));
  taps.narrow(2, 0, row).copy_(weight.permute({0, 2, 3, 1}).flatten(2));
  tape_ = wind(pad_matrix(taps.flatten(1), rows, cuda::kStemColumns), rows).to(element);
  b_ = pad_vector(bias, rows);
  if (scale) {
    scale_ = pad_vector(*scale, kImageChannels);
    shift_ = pad_vector(*shift, kImageChannels);
    params_.scale = scale_.const_data_ptr<float>();
    params_.shift = shift_.const_data_ptr<float>();
  }
  params_.element = element_of(element);
  params_.out = static_cast<int>(out);
  params_.b = b_.const_data_ptr<float>();
  params_.tape = tape_.const_data_ptr();
}

Tensor CudaStem::run(const Tensor& x) const {
  const Shape shape = check_image(where_, x);
  TORCH_CHECK_VALUE(x.device() == tape_.device(), where_, ": expected x on ", tape_.device(),
                    ", given ", x.device());
  const Shape result = stem_shape(shape, params_.out);
  constexpr int64_t kMost = INT32_MAX - 64;  // see stem.cu
  TORCH_CHECK_VALUE(shape.height * shape.width * kImageChannels <= kMost, where_,
                    ": expected less than 2^31 elements an image, given ", shape);
  const c10::OptionalDeviceGuard guard(x.device());
  Tensor y = at::empty(result.sizes(), x.options().dtype(element_), at::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  const auto reach = [](const Tensor& t) {
    int64_t last = 0;
    for (const int d : {1, 2, 3}) last += (t.size(d) - 1) * t.stride(d);
    return last;
  };
  const Tensor image = reach(x) <= kMost ? x : x.contiguous();

  cuda::StemParams p = params_;
  p.pixel = pixel_of(image.scalar_type());
  p.batch = shape.batch;
  p.height = shape.height;
  p.width = shape.width;
  const auto stride = [&](int d) { return image.size(d) == 1 ? 0 : image.stride(d); };
  p.x_batch = stride(0);
  p.x_channel = stride(1);
  p.x_row = stride(2);
  p.x_column = stride(3);
  p.x = image.const_data_ptr();
  p.y = y.mutable_data_ptr();
  const char* variant = "stem";
  check_launched(where_, cuda::stem(p, current_stream(x.device()), &variant));
  last_path() = {"cuda", variant};
  return y;
}

std::vector<Tensor> CudaStem::tensors() const {
  std::vector<Tensor> tensors{tape_, b_};
  if (scale_.defined()) tensors.insert(tensors.end(), {scale_, shift_});
  return tensors;
}

// ---- Head ----

CudaHead::CudaHead(const std::string& where, at::ScalarType element, const Tensor& w1,
                   const Tensor& b1, const OptionalTensor& wh, const OptionalTensor& bh,
                   const OptionalTensor& wn, const OptionalTensor& bn)
    : where_(where), element_(element) {
  const at::Device device = w1.device();
  check_packable(where, "w1", device, element);
  TORCH_CHECK_VALUE(w1.dim() == 4, where, ": expected w1 of shape (middle, in, 1, 1), given ",
                    w1.sizes());
  const int64_t middle = w1.size(0), in = w1.size(1);
  check_weight(where, "w1", w1, {middle, in, 1, 1}, device);
  check_weight(where, "b1", b1, {middle}, device);
  const auto rows_of = [&](const char* weight, const char* bias, const OptionalTensor& w,
                           const OptionalTensor& b) -> int64_t {
    TORCH_CHECK_VALUE(w.has_value() == b.has_value(), where, ": expected both ", weight, " and ",
                      bias, " or neither");
    if (!w) return 0;
    TORCH_CHECK_VALUE(w->dim() == 4 && w->size(0) > 0, where, ": expected ", weight,
                      " of shape (rows, middle, 1, 1), given ", w->sizes());
    check_weight(where, weight, *w, {w->size(0), middle, 1, 1}, device);
    check_weight(where, bias, *b, {w->size(0)}, device);
    return w->size(0);
  };
  const int64_t joints = rows_of("wh", "bh", wh, bh), out = rows_of("wn", "bn", wn, bn);
  TORCH_CHECK_VALUE(joints || out, where,
                    ": expected heatmaps or next to be wanted, given neither");
  const std::string reason = obstacle(device, in, middle, joints, out);
  TORCH_CHECK_VALUE(reason.empty(), where, ": ", reason);
  const c10::OptionalDeviceGuard guard(device);
  const cuda::HeadTape tape = cuda::head_tape(static_cast<int>(in), static_cast<int>(middle),
                                              static_cast<int>(out), static_cast<int>(joints));

  std::vector<Tensor> parts{wind(pad_matrix(w1.flatten(1), tape.middle, tape.in), tape.chunk)};
  b1_ = pad_vector(b1, tape.middle);
  if (out) {
    parts.push_back(wind(pad_matrix(wn->flatten(1), tape.out, tape.middle), tape.chunk));
    bn_ = pad_vector(*bn, tape.out);
    params_.bn = bn_.const_data_ptr<float>();
  }
  if (joints) {
    parts.push_back(wind(pad_matrix(wh->flatten(1), tape.joints, tape.middle), cuda::kJointRows));
    bh_ = pad_vector(*bh, tape.joints);
    params_.bh = bh_.const_data_ptr<float>();
  }
  tape_ = at::cat(parts).to(element);
  params_.element = element_of(element);
  params_.in = static_cast<int>(in);
  params_.middle = static_cast<int>(middle);
  params_.joints = static_cast<int>(joints);
  params_.out = static_cast<int>(out);
  params_.b1 = b1_.const_data_ptr<float>();
  params_.tape = tape_.const_data_ptr();
}

std::tuple<CudaHead::OptionalTensor, CudaHead::OptionalTensor> CudaHead::run(
    const Tensor& y, const OptionalTensor& x) const {
  const Shape shape = map_shape(where_, "y", y);
  TORCH_CHECK_VALUE(y.scalar_type() == element_, where_, ": expected y in ", element_, ", given ",
                    y.scalar_type());
  TORCH_CHECK_VALUE(y.device() == tape_.device(), where_, ": expected y on ", tape_.device(),
                    ", given ", y.device());
  TORCH_CHECK_VALUE(shape.channels == params_.in, where_, ": expected y of ", params_.in,
                    " channels, as w1 has, given ", shape);
  TORCH_CHECK_VALUE(!x || params_.out, where_, ": expected no x where next is not wanted");
  const c10::OptionalDeviceGuard guard(y.device());
  const Shape maps{shape.batch, params_.joints, shape.height, shape.width};
  const Shape next{shape.batch, params_.out, shape.height, shape.width};
  Tensor other;
  if (x) other = second_map(where_, "x", *x, next, y);
  const Tensor dense = channels_last(y);

  cuda::HeadParams p = params_;
  p.pixels = shape.batch * shape.height * shape.width;
  p.y = dense.const_data_ptr();
  p.x = x ? other.const_data_ptr() : nullptr;
  OptionalTensor heatmaps, into_next;
  if (p.joints) {
    // The kernel writes 16 bytes at a time, also the last ones. No view: callers may write into it.
    const int64_t elements = (maps.count() + 7) / 8 * 8, row = shape.width * p.joints;
    heatmaps = at::empty({elements}, y.options())
                   .as_strided_(maps.sizes(), {shape.height * row, 1, row, p.joints});
    p.heatmaps = heatmaps->mutable_data_ptr();
  }
  if (p.out) {
    into_next = empty_map(next, y);
    p.next = into_next->mutable_data_ptr();
  }
  if (p.pixels == 0) return {heatmaps, into_next};
  const char* variant = "head";
  check_launched(where_, cuda::head(p, current_stream(y.device()), &variant));
  last_path() = {"cuda", variant};
  return {heatmaps, into_next};
}

std::vector<Tensor> CudaHead::tensors() const {
  std::vector<Tensor> tensors{tape_, b1_};
  for (const Tensor& bias : {bh_, bn_})
    if (bias.defined()) tensors.push_back(bias);
  return tensors;
}

std::string CudaHead::obstacle(const at::Device& device, int64_t in, int64_t middle, int64_t joints,
                               int64_t out) {
  if (in % 16 || middle % 16 || out % 16)
    return c10::str("its channels (", in, ", ", middle, ", ", out, ") are not multiples of 16");
  if (joints > cuda::kMostJoints)
    return c10::str("its ", joints, " heatmaps are more than ", cuda::kMostJoints);
  cuda::HeadParams p{};
  p.pixels = 1;
  p.in = static_cast<int>(in);
  p.middle = static_cast<int>(middle);
  p.joints = static_cast<int>(joints);
  p.out = static_cast<int>(out);
  const c10::OptionalDeviceGuard guard(device);
  int shared_bytes = 0;
  check_launched("head", cuda::shared_memory_of_a_block(shared_bytes));
  cuda::BottleneckVariant variant{};
  if (cuda::choose_head(p, 1, shared_bytes, variant)) return "";
  return c10::str("its ", middle, " middle channels need ", variant.shared_bytes,
                  " bytes of shared memory, and this GPU has ", shared_bytes);
}

std::string cuda_obstacle(const at::Device& device) {
  const c10::OptionalDeviceGuard guard(device);
  const cudaError_t error = cuda::runs_here();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

static_assert(cuda::UpsampleAddParams::kMaps == kUpsampledMaps);

Tensor cuda_upsample_add(at::TensorList lows, const Tensor& skip, bool relu) {
  const char* where = "hgfast::upsample_add";
  const Shape shape = map_shape(where, "skip", skip);
  check_map_count(where, lows.size());
  TORCH_CHECK_VALUE(shape.channels % 8 == 0, where,
                    ": expected channels in multiples of 8 on a GPU, given ", shape);
  const c10::OptionalDeviceGuard guard(skip.device());
  cuda::UpsampleAddParams p{};
  p.element = element_of(skip.scalar_type());
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

  p.batch = shape.batch;
  p.height = shape.height;
  p.width = shape.width;
  p.channels = static_cast<int>(shape.channels);
  p.relu = relu;
  p.skip = dense.back().const_data_ptr();
  p.y = y.mutable_data_ptr();
  check_launched(where, cuda::upsample_add(p, current_stream(skip.device())));
  last_path() = {"cuda", "upsample_add"};
  return y;
}

}  // namespace hgfast
