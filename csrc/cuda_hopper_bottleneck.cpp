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

bool fits(int64_t in, int64_t middle, int64_t out) {
  return std::max({in, middle, out}) < INT32_MAX &&
         cuda::hopper_bottleneck_fits(static_cast<int>(in), static_cast<int>(middle),
                                      static_cast<int>(out));
}

}  // namespace

CudaHopperBottleneck::CudaHopperBottleneck(const std::string& where, at::ScalarType element,
                                           const OptionalTensor& scale, const OptionalTensor& shift,
                                           const Tensor& w1, const Tensor& b1, const Tensor& w2,
                                           const Tensor& b2, const Tensor& w3, const Tensor& b3,
                                           const OptionalTensor& wp, const OptionalTensor& bp,
                                           bool relu)
    : PackedBlock(where, element) {
  const at::Device device = w1.device();
  check_packable(where, "w1", device, element);
  const auto [in, middle, out] =
      check_bottleneck(where, device, scale, shift, w1, b1, w2, b2, w3, b3, wp, bp);
  TORCH_CHECK_VALUE(fits(in, middle, out), where,
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
  keep({in, middle, out}, {in, middle, out}, scale, shift, b1, b2, b3, bp, relu);
}

std::pair<Tensor, CudaHopperBottleneck::OptionalTensor> CudaHopperBottleneck::run(
    const Tensor& x, const OptionalTensor& low, bool pooled) const {
  const c10::OptionalDeviceGuard guard(x.device());
  Call made = call(x, low, /*pool=*/false);
  const cuda::BottleneckParams& p = made.params;
  TORCH_CHECK_VALUE(!pooled || (p.height > 1 && p.width > 1), where_,
                    ": expected x of at least 2x2 pixels to pool y, given ", x.sizes());
  OptionalTensor most;
  if (pooled) most = empty_map({p.batch, p.out, p.height / 2, p.width / 2}, x);
  if (made.y.numel() == 0) return {made.y, most};
  const char* variant = "hopper_bottleneck";
  check_launched(where_, cuda::hopper_bottleneck({p, most ? most->mutable_data_ptr() : nullptr},
                                                 current_stream(x.device()), &variant));
  last_path() = {"cuda", variant};
  return {made.y, most};
}

std::string CudaHopperBottleneck::obstacle(const at::Device& device, int64_t in, int64_t middle,
                                           int64_t out, [[maybe_unused]] bool project) {
  if (!fits(in, middle, out))
    return c10::str("its channels (", in, ", ", middle, ", ", out,
                    ") are not 128 in the middle between multiples of 64");
  const c10::OptionalDeviceGuard guard(device);
  bool there = false;
  check_launched("bottleneck", cuda::is_hopper(there));
  return there ? "" : "this GPU is no Hopper (sm_90)";
}

}  // namespace hgfast

#endif  // HGFAST_HOPPER
