// The ops on a GPU: Tensor -> parameters -> kernel, on the current stream. Each call packs its
// weights afresh: right, not fastest. What runs one network again and again packs once
// (hgfast/runtime/cuda.py). All of it may stand in a stream capture: memory comes from torch's
// allocator, and nothing waits.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "cuda_binding.h"
#ifdef HGFAST_EMULATE
#include "schemas.h"
#endif

namespace hgfast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What the ops ask torch to do has no gradient, and the dtypes that it is asked to have.
struct Inference {
  at::AutoDispatchBelowADInplaceOrView no_gradient;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

Tensor bottleneck(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                  const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                  const Tensor& w3, const Tensor& b3, const OptionalTensor& wp,
                  const OptionalTensor& bp, const OptionalTensor& low, bool relu) {
  const Inference guard;
  const CudaBottleneck block("hgfast::bottleneck", x.scalar_type(), scale, shift, w1, b1, w2, b2,
                             w3, b3, wp, bp, relu);
  return block.run(x, low, /*pool=*/false);
}

// cuDNN's convolution with pointwise kernels around it: no kernel of our own so far.
Tensor conv(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
            const OptionalTensor& shift, at::IntArrayRef stride, at::IntArrayRef padding, bool relu,
            const OptionalTensor& add, at::IntArrayRef dilation, bool relu_sum) {
  const Inference guard;
  const char* where = "hgfast::conv";
  const Shape shape = shape_of(where, "x", x);
  const auto type = x.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, where,
                    ": expected x in float32, bfloat16 or float16, given ", type);
  check_conv(where, x.device(), weight, bias, scale, shift, stride, padding, dilation);
  check_conv_input(where, shape, weight.size(1), weight.sizes().slice(2), padding, dilation);
  Tensor t = x.contiguous(at::MemoryFormat::ChannelsLast);
  if (scale) {
    const auto channels = [&](const Tensor& v) { return v.to(at::kFloat).view({1, -1, 1, 1}); };
    t = at::addcmul(channels(*shift), t.to(at::kFloat), channels(*scale))
            .relu_()
            .to(x.scalar_type());
  }
  Tensor y = at::conv2d(t, weight.to(t.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast),
                        bias.to(t.scalar_type()), stride, padding, dilation);
  if (relu) y.relu_();
  if (add) {
    TORCH_CHECK_VALUE(add->sizes() == y.sizes() && add->scalar_type() == y.scalar_type(), where,
                      ": expected add of shape ", y.sizes(), " in ", y.scalar_type(), ", given ",
                      add->sizes(), " in ", add->scalar_type());
    y.add_(*add);
  }
  if (relu_sum) y.relu_();
  last_path() = {"cuda", "conv2d"};
  return y.contiguous(at::MemoryFormat::ChannelsLast);
}

Tensor stem(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
            const OptionalTensor& shift, std::optional<at::ScalarType> dtype) {
  const Inference guard;
  const char* where = "hgfast::stem";
  check_image(where, x);
  return CudaStem(where, stem_dtype(x, dtype), weight, bias, scale, shift).run(x);
}

Tensor upsample_add(const Tensor& low, const Tensor& skip) {
  const char* where = "hgfast::upsample_add";
  check_shape(where, "low", shape_of(where, "low", low),
              half_of(where, shape_of(where, "skip", skip)));
  return cuda_upsample_add(low, skip, false);
}

void implement(torch::Library& m) {
  m.impl("bottleneck", &bottleneck);
  m.impl("conv", &conv);
  m.impl("stem", &stem);
  m.impl("upsample_add", &upsample_add);
  m.impl("upsample_add.maps", &cuda_upsample_add);
}

}  // namespace
}  // namespace hgfast

#ifdef HGFAST_EMULATE
TORCH_LIBRARY(hgfast_emulated, m) { hgfast::define_ops(m); }
TORCH_LIBRARY_IMPL(hgfast_emulated, CPU, m) { hgfast::implement(m); }
#else
TORCH_LIBRARY_IMPL(hgfast, CUDA, m) { hgfast::implement(m); }
#endif
