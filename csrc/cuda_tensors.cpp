#include "cuda_tensors.h"

#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace hgfast {

using at::Tensor;

void check_launched(const std::string& where, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, where, ": ", cudaGetErrorString(error));
}

cudaStream_t current_stream([[maybe_unused]] const at::Device& device) {
#ifdef HGFAST_EMULATE
  return nullptr;
#else
  const c10::impl::VirtualGuardImpl guard(device.type());
  return static_cast<cudaStream_t>(guard.getStream(device).native_handle());
#endif
}

cuda::Element element_of(at::ScalarType type) {
  return type == at::kBFloat16 ? cuda::Element::bfloat16 : cuda::Element::float16;
}

cuda::Pixel pixel_of(at::ScalarType type) {
  switch (type) {
    case at::kByte:
      return cuda::Pixel::uint8;
    case at::kBFloat16:
      return cuda::Pixel::bfloat16;
    case at::kHalf:
      return cuda::Pixel::float16;
    default:
      return cuda::Pixel::float32;
  }
}

// Weights are packed where they are, for products in one of two dtypes.
void check_packable(const std::string& where, const char* name, const at::Device& device,
                    at::ScalarType element) {
  TORCH_CHECK_VALUE(device.type() == kKernelDevice, where, ": expected ", name, " on ",
                    kKernelDevice, ", given ", device);
  TORCH_CHECK_VALUE(element == at::kBFloat16 || element == at::kHalf, where,
                    ": expected bfloat16 or float16, given ", element);
}

Shape map_shape(const std::string& where, const char* name, const Tensor& map) {
  TORCH_CHECK_VALUE(map.device().type() == kKernelDevice, where, ": expected ", name, " on ",
                    kKernelDevice, ", given ", map.device());
  TORCH_CHECK_VALUE(map.scalar_type() == at::kBFloat16 || map.scalar_type() == at::kHalf, where,
                    ": expected ", name, " in bfloat16 or float16, given ", map.scalar_type());
  return shape_of(where, name, map);
}

// Dense and aligned, channels innermost.
Tensor channels_last(const Tensor& map) {
  Tensor dense = map.contiguous(at::MemoryFormat::ChannelsLast);
  if (reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16)
    dense = dense.clone(at::MemoryFormat::ChannelsLast);
  return dense;
}

// A map beside the first one: of the shape it must have, of the same type, on the same device.
Tensor second_map(const std::string& where, const char* name, const Tensor& map,
                  const Shape& expected, const Tensor& first) {
  check_shape(where, name, map_shape(where, name, map), expected);
  TORCH_CHECK_VALUE(map.scalar_type() == first.scalar_type(), where, ": expected ", name, " in ",
                    first.scalar_type(), " as the first map is, given ", map.scalar_type());
  TORCH_CHECK_VALUE(map.device() == first.device(), where, ": expected ", name, " on ",
                    first.device(), " as the first map is, given ", map.device());
  return channels_last(map);
}

Tensor empty_map(const Shape& shape, const Tensor& like) {
  return at::empty(shape.sizes(), like.options(), at::MemoryFormat::ChannelsLast);
}

// (n) -> (padded), float32, a copy of its own.
Tensor pad_vector(const Tensor& vector, int64_t padded) {
  Tensor result = at::zeros({padded}, vector.options().dtype(at::kFloat));
  result.narrow(0, 0, vector.size(0)).copy_(vector);
  return result;
}

// (rows, columns) -> (padded rows, padded columns), float32.
Tensor pad_matrix(const Tensor& matrix, int64_t rows, int64_t columns) {
  Tensor result = at::zeros({rows, columns}, matrix.options().dtype(at::kFloat));
  result.narrow(0, 0, matrix.size(0)).narrow(1, 0, matrix.size(1)).copy_(matrix);
  return result;
}

}  // namespace hgfast
