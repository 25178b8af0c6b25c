#include "cuda_hopper_latency.h"

#include <c10/core/DeviceGuard.h>

#include <algorithm>

#ifdef HGFAST_HOPPER

namespace hgfast {
namespace {

using at::Tensor;

// A matrix (rows, columns) in units, of each 16 rows those of all columns: see LatencyTape, whose
// r and c are taken apart here: r = (strip, 8s, rest), c = (16s, 8s, pair, element). The result is
// (strips, units, 256).
Tensor units(const Tensor& matrix) {
  const int64_t strips = matrix.size(0) / 16, steps = matrix.size(1) / 16;
  return matrix.view({strips, 2, 8, steps, 2, 4, 2})
      .permute({0, 3, 2, 5, 1, 4, 6})
      .reshape({strips, steps, 256});
}

// The same for columns of x, padded to pairs of units: c = (32s, lane, unit, 8s, element).
Tensor input_units(const Tensor& weight) {
  const int64_t strips = weight.size(0) / 16, pairs = (weight.size(1) + 31) / 32;
  return pad_matrix(weight.flatten(1), strips * 16, pairs * 32)
      .view({strips, 2, 8, pairs, 4, 2, 2, 2})
      .permute({0, 3, 5, 2, 4, 1, 6, 7})
      .reshape({strips, 2 * pairs, 256});
}

}  // namespace

CudaLatencyBottleneck::CudaLatencyBottleneck(const std::string& where, at::ScalarType element,
                                             const OptionalTensor& scale,
                                             const OptionalTensor& shift, const Tensor& w1,
                                             const Tensor& b1, const Tensor& w2, const Tensor& b2,
                                             const Tensor& w3, const Tensor& b3,
                                             const OptionalTensor& wp, const OptionalTensor& bp,
                                             bool relu)
    : PackedBlock(where, element) {
  const at::Device device = w1.device();
  check_packable(where, "w1", device, element);
  const auto [in, middle, out] =
      check_bottleneck(where, device, scale, shift, w1, b1, w2, b2, w3, b3, wp, bp);
  const std::string reason = obstacle(device, in, middle, out, wp.has_value());
  TORCH_CHECK_VALUE(reason.empty(), where, ": ", reason);
  const c10::OptionalDeviceGuard guard(device);

  // (rows, window's row and column, channels) -> (rows, column, 16s, row, channels)
  const Tensor taps = w2.to(at::kFloat)
                          .view({middle, middle / 16, 16, 3, 3})
                          .permute({0, 4, 1, 3, 2})
                          .reshape({middle, 9 * middle});
  Tensor outputs = units(w3.to(at::kFloat).reshape({out, middle}));
  if (wp) outputs = at::cat({input_units(*wp), outputs}, 1);
  tape_ =
      at::cat({input_units(w1).flatten(), units(taps).flatten(), outputs.flatten()}).to(element);
  keep({in, middle, out}, {(in + 31) / 32 * 32, middle, out}, scale, shift, b1, b2, b3, bp, relu);
}

Tensor CudaLatencyBottleneck::run(const Tensor& x, const OptionalTensor& low, bool pool) const {
  const c10::OptionalDeviceGuard guard(x.device());
  Call made = call(x, low, pool);
  if (made.y.numel() == 0) return made.y;
  const char* variant = "latency";
  const bool programmatic = launched_.exchange(true);
  check_launched(where_,
                 cuda::latency(made.params, programmatic, current_stream(x.device()), &variant));
  last_path() = {"cuda", variant};
  return made.y;
}

std::string CudaLatencyBottleneck::obstacle(const at::Device& device, int64_t in, int64_t middle,
                                            int64_t out, bool project) {
  if (in % 16 || middle % 32 || out % 32)
    return c10::str("its channels (", in, ", ", middle, ", ", out,
                    ") are not multiples of 16, 32 and 32");
  const c10::OptionalDeviceGuard guard(device);
  bool there = false;
  check_launched("bottleneck", cuda::is_hopper(there));
  if (!there) return "this GPU is no Hopper (sm_90)";
  int shared_bytes = 0;
  check_launched("bottleneck", cuda::shared_memory_of_a_block(shared_bytes));
  const bool small = std::max({in, middle, out}) <= 1 << 16;
  cuda::BottleneckParams p{};
  p.batch = p.height = p.width = p.x_height = p.x_width = 1;
  p.in = static_cast<int>(in);
  p.middle = static_cast<int>(middle);
  p.out = static_cast<int>(out);
  p.project = project;
  cuda::LatencyVariant variant{};
  if (small && cuda::choose_latency(p, 1, shared_bytes, variant)) return "";
  return c10::str("its channels (", in, ", ", middle, ", ", out,
                  ") are too many, or cannot be split over the 2, 4 or 8 blocks of a cluster, 16 "
                  "at a time and at most 64 of the middle ones each");
}

CudaLatencySubtree::CudaLatencySubtree(const std::string& where,
                                       const std::vector<const CudaLatencyBottleneck*>& blocks,
                                       const std::vector<Step>& steps)
    : where_(where) {
  constexpr int kMost = cuda::SubtreeParams::kMostSteps;
  TORCH_CHECK_VALUE(!blocks.empty() && blocks.size() <= kMost && blocks.size() == steps.size(),
                    where, ": expected 1 to ", kMost, " blocks and a step for each, given ",
                    blocks.size(), " and ", steps.size());
  element_ = blocks[0]->element();
  const cuda::BottleneckParams& first = blocks[0]->params();
  const int middle = first.middle;
  TORCH_CHECK_VALUE((middle == 32 || middle == 64 || middle == 128) && first.out % middle == 0,
                    where,
                    ": expected 32, 64 or 128 middle channels, and a multiple of them "
                    "outside, given ",
                    first.in, " -> ", middle, " -> ", first.out);
  params_.steps = static_cast<int>(blocks.size());
  for (int i = 0; i < params_.steps; ++i) {
    const cuda::BottleneckParams& p = blocks[i]->params();
    TORCH_CHECK_VALUE(blocks[i]->element() == element_ && p.in == first.in && p.out == first.in &&
                          p.middle == middle && !p.project,
                      where,
                      ": expected blocks of the same channels and dtype, none projected, "
                      "given ",
                      p.in, " -> ", p.middle, " -> ", p.out, " in step ", i);
    const Step& step = steps[i];
    TORCH_CHECK_VALUE(step.source < i && step.low < i && step.low >= -1 &&
                          (i == 0 ? step.source == -1 : step.source >= 0),
                      where, ": expected step ", i, " to read earlier ones, given ", step.source,
                      " and ", step.low);
    params_.blocks[i] = p;
    params_.blocks[i].pool = step.pool;
    params_.source[i] = step.source;
    params_.low[i] = step.low;
    const std::vector<Tensor> more = blocks[i]->tensors();
    TORCH_CHECK_VALUE(tensors_.empty() || more[0].device() == tensors_[0].device(), where,
                      ": expected blocks on one device, given ", tensors_.empty() ? "" : "several");
    tensors_.insert(tensors_.end(), more.begin(), more.end());
  }
  const c10::OptionalDeviceGuard guard(tensors_[0].device());
  int shared_bytes = 0;
  check_launched(where, cuda::shared_memory_of_a_block(shared_bytes));
  TORCH_CHECK_VALUE(cuda::subtree_fits(params_, shared_bytes), where,
                    ": expected maps of 8x8 pixels that find room in the ", shared_bytes,
                    " bytes of a block's shared memory, given ", blocks.size(), " steps of ",
                    first.out, " channels");
}

Tensor CudaLatencySubtree::run(const Tensor& x) const {
  const Shape shape = map_shape(where_, "x", x);
  TORCH_CHECK_VALUE(x.scalar_type() == element_, where_, ": expected x in ", element_, ", given ",
                    x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == tensors_[0].device(), where_, ": expected x on ",
                    tensors_[0].device(), ", given ", x.device());
  TORCH_CHECK_VALUE(shape.channels == params_.blocks[0].in, where_, ": expected x of ",
                    params_.blocks[0].in, " channels, as w1 has, given ", shape);
  cuda::SubtreeParams p = params_;
  for (int i = 0; i < p.steps; ++i) {
    cuda::BottleneckParams& block = p.blocks[i];
    const int source = p.source[i], low = p.low[i];
    block.batch = shape.batch;
    block.x_height = source < 0 ? shape.height : p.blocks[source].height;
    block.x_width = source < 0 ? shape.width : p.blocks[source].width;
    block.height = block.pool ? block.x_height / 2 : block.x_height;
    block.width = block.pool ? block.x_width / 2 : block.x_width;
    TORCH_CHECK_VALUE(
        block.height >= 1 && block.width >= 1 && block.height <= 8 && block.width <= 8, where_,
        ": expected maps of 1x1 to 8x8 pixels, step ", i, " gives ", block.height, "x", block.width,
        " for ", shape);
    TORCH_CHECK_VALUE(low < 0 || (block.height == 2 * p.blocks[low].height &&
                                  block.width == 2 * p.blocks[low].width),
                      where_, ": expected step ", low, " to give half of the ", block.height, "x",
                      block.width, " pixels of step ", i, " for ", shape);
  }
  const cuda::BottleneckParams& last = p.blocks[p.steps - 1];
  const c10::OptionalDeviceGuard guard(x.device());
  const Tensor dense = channels_last(x);
  Tensor y = empty_map({shape.batch, last.out, last.height, last.width}, x);
  if (y.numel() == 0) return y;
  p.blocks[0].x = dense.const_data_ptr();
  p.blocks[p.steps - 1].y = y.mutable_data_ptr();
  p.programmatic = launched_.exchange(true);
  const char* variant = "subtree";
  check_launched(where_, cuda::subtree(p, current_stream(x.device()), &variant));
  last_path() = {"cuda", variant};
  return y;
}

}  // namespace hgfast

#endif  // HGFAST_HOPPER
