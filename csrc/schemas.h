// Every operator that hgfast registers, at a glance. Formulas, shapes and errors are told in
// hgfast/ops.py; the implementations are in cpu_ops.cpp and cuda_ops.cpp, decode's for a GPU in
// hgfast/decoding/cuda.py.
#pragma once

#include <torch/library.h>

#include <string>
#include <vector>

namespace hgfast {

inline void define_ops(torch::Library& m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // The bottleneck residual: three convolutions with their folded BatchNorms and ReLUs, the
  // shortcut, and optionally the upsampled sum that ends an hourglass level.
  m.def(
      "bottleneck(Tensor x, Tensor? scale, Tensor? shift, Tensor w1, Tensor b1, Tensor w2, "
      "Tensor b2, Tensor w3, Tensor b3, Tensor? wp=None, Tensor? bp=None, Tensor? low=None, "
      "bool relu=False) -> Tensor",
      tags);

  // One convolution with an optional folded BN-ReLU before; a ReLU, a sum, a ReLU after.
  m.def(
      "conv(Tensor x, Tensor weight, Tensor bias, Tensor? scale=None, Tensor? shift=None, "
      "int[2] stride=1, int[2] padding=0, bool relu=False, Tensor? add=None, int[2] dilation=1, "
      "bool relu_sum=False) -> Tensor",
      tags);

  // The 7x7 convolution with stride 2 that networks begin with, its ReLU, and the normalisation of
  // the image before it.
  m.def(
      "stem(Tensor x, Tensor weight, Tensor bias, Tensor? scale=None, Tensor? shift=None, "
      "ScalarType? dtype=None) -> Tensor",
      tags);

  // skip + low, enlarged twofold by nearest neighbour; or several maps, enlarged up to eightfold,
  // and a ReLU behind the sum.
  m.def("upsample_add(Tensor low, Tensor skip) -> Tensor", tags);
  m.def("upsample_add.maps(Tensor[] low, Tensor skip, bool relu=False) -> Tensor", tags);

  // Heatmaps to joint coordinates and scores, one or the k highest per map: merged with those of
  // the mirrored image, and mapped into the image, on the way.
  const std::string options =
      "Tensor? flipped=None, int[] joints=[], bool shift=False, bool mean=True, "
      "Tensor? matrix=None, float origin_x=0, float origin_y=0, bool truncate=False, int blur=11";
  const std::string one = "decode(Tensor heatmaps, str method, " + options + ", float beta=1)";
  const std::string several =
      "decode.topk(Tensor heatmaps, str method, int k, int window=3, " + options + ")";
  for (const std::string& arguments : {one, several})
    m.def((arguments + " -> (Tensor coords, Tensor scores)").c_str(), tags);
}

}  // namespace hgfast
