// What the bindings of every device share: shapes, checks, and which kernel ran.
//
// Every check begins its message with `where`, the op or the plan's step that it speaks of.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstdint>
#include <optional>
#include <ostream>
#include <string>

namespace hgfast {

// The kernel that ran last in this thread: "<instruction set>/<op>" or "cuda/<instance>", "" before
// the first.
struct Path {
  const char* where = nullptr;
  const char* kernel = nullptr;
  std::string text() const { return where ? std::string(where) + "/" + kernel : std::string(); }
};
inline Path& last_path() {
  static thread_local Path path;
  return path;
}

// A map's shape. Whatever its strides, PyTorch writes it (batch, channels, height, width).
struct Shape {
  int64_t batch, channels, height, width;

  int64_t count() const { return batch * channels * height * width; }
  std::array<int64_t, 4> sizes() const { return {batch, channels, height, width}; }
  bool operator==(const Shape& other) const { return sizes() == other.sizes(); }
};

inline std::ostream& operator<<(std::ostream& stream, const Shape& shape) {
  return stream << at::IntArrayRef(shape.sizes());
}

inline void check_shape(const std::string& where, const char* name, const Shape& given,
                        const Shape& expected) {
  TORCH_CHECK_VALUE(given == expected, where, ": expected ", name, " of shape ", expected,
                    ", given ", given);
}

// The shape of a feature map: 4-D, not empty but for its batch.
inline Shape shape_of(const std::string& where, const char* name, const at::Tensor& map) {
  TORCH_CHECK_VALUE(map.dim() == 4, where, ": expected ", name,
                    " of shape (batch, channels, height, width), given ", map.sizes());
  TORCH_CHECK_VALUE(map.size(1) > 0 && map.size(2) > 0 && map.size(3) > 0, where, ": expected ",
                    name, " with at least one channel, row and column, given ", map.sizes());
  return {map.size(0), map.size(1), map.size(2), map.size(3)};
}

// A weight on the device where its kernel runs.
inline void check_weight(const std::string& where, const char* name, const at::Tensor& tensor,
                         at::IntArrayRef expected, const at::Device& device) {
  TORCH_CHECK_VALUE(tensor.device() == device, where, ": expected ", name, " on ", device,
                    ", given ", tensor.device());
  const auto type = tensor.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, where,
                    ": expected ", name, " in float32, bfloat16 or float16, given ", type);
  TORCH_CHECK_VALUE(tensor.sizes() == expected, where, ": expected ", name, " of shape ", expected,
                    ", given ", tensor.sizes());
}

// The folded BatchNorm before a block or a convolution: both vectors or neither.
inline void check_norm(const std::string& where, const at::Device& device,
                       const std::optional<at::Tensor>& scale,
                       const std::optional<at::Tensor>& shift, int64_t channels) {
  TORCH_CHECK_VALUE(scale.has_value() == shift.has_value(), where,
                    ": expected both scale and shift or neither, given only ",
                    scale.has_value() ? "scale" : "shift");
  if (!scale) return;
  check_weight(where, "scale", *scale, {channels}, device);
  check_weight(where, "shift", *shift, {channels}, device);
}

// A bottleneck's channels, after all its weights were checked.
struct BottleneckChannels {
  int64_t in, middle, out;
};
inline BottleneckChannels check_bottleneck(
    const std::string& where, const at::Device& device, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, const at::Tensor& w1, const at::Tensor& b1,
    const at::Tensor& w2, const at::Tensor& b2, const at::Tensor& w3, const at::Tensor& b3,
    const std::optional<at::Tensor>& wp, const std::optional<at::Tensor>& bp) {
  TORCH_CHECK_VALUE(w1.dim() == 4 && w3.dim() == 4, where,
                    ": expected w1 of shape (middle, in, 1, 1) and w3 of shape "
                    "(out, middle, 1, 1), given ",
                    w1.sizes(), " and ", w3.sizes());
  const int64_t in = w1.size(1), middle = w1.size(0), out = w3.size(0);
  TORCH_CHECK_VALUE(in > 0 && middle > 0 && out > 0, where,
                    ": expected at least one channel everywhere, given w1 of shape ", w1.sizes(),
                    " and w3 of shape ", w3.sizes());
  check_norm(where, device, scale, shift, in);
  check_weight(where, "w1", w1, {middle, in, 1, 1}, device);
  check_weight(where, "b1", b1, {middle}, device);
  check_weight(where, "w2", w2, {middle, middle, 3, 3}, device);
  check_weight(where, "b2", b2, {middle}, device);
  check_weight(where, "w3", w3, {out, middle, 1, 1}, device);
  check_weight(where, "b3", b3, {out}, device);
  TORCH_CHECK_VALUE(wp.has_value() == bp.has_value(), where,
                    ": expected both wp and bp or neither, given only ",
                    wp.has_value() ? "wp" : "bp");
  TORCH_CHECK_VALUE(wp.has_value() || in == out, where,
                    ": expected a projection (wp, bp) where the channels change, given none for ",
                    in, " -> ", out);
  if (wp) {
    check_weight(where, "wp", *wp, {out, in, 1, 1}, device);
    check_weight(where, "bp", *bp, {out}, device);
  }
  return {in, middle, out};
}

// A setting for height and width.
inline void check_pair(const std::string& where, const char* names, at::IntArrayRef pair,
                       int64_t least) {
  TORCH_CHECK_VALUE(pair.size() == 2 && pair[0] >= least && pair[1] >= least, where,
                    ": expected two ", names, " of at least ", least, ", given ", pair);
}

// A convolution's weights and settings.
inline void check_conv(const std::string& where, const at::Device& device, const at::Tensor& weight,
                       const at::Tensor& bias, const std::optional<at::Tensor>& scale,
                       const std::optional<at::Tensor>& shift, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation) {
  TORCH_CHECK_VALUE(weight.dim() == 4, where,
                    ": expected weight of shape (out, in, kernel height, kernel width), given ",
                    weight.sizes());
  TORCH_CHECK_VALUE(weight.numel() > 0, where, ": expected a weight that is not empty, given ",
                    weight.sizes());
  check_weight(where, "weight", weight, weight.sizes(), device);
  check_weight(where, "bias", bias, {weight.size(0)}, device);
  check_norm(where, device, scale, shift, weight.size(1));
  check_pair(where, "strides", stride, 1);
  check_pair(where, "paddings", padding, 0);
  check_pair(where, "dilations", dilation, 1);
}

inline void check_conv_input(const std::string& where, const Shape& x, int64_t channels,
                             at::IntArrayRef kernel, at::IntArrayRef padding,
                             at::IntArrayRef dilation) {
  TORCH_CHECK_VALUE(x.channels == channels, where, ": expected x of ", channels,
                    " channels, as the weight has, given ", x);
  const int64_t height = (kernel[0] - 1) * dilation[0] + 1;
  const int64_t width = (kernel[1] - 1) * dilation[1] + 1;
  TORCH_CHECK_VALUE(x.height + 2 * padding[0] >= height && x.width + 2 * padding[1] >= width, where,
                    ": expected x, with its padding, to be at least as large as the kernel of ",
                    height, "x", width, ", given ", x);
}

// The image's channels and the kernel of a stem.
constexpr int64_t kImageChannels = 3, kStemKernel = 7;

// A stem's weights: how many channels it makes.
inline int64_t check_stem(const std::string& where, const at::Device& device,
                          const at::Tensor& weight, const at::Tensor& bias,
                          const std::optional<at::Tensor>& scale,
                          const std::optional<at::Tensor>& shift) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(0) > 0, where,
                    ": expected weight of shape (out, 3, 7, 7), given ", weight.sizes());
  check_weight(where, "weight", weight, {weight.size(0), kImageChannels, kStemKernel, kStemKernel},
               device);
  check_weight(where, "bias", bias, {weight.size(0)}, device);
  check_norm(where, device, scale, shift, kImageChannels);
  return weight.size(0);
}

// An image, as a stem takes it: its shape.
inline Shape check_image(const std::string& where, const at::Tensor& x) {
  const auto type = x.scalar_type();
  TORCH_CHECK_VALUE(
      type == at::kByte || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, where,
      ": expected x in uint8, float32, bfloat16 or float16, given ", type);
  const Shape shape = shape_of(where, "x", x);
  TORCH_CHECK_VALUE(shape.channels == kImageChannels, where,
                    ": expected x of shape (batch, 3, height, width), given ", shape);
  return shape;
}

// The dtype of a stem's result: that of the image where it is not told, and bfloat16 of uint8.
inline at::ScalarType stem_dtype(const at::Tensor& x, std::optional<at::ScalarType> dtype) {
  if (dtype) return *dtype;
  return x.scalar_type() == at::kByte ? at::kBFloat16 : x.scalar_type();
}

// With a kernel of 7, a stride of 2 and a padding of 3.
inline Shape stem_shape(const Shape& image, int64_t out) {
  return {image.batch, out, (image.height + 1) / 2, (image.width + 1) / 2};
}

// A transposed convolution's weight and settings.
inline void check_conv_transpose(const std::string& where, const at::Device& device,
                                 const at::Tensor& weight, const at::Tensor& bias,
                                 at::IntArrayRef stride, at::IntArrayRef padding,
                                 at::IntArrayRef output_padding) {
  TORCH_CHECK_VALUE(weight.dim() == 4, where,
                    ": expected weight of shape (in, out, kernel height, kernel width), given ",
                    weight.sizes());
  TORCH_CHECK_VALUE(weight.numel() > 0, where, ": expected a weight that is not empty, given ",
                    weight.sizes());
  check_weight(where, "weight", weight, weight.sizes(), device);
  check_weight(where, "bias", bias, {weight.size(1)}, device);
  check_pair(where, "strides", stride, 1);
  check_pair(where, "paddings", padding, 0);
  check_pair(where, "output paddings", output_padding, 0);
  TORCH_CHECK_VALUE(output_padding[0] < stride[0] && output_padding[1] < stride[1], where,
                    ": expected output paddings below the strides of ", stride, ", given ",
                    output_padding);
}

// What a map must be, to be enlarged `1 << shift` times onto a map of shape `full`.
inline Shape reduced(const std::string& where, const Shape& full, int shift) {
  const int64_t rest = (int64_t{1} << shift) - 1;
  TORCH_CHECK_VALUE(!(full.height & rest) && !(full.width & rest), where,
                    ": expected a height and width that are multiples of ", rest + 1,
                    " to add an upsampled map to, given ", full);
  return {full.batch, full.channels, full.height >> shift, full.width >> shift};
}
inline Shape half_of(const std::string& where, const Shape& full) {
  return reduced(where, full, 1);
}

// How many maps upsample_add takes beside the largest, and how often each may double.
constexpr int kUpsampledMaps = 4, kMostDoublings = 3;

inline void check_map_count(const std::string& where, size_t count) {
  TORCH_CHECK_VALUE(count >= 1 && count <= kUpsampledMaps, where, ": expected 1 to ",
                    kUpsampledMaps, " maps to add, given ", count);
}

// log2 of the factor by which `low` is enlarged onto a map of shape `full`.
inline int doublings(const std::string& where, const Shape& low, const Shape& full) {
  int shift = 0;
  while (shift < kMostDoublings && low.height << shift < full.height) ++shift;
  check_shape(where, "low", low, reduced(where, full, shift));
  return shift;
}

}  // namespace hgfast
