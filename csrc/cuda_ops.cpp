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
using NoGradient = at::AutoDispatchBelowADInplaceOrView;  // of what the ops ask torch to do

Tensor bottleneck(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& w1,
                  const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& w3,
                  const Tensor& b3, const OptionalTensor& wp, const OptionalTensor& bp,
                  const OptionalTensor& low) {
  const NoGradient guard;
  const CudaBottleneck block("hgfast::bottleneck", x.scalar_type(), scale, shift, w1, b1, w2, b2,
                             w3, b3, wp, bp, /*relu=*/false);
  return block.run(x, low, /*pool=*/false);
}

// cuDNN's convolution with pointwise kernels around it: no kernel of our own so far.
Tensor conv(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
            const OptionalTensor& shift, at::IntArrayRef stride, at::IntArrayRef padding, bool relu,
            const OptionalTensor& add) {
  const NoGradient guard;
  const char* where = "hgfast::conv";
  shape_of(where, "x", x);
  TORCH_CHECK_VALUE(scale.has_value() == shift.has_value(), where,
                    ": expected both scale and shift or neither, given only ",
                    scale ? "scale" : "shift");
  Tensor t = x.contiguous(at::MemoryFormat::ChannelsLast);
  if (scale) {
    const auto channels = [&](const Tensor& v) { return v.to(at::kFloat).view({1, -1, 1, 1}); };
    t = at::addcmul(channels(*shift), t.to(at::kFloat), channels(*scale))
            .relu_()
            .to(x.scalar_type());
  }
  Tensor y = at::conv2d(t, weight.to(t.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast),
                        bias.to(t.scalar_type()), stride, padding);
  if (relu) y.relu_();
  if (add) {
    TORCH_CHECK_VALUE(add->sizes() == y.sizes() && add->scalar_type() == y.scalar_type(), where,
                      ": expected add of shape ", y.sizes(), " in ", y.scalar_type(), ", given ",
                      add->sizes(), " in ", add->scalar_type());
    y.add_(*add);
  }
  last_path() = {"cuda", "conv2d"};
  return y.contiguous(at::MemoryFormat::ChannelsLast);
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
