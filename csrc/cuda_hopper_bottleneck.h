// The residual block's kernel for Hopper, with its weights packed: as CudaBottleneck in
// cuda_binding.h, but that the block which gives x pools it.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/hopper_bottleneck.h"
#include "cuda_block.h"

namespace hgfast {

class CudaHopperBottleneck : public PackedBlock {
 public:
  CudaHopperBottleneck(const std::string& where, at::ScalarType element,
                       const OptionalTensor& scale, const OptionalTensor& shift,
                       const at::Tensor& w1, const at::Tensor& b1, const at::Tensor& w2,
                       const at::Tensor& b2, const at::Tensor& w3, const at::Tensor& b3,
                       const OptionalTensor& wp, const OptionalTensor& bp, bool relu);

  // x: (batch, in, height, width); low: (batch, out, height / 2, width / 2), or none. Gives y
  // (batch, out, height, width) and, if asked, its 2x2 maximum with stride 2; both channels_last.
  std::pair<at::Tensor, OptionalTensor> run(const at::Tensor& x, const OptionalTensor& low,
                                            bool pooled) const;

  // Why the kernel does not take a block of these channels on this device, in words; "" if it does.
  static std::string obstacle(const at::Device& device, int64_t in, int64_t middle, int64_t out,
                              bool project);
};

}  // namespace hgfast
