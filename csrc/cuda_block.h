// What the bindings of all kernels for a residual block share: the weights that no kernel wants in
// an order of its own, and the way from maps to a launch's parameters.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cuda_tensors.h"

namespace hgfast {

// Packed weights of a residual block, all of the maps and their sizes missing. Immutable.
class PackedBlock {
 public:
  using OptionalTensor = std::optional<at::Tensor>;

  // The packed weights, for those who keep account of streams.
  std::vector<at::Tensor> tensors() const;
  // Valid as long as tensors() live.
  const cuda::BottleneckParams& params() const { return params_; }
  at::ScalarType element() const { return element_; }

 protected:
  PackedBlock(const std::string& where, at::ScalarType element)
      : where_(where), element_(element) {}

  // All but the tape, which stands already: vectors padded with zeros to so many channels, the
  // projection's bias in conv3's.
  void keep(const BottleneckChannels& channels, const BottleneckChannels& padded,
            const OptionalTensor& scale, const OptionalTensor& shift, const at::Tensor& b1,
            const at::Tensor& b2, const at::Tensor& b3, const OptionalTensor& bp, bool relu);

  // A launch, and the maps that it reads and writes.
  struct Call {
    cuda::BottleneckParams params;
    at::Tensor x, low, y;
  };
  // Checks the maps; y is new. On the current device, which is to be x's.
  Call call(const at::Tensor& x, const OptionalTensor& low, bool pool) const;

  std::string where_;
  at::ScalarType element_;
  cuda::BottleneckParams params_{};  // all but the maps and their sizes
  at::Tensor scale_, shift_, b1_, b2_, b3_, tape_;
};

}  // namespace hgfast
