#include "cuda_hopper_bottleneck.h"

#include <c10/core/DeviceGuard.h>

#ifdef HGFAST_HOPPER

namespace hgfast {
namespace {

using at::Tensor;

// A matrix (rows, columns) as items of so many rows and columns: see HopperTape.
Tensor items(const Tensor& matrix, int64_t rows, int64_t columns) {
  const int64_t all_rows = matrix.size(0), all_columns = matrix.size(1);
  return matrix.view({all_rows / rows, rows, all_columns / columns, columns / 8, 8})
      .permute({0, 2, 3, 1, 4})
      .reshape({all_rows / rows, -1});
}

}  // namespace

CudaHopperBottleneck::CudaHopperBottleneck(const std::string& where, at::ScalarType element,
                                           const OptionalTensor& scale, const OptionalTensor& shift,
                                           const Tensor& w1, const Tensor& b1, const Tensor& w2,
                                           const Tensor& b2, const Tensor& w3, const Tensor& b3,
                                           const OptionalTensor& wp, const OptionalTensor& bp,
                                           bool relu)
    : where_(where), element_(element) {
  const at::Device device = w1.device();
  check_packable(where, "w1", device, element);
  const auto [in, middle, out] =
      check_bottleneck(where, device, scale, shift, w1, b1, w2, b2, w3, b3, wp, bp);
  params_.in = static_cast<int>(in);
  params_.middle = static_cast<int>(middle);
  params_.out = static_cast<int>(out);
  TORCH_CHECK_VALUE(cuda::hopper_bottleneck_fits(params_.in, params_.middle, params_.out), where,
                    ": expected 128 middle channels between multiples of 64, given ", in, " -> ",
                    middle, " -> ", out);
  const c10::OptionalDeviceGuard guard(device);
  using Tape = cuda::HopperTape;
  const auto matrix = [](const Tensor& weight) { return weight.to(at::kFloat).flatten(1); };
  const Tensor taps = w2.to(at::kFloat).permute({0, 2, 3, 1}).flatten(1);
  Tensor outputs = items(matrix(w3), Tape::kOut, Tape::kMiddle);
  if (wp) outputs = at::cat({outputs, items(matrix(*wp), Tape::kOut, Tape::kColumns)}, 1);
  tape_ = at::cat({items(matrix(w1), Tape::kMiddle, Tape::kColumns).flatten(),
                   items(taps, Tape::kMiddle, Tape::kColumns).flatten(), outputs.flatten()})
              .to(element);
  b1_ = pad_vector(b1, middle);
  b2_ = pad_vector(b2, middle);
  b3_ = pad_vector(wp ? b3.to(at::kFloat) + bp->to(at::kFloat) : b3, out);
  if (scale) {
    scale_ = pad_vector(*scale, in);
    shift_ = pad_vector(*shift, in);
    params_.scale = scale_.const_data_ptr<float>();
    params_.shift = shift_.const_data_ptr<float>();
  }
  params_.element = element_of(element);
  params_.project = wp.has_value();
  params_.relu = relu;
  params_.b1 = b1_.const_data_ptr<float>();
  params_.b2 = b2_.const_data_ptr<float>();
  params_.b3 = b3_.const_data_ptr<float>();
  params_.tape = tape_.const_data_ptr();
}

std::pair<Tensor, CudaHopperBottleneck::OptionalTensor> CudaHopperBottleneck::run(
    const Tensor& x, const OptionalTensor& low, bool pooled) const {
  const Shape shape = map_shape(where_, "x", x);
  TORCH_CHECK_VALUE(x.scalar_type() == element_, where_, ": expected x in ", element_, ", given ",
                    x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == tape_.device(), where_, ": expected x on ", tape_.device(),
                    ", given ", x.device());
  TORCH_CHECK_VALUE(shape.channels == params_.in, where_, ": expected x of ", params_.in,
                    " channels, as w1 has, given ", shape);
  TORCH_CHECK_VALUE(!pooled || (shape.height > 1 && shape.width > 1), where_,
                    ": expected x of at least 2x2 pixels to pool y, given ", shape);
  const Shape result = {shape.batch, params_.out, shape.height, shape.width};
  const c10::OptionalDeviceGuard guard(x.device());
  Tensor half;
  if (low) half = second_map(where_, "low", *low, half_of(where_, result), x);
  const Tensor dense = channels_last(x);
  Tensor y = empty_map(result, x);
  OptionalTensor most;
  if (pooled) most = empty_map({shape.batch, params_.out, shape.height / 2, shape.width / 2}, x);
  if (y.numel() == 0) return {y, most};

  cuda::HopperBottleneckParams p{params_, most ? most->mutable_data_ptr() : nullptr};
  p.block.batch = result.batch;
  p.block.height = p.block.x_height = result.height;
  p.block.width = p.block.x_width = result.width;
  p.block.x = dense.const_data_ptr();
  p.block.low = low ? half.const_data_ptr() : nullptr;
  p.block.y = y.mutable_data_ptr();
  const char* variant = "hopper_bottleneck";
  check_launched(where_, cuda::hopper_bottleneck(p, current_stream(x.device()), &variant));
  last_path() = {"cuda", variant};
  return {y, most};
}

std::vector<Tensor> CudaHopperBottleneck::tensors() const {
  std::vector<Tensor> tensors{tape_, b1_, b2_, b3_};
  if (scale_.defined()) tensors.insert(tensors.end(), {scale_, shift_});
  return tensors;
}

std::string CudaHopperBottleneck::obstacle(const at::Device& device, int64_t in, int64_t middle,
                                           int64_t out, [[maybe_unused]] bool project) {
  const bool fits = std::max({in, middle, out}) < INT32_MAX &&
                    cuda::hopper_bottleneck_fits(static_cast<int>(in), static_cast<int>(middle),
                                                 static_cast<int>(out));
  if (!fits)
    return c10::str("its channels (", in, ", ", middle, ", ", out,
                    ") are not 128 in the middle between multiples of 64");
  const c10::OptionalDeviceGuard guard(device);
  bool there = false;
  check_launched("bottleneck", cuda::is_hopper(there));
  return there ? "" : "this GPU is no Hopper (sm_90)";
}

}  // namespace hgfast

#endif  // HGFAST_HOPPER
