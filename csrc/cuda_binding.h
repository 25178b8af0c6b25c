// What the CUDA ops (cuda_ops.cpp) and the executor (hgfast/runtime/cuda.py) share: packed weights,
// and launching on the tensors' device and its current stream.
//
// Nothing here needs a CUDA build of torch: device and stream are asked for through torch's
// device-generic interface. So all of it is compiled everywhere; with HGFAST_EMULATE it becomes a
// binding of the emulated kernels, which take CPU tensors.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_block.h"

namespace hgfast {

// A residual block with its weights packed, for inference again and again. Immutable.
class CudaBottleneck : public PackedBlock {
 public:
  // Weights as the op takes them, on the device that will run them; `element` is bfloat16 or
  // float16. Without scale and shift, x enters conv1 as it is; with relu, the block ends in one.
  CudaBottleneck(const std::string& where, at::ScalarType element, const OptionalTensor& scale,
                 const OptionalTensor& shift, const at::Tensor& w1, const at::Tensor& b1,
                 const at::Tensor& w2, const at::Tensor& b2, const at::Tensor& w3,
                 const at::Tensor& b3, const OptionalTensor& wp, const OptionalTensor& bp,
                 bool relu);

  // x: (batch, in, height, width) in `element`, any strides; low: (batch, out, height / 2,
  // width / 2), or none. With pool, the block sees the 2x2 maximum of x. The result is
  // channels_last.
  at::Tensor run(const at::Tensor& x, const OptionalTensor& low, bool pool) const;

  // Why no kernel takes a block of these channels on this device, in words; "" if one does.
  static std::string obstacle(const at::Device& device, int64_t in, int64_t middle, int64_t out,
                              bool project);
};

// A stem (7x7, stride 2, ReLU, on an image of three channels) with its weights packed. Immutable.
class CudaStem {
 public:
  using OptionalTensor = std::optional<at::Tensor>;

  // Weights as the op takes them; `element`, bfloat16 or float16, is the result's.
  CudaStem(const std::string& where, at::ScalarType element, const at::Tensor& weight,
           const at::Tensor& bias, const OptionalTensor& scale, const OptionalTensor& shift);

  // x: (batch, 3, height, width) in uint8, float32, bfloat16 or float16, any strides, read as it
  // is. The result is channels_last.
  at::Tensor run(const at::Tensor& x) const;

  std::vector<at::Tensor> tensors() const;

 private:
  std::string where_;
  at::ScalarType element_;
  cuda::StemParams params_{};  // all but the maps and their sizes
  at::Tensor scale_, shift_, b_, tape_;
};

// The chain behind an hourglass (1x1 with ReLU, heatmaps, the way into the next stack) with its
// weights packed. Immutable.
class CudaHead {
 public:
  using OptionalTensor = std::optional<at::Tensor>;

  // w1: (middle, in, 1, 1); wh: (joints, middle, 1, 1), or none: heatmaps are not wanted; wn: (out,
  // middle, 1, 1), or none: nor is next. Biases for each. BatchNorms are folded.
  CudaHead(const std::string& where, at::ScalarType element, const at::Tensor& w1,
           const at::Tensor& b1, const OptionalTensor& wh, const OptionalTensor& bh,
           const OptionalTensor& wn, const OptionalTensor& bn);

  // y: (batch, in, height, width) in `element`, any strides; x: (batch, out, height, width), or
  // none. The heatmaps and next, channels_last; what is not wanted is none.
  std::tuple<OptionalTensor, OptionalTensor> run(const at::Tensor& y,
                                                 const OptionalTensor& x) const;

  std::vector<at::Tensor> tensors() const;

  // Why no kernel takes a head of these channels on this device, in words; "" if one does. `joints`
  // and `out` are 0 where they are not wanted.
  static std::string obstacle(const at::Device& device, int64_t in, int64_t middle, int64_t joints,
                              int64_t out);

 private:
  std::string where_;
  at::ScalarType element_;
  cuda::HeadParams params_{};  // all but the maps and their sizes
  at::Tensor b1_, bh_, bn_, tape_;
};

// Why this build has no code for a device, in words; "" if it has.
std::string cuda_obstacle(const at::Device& device);

at::Tensor cuda_upsample_add(at::TensorList lows, const at::Tensor& skip, bool relu);

}  // namespace hgfast
