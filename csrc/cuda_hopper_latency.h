// The residual block's kernel for few pixels on Hopper, with its weights packed: as CudaBottleneck
// in cuda_binding.h.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cuda/hopper_latency.h"
#include "cuda_block.h"

namespace hgfast {

class CudaLatencyBottleneck : public PackedBlock {
 public:
  CudaLatencyBottleneck(const std::string& where, at::ScalarType element,
                        const OptionalTensor& scale, const OptionalTensor& shift,
                        const at::Tensor& w1, const at::Tensor& b1, const at::Tensor& w2,
                        const at::Tensor& b2, const at::Tensor& w3, const at::Tensor& b3,
                        const OptionalTensor& wp, const OptionalTensor& bp, bool relu);

  // x: (batch, in, height, width) in `element`, any strides; low: (batch, out, height / 2,
  // width / 2), or none. With pool, the block sees the 2x2 maximum of x. The result is
  // channels_last.
  at::Tensor run(const at::Tensor& x, const OptionalTensor& low, bool pool) const;

  // Why the kernel does not take a block of these channels on this device, in words; "" if it does.
  static std::string obstacle(const at::Device& device, int64_t in, int64_t middle, int64_t out,
                              bool project);

 private:
  // A launch reads the weights before the kernel in front of it has ended, which the first time may
  // be the one that packs them. So the first launch waits for that one as any other does.
  mutable std::atomic<bool> launched_{false};
};

// A chain of such blocks on maps of at most 8x8 pixels, in one launch: what lies below 16x16 in an
// hourglass. Immutable.
class CudaLatencySubtree {
 public:
  // What a step reads, by the number of an earlier step (-1: x, in the first alone), whether it
  // pools that, and whose result it adds upsampled (-1: nobody's).
  struct Step {
    int source;
    bool pool;
    int low;
  };

  // A block for each step; the last step's result is the chain's.
  CudaLatencySubtree(const std::string& where, const std::vector<const CudaLatencyBottleneck*>&,
                     const std::vector<Step>&);

  // x: (batch, channels, height, width) as for a block. The result is channels_last.
  at::Tensor run(const at::Tensor& x) const;

  std::vector<at::Tensor> tensors() const { return tensors_; }

 private:
  std::string where_;
  at::ScalarType element_;
  cuda::SubtreeParams params_{};  // all but the maps and their sizes
  std::vector<at::Tensor> tensors_;
  mutable std::atomic<bool> launched_{false};  // as in CudaLatencyBottleneck
};

}  // namespace hgfast
