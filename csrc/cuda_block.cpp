#include "cuda_block.h"

namespace hgfast {

using at::Tensor;

void PackedBlock::keep(const BottleneckChannels& channels, const BottleneckChannels& padded,
                       const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& b1,
                       const Tensor& b2, const Tensor& b3, const OptionalTensor& bp, bool relu) {
  b1_ = pad_vector(b1, padded.middle);
  b2_ = pad_vector(b2, padded.middle);
  b3_ = pad_vector(bp ? b3.to(at::kFloat) + bp->to(at::kFloat) : b3, padded.out);
  if (scale) {
    scale_ = pad_vector(*scale, padded.in);
    shift_ = pad_vector(*shift, padded.in);
    params_.scale = scale_.const_data_ptr<float>();
    params_.shift = shift_.const_data_ptr<float>();
  }
  params_.element = element_of(element_);
  params_.in = static_cast<int>(channels.in);
  params_.middle = static_cast<int>(channels.middle);
  params_.out = static_cast<int>(channels.out);
  params_.project = bp.has_value();
  params_.relu = relu;
  params_.b1 = b1_.const_data_ptr<float>();
  params_.b2 = b2_.const_data_ptr<float>();
  params_.b3 = b3_.const_data_ptr<float>();
  params_.tape = tape_.const_data_ptr();
}

PackedBlock::Call PackedBlock::call(const Tensor& x, const OptionalTensor& low, bool pool) const {
  const Shape shape = map_shape(where_, "x", x);
  TORCH_CHECK_VALUE(x.scalar_type() == element_, where_, ": expected x in ", element_, ", given ",
                    x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == tape_.device(), where_, ": expected x on ", tape_.device(),
                    ", given ", x.device());
  TORCH_CHECK_VALUE(shape.channels == params_.in, where_, ": expected x of ", params_.in,
                    " channels, as w1 has, given ", shape);
  TORCH_CHECK_VALUE(!pool || (shape.height > 1 && shape.width > 1), where_,
                    ": expected x of at least 2x2 pixels to pool, given ", shape);
  const Shape result = {shape.batch, params_.out, pool ? shape.height / 2 : shape.height,
                        pool ? shape.width / 2 : shape.width};
  TORCH_CHECK_VALUE(shape.height * shape.width * shape.channels <= INT32_MAX &&
                        result.height * result.width * result.channels <= INT32_MAX,
                    where_, ": expected less than 2^31 elements an image, given ", shape,
                    " for a result of ", result);
  Call made{params_, {}, {}, {}};
  if (low) made.low = second_map(where_, "low", *low, half_of(where_, result), x);
  made.x = channels_last(x);
  made.y = empty_map(result, x);
  cuda::BottleneckParams& p = made.params;
  p.batch = result.batch;
  p.height = result.height;
  p.width = result.width;
  p.x_height = shape.height;
  p.x_width = shape.width;
  p.pool = pool;
  p.x = made.x.const_data_ptr();
  p.low = low ? made.low.const_data_ptr() : nullptr;
  p.y = made.y.mutable_data_ptr();
  return made;
}

std::vector<Tensor> PackedBlock::tensors() const {
  std::vector<Tensor> tensors{tape_, b1_, b2_, b3_};
  if (scale_.defined()) tensors.insert(tensors.end(), {scale_, shift_});
  return tensors;
}

}  // namespace hgfast
