// Between tensors and the parameters of kernels: what every binding of a CUDA kernel needs.
#pragma once

#include <ATen/ATen.h>

#include <string>

#include "binding.h"
#include "cuda/kernels.h"

namespace hgfast {

#ifdef HGFAST_EMULATE
constexpr auto kKernelDevice = c10::DeviceType::CPU;
#else
constexpr auto kKernelDevice = c10::DeviceType::CUDA;
#endif

void check_launched(const std::string& where, cudaError_t);
cudaStream_t current_stream(const at::Device&);
cuda::Element element_of(at::ScalarType);
cuda::Pixel pixel_of(at::ScalarType);

// Weights on the kernels' device, for bfloat16 or float16.
void check_packable(const std::string& where, const char* name, const at::Device&,
                    at::ScalarType element);
// A map's shape; it must lie on the kernels' device, in bfloat16 or float16.
Shape map_shape(const std::string& where, const char* name, const at::Tensor& map);
// Dense and aligned, channels innermost.
at::Tensor channels_last(const at::Tensor& map);
// A map beside the first one: of the shape it must have, of the same type, on the same device.
at::Tensor second_map(const std::string& where, const char* name, const at::Tensor& map,
                      const Shape& expected, const at::Tensor& first);
at::Tensor empty_map(const Shape& shape, const at::Tensor& like);

// (n) -> (padded), float32, a copy of its own.
at::Tensor pad_vector(const at::Tensor& vector, int64_t padded);
// (rows, columns) -> (padded rows, padded columns), float32.
at::Tensor pad_matrix(const at::Tensor& matrix, int64_t rows, int64_t columns);

}  // namespace hgfast
