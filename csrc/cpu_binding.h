// What the ops (cpu_ops.cpp) and the plan (cpu_plan.cpp) share: checked and packed weights,
// shape rules, and running one kernel over its tasks.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "binding.h"
#include "cpu/kernels.h"

namespace hgfast {

constexpr size_t kAlignment = 64;  // bytes; a cache line, and what the kernels are promised

constexpr size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) & ~(kAlignment - 1); }

inline bool has_element(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16;
}

inline cpu::Element element_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat ? cpu::Element::float32 : cpu::Element::bfloat16;
}

inline at::ScalarType scalar_type(cpu::Element element) {
  return element == cpu::Element::float32 ? at::kFloat : at::kBFloat16;
}

// An op has no other say: float32 maps are multiplied as they are.
inline cpu::Precision precision_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat ? cpu::Precision::highest : cpu::Precision::medium;
}

inline int64_t bytes_of(cpu::Element element) { return element == cpu::Element::float32 ? 4 : 2; }

// The shape of a feature map that the kernels can read.
inline Shape map_shape(const std::string& where, const char* name, const at::Tensor& map) {
  TORCH_CHECK_VALUE(map.device().is_cpu(), where, ": expected ", name, " on the CPU, given ",
                    map.device());
  TORCH_CHECK_VALUE(has_element(map), where, ": expected ", name, " in float32 or bfloat16, given ",
                    map.scalar_type());
  return shape_of(where, name, map);
}

// A float32 copy that nobody else writes to.
inline at::Tensor own_floats(const at::Tensor& tensor) {
  return tensor.detach().to(at::kFloat, /*non_blocking=*/false, /*copy=*/true).contiguous();
}

// A weight in the kernels' layout. A BatchNorm's factor for each output channel is folded into it
// in float64, and rounded once.
inline at::Tensor pack_weight(const cpu::Kernels& kernels, cpu::Precision precision,
                              const at::Tensor& weight, cpu::Method method = cpu::Method::direct,
                              const std::optional<at::Tensor>& factor = std::nullopt) {
  const auto out = weight.size(0), in = weight.size(1), height = weight.size(2),
             width = weight.size(3);
  const auto bytes =
      static_cast<int64_t>(kernels.packed_bytes(precision, method, out, in, height, width));
  // What stays is allocated before what goes, or the heap would be left with holes.
  at::Tensor packed = at::empty({bytes}, at::kByte), plain = weight.detach();
  if (factor) plain = plain.to(at::kDouble) * factor->detach().to(at::kDouble).view({-1, 1, 1, 1});
  plain = plain.to(at::kFloat).contiguous();
  kernels.pack(precision, method, out, in, height, width, plain.const_data_ptr<float>(),
               packed.mutable_data_ptr());
  return packed;
}

// The weight of a 3x3 convolution with stride and dilation 1, packed for each method that a shape
// has asked for. The weight itself is not copied, since a network's are a hundred megabytes: it is
// read again when a shape asks for another method, and must not change until then.
class DenseWeight {
 public:
  DenseWeight() = default;
  DenseWeight(const at::Tensor& weight, const std::optional<at::Tensor>& factor)
      : plain_(weight.detach()), factor_(factor) {}
  explicit operator bool() const { return plain_.defined(); }

  // The method for a map of this size, and the weight for it. Not for two threads at once.
  std::pair<cpu::Method, const void*> at(const cpu::Kernels& kernels, cpu::Precision precision,
                                         int64_t height, int64_t width) const {
    const auto method = kernels.choose(precision, height, width, plain_.size(1), plain_.size(0));
    at::Tensor& packed = packed_[static_cast<size_t>(method)];
    if (!packed.defined()) packed = pack_weight(kernels, precision, plain_, method, factor_);
    return {method, packed.const_data_ptr()};
  }

 private:
  at::Tensor plain_;
  std::optional<at::Tensor> factor_;
  mutable std::array<at::Tensor, 3> packed_;  // by method
};

inline void check_factor(const std::string& where, const char* name,
                         const std::optional<at::Tensor>& factor, int64_t channels) {
  TORCH_CHECK_VALUE(!factor || (factor->dim() == 1 && factor->size(0) == channels &&
                                factor->device().is_cpu() && factor->is_floating_point()),
                    where, ": expected ", name, " of ", channels, " numbers on the CPU");
}

// A bottleneck's weights, checked and packed; the parameters lack only the maps and their sizes.
struct BottleneckWeights {
  cpu::BottleneckParams params{};
  const cpu::Kernels& kernels;
  std::array<at::Tensor, 9> owned;
  DenseWeight w2;

  BottleneckWeights(const std::string& where, const cpu::Kernels& kernels, cpu::Precision precision,
                    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
                    const at::Tensor& w1, const at::Tensor& b1, const at::Tensor& middle_weight,
                    const at::Tensor& b2, const at::Tensor& w3, const at::Tensor& b3,
                    const std::optional<at::Tensor>& wp, const std::optional<at::Tensor>& bp,
                    bool relu, const std::optional<at::Tensor>& w2_factor = std::nullopt)
      : kernels(kernels) {
    const auto [in, middle, out] =
        check_bottleneck(where, at::kCPU, scale, shift, w1, b1, middle_weight, b2, w3, b3, wp, bp);
    params.precision = precision;
    params.relu = relu;
    params.in = in;
    params.middle = middle;
    params.out = out;
    size_t next = 0;
    const auto floats = [&](const at::Tensor& tensor) {
      return (owned[next++] = own_floats(tensor)).const_data_ptr<float>();
    };
    const auto packed = [&](const at::Tensor& tensor) {
      return (owned[next++] = pack_weight(kernels, precision, tensor)).const_data_ptr();
    };
    if (scale) {
      params.scale = floats(*scale);
      params.shift = floats(*shift);
    }
    params.w1 = packed(w1);
    params.b1 = floats(b1);
    check_factor(where, "w2_factor", w2_factor, middle);
    w2 = DenseWeight(middle_weight, w2_factor);
    params.b2 = floats(b2);
    params.w3 = packed(w3);
    params.b3 = floats(b3);
    if (wp) {
      params.wp = packed(*wp);
      params.bp = floats(*bp);
    }
  }

  // The parameters for an input of this shape, of which the block sees the 2x2 maximum if `pool`;
  // if `pool_y`, it gives that of its result.
  cpu::BottleneckParams at(const std::string& where, const Shape& x, bool pool = false,
                           bool pool_y = false) const {
    TORCH_CHECK_VALUE(x.channels == params.in, where, ": expected x of ", params.in,
                      " channels, as w1 has, given ", x);
    TORCH_CHECK_VALUE(!pool || (x.height > 1 && x.width > 1), where,
                      ": expected x to be at least as large as the window of 2x2, given ", x);
    cpu::BottleneckParams p = params;
    p.pool = pool;
    p.batch = x.batch;
    p.x_height = x.height;
    p.x_width = x.width;
    p.height = pool ? x.height / 2 : x.height;
    p.width = pool ? x.width / 2 : x.width;
    p.pool_y = pool_y;
    TORCH_CHECK_VALUE(!pool_y || (p.height > 1 && p.width > 1), where,
                      ": expected a result at least as large as the window of 2x2, given x ", x);
    std::tie(p.method, p.w2) = w2.at(kernels, p.precision, p.height, p.width);
    return p;
  }
};

// A convolution's weights, likewise.
struct ConvWeights {
  cpu::ConvParams params{};
  const cpu::Kernels& kernels;
  std::array<at::Tensor, 4> owned;
  DenseWeight dense;

  ConvWeights(const std::string& where, const cpu::Kernels& kernels, cpu::Precision precision,
              const at::Tensor& weight, const at::Tensor& bias,
              const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool relu,
              bool relu_sum, const std::optional<at::Tensor>& factor = std::nullopt)
      : kernels(kernels) {
    check_conv(where, at::kCPU, weight, bias, scale, shift, stride, padding, dilation);
    check_factor(where, "factor", factor, weight.size(0));
    params.precision = precision;
    params.out = weight.size(0);
    params.in = weight.size(1);
    params.kernel_h = weight.size(2);
    params.kernel_w = weight.size(3);
    params.stride_h = stride[0];
    params.stride_w = stride[1];
    params.pad_h = padding[0];
    params.pad_w = padding[1];
    params.dilation_h = dilation[0];
    params.dilation_w = dilation[1];
    params.relu = relu;
    params.relu_sum = relu_sum;
    const auto all = [](at::IntArrayRef pair, int64_t n) { return pair[0] == n && pair[1] == n; };
    if (kernels.goes_by_lines(params)) params.method = cpu::Method::lines;
    if (params.method == cpu::Method::direct && all(weight.sizes().slice(2), 3) && all(stride, 1) &&
        all(dilation, 1)) {
      dense = DenseWeight(weight, factor);
    } else {
      owned[0] = pack_weight(kernels, precision, weight, params.method, factor);
      params.weight = owned[0].const_data_ptr();
    }
    owned[1] = own_floats(bias);
    params.bias = owned[1].const_data_ptr<float>();
    if (scale) {
      owned[2] = own_floats(*scale);
      owned[3] = own_floats(*shift);
      params.scale = owned[2].const_data_ptr<float>();
      params.shift = owned[3].const_data_ptr<float>();
    }
  }

  cpu::ConvParams at(const std::string& where, const Shape& x) const {
    check_conv_input(where, x, params.in, {params.kernel_h, params.kernel_w},
                     {params.pad_h, params.pad_w}, {params.dilation_h, params.dilation_w});
    cpu::ConvParams p = params;
    p.batch = x.batch;
    p.height = x.height;
    p.width = x.width;
    if (dense)
      std::tie(p.method, p.weight) =
          dense.at(kernels, p.precision, x.height + 2 * p.pad_h - 2, x.width + 2 * p.pad_w - 2);
    return p;
  }
};

// A head's weights, likewise; without those of the heatmaps, or of the way on, there is none.
struct HeadWeights {
  cpu::HeadParams params{};
  std::array<at::Tensor, 6> owned;

  HeadWeights(const std::string& where, const cpu::Kernels& kernels, cpu::Precision precision,
              const at::Tensor& w1, const at::Tensor& b1, const std::optional<at::Tensor>& w_maps,
              const std::optional<at::Tensor>& b_maps, const std::optional<at::Tensor>& w_next,
              const std::optional<at::Tensor>& b_next) {
    TORCH_CHECK_VALUE(w_maps || w_next, where, ": expected w_maps, w_next or both, given neither");
    params.precision = precision;
    size_t next = 0;
    const auto pack = [&](const char* name, const at::Tensor& weight, const at::Tensor& bias,
                          const void*& packed, const float*& floats) {
      check_conv(where, at::kCPU, weight, bias, std::nullopt, std::nullopt, {1, 1}, {0, 0}, {1, 1});
      TORCH_CHECK_VALUE(weight.size(2) == 1 && weight.size(3) == 1, where, ": expected ", name,
                        " of a 1x1 convolution, given the shape ", weight.sizes());
      packed = (owned[next++] = pack_weight(kernels, precision, weight)).const_data_ptr();
      floats = (owned[next++] = own_floats(bias)).const_data_ptr<float>();
    };
    pack("w1", w1, b1, params.w1, params.b1);
    params.in = w1.size(1);
    params.middle = w1.size(0);
    const auto behind = [&](const char* name, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, const void*& packed,
                            const float*& floats) -> int64_t {
      if (!weight) return 0;
      TORCH_CHECK_VALUE(bias, where, ": expected a bias with ", name);
      pack(name, *weight, *bias, packed, floats);
      TORCH_CHECK_VALUE(weight->size(1) == params.middle, where, ": expected ", name, " to read ",
                        params.middle, " channels, as w1 gives, given ", weight->size(1));
      return weight->size(0);
    };
    params.joints = behind("w_maps", w_maps, b_maps, params.w_maps, params.b_maps);
    params.out = behind("w_next", w_next, b_next, params.w_next, params.b_next);
  }

  cpu::HeadParams at(const std::string& where, const Shape& x) const {
    check_conv_input(where, x, params.in, {1, 1}, {0, 0}, {1, 1});
    cpu::HeadParams p = params;
    p.batch = x.batch;
    p.pixels = x.height * x.width;
    return p;
  }
};

// A transposed convolution's weights, likewise: those of each phase (cpu/kernels.h) packed for
// themselves.
struct ConvTransposeWeights {
  cpu::ConvTransposeParams params{};
  std::array<int64_t, 2> output_padding;
  std::array<at::Tensor, 2> owned;

  ConvTransposeWeights(const std::string& where, const cpu::Kernels& kernels,
                       cpu::Precision precision, const at::Tensor& weight, const at::Tensor& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef output_padding, bool relu, bool relu_sum)
      : output_padding{output_padding[0], output_padding[1]} {
    check_conv_transpose(where, at::kCPU, weight, bias, stride, padding, output_padding);
    params.precision = precision;
    params.in = weight.size(0);
    params.out = weight.size(1);
    params.kernel_h = weight.size(2);
    params.kernel_w = weight.size(3);
    params.stride_h = stride[0];
    params.stride_w = stride[1];
    params.pad_h = padding[0];
    params.pad_w = padding[1];
    params.relu = relu;
    params.relu_sum = relu_sum;
    std::vector<at::Tensor> phases;
    for (int64_t i = 0; i < std::min(stride[0], params.kernel_h); ++i)
      for (int64_t j = 0; j < std::min(stride[1], params.kernel_w); ++j)
        phases.push_back(pack_weight(kernels, precision,
                                     weight.detach()
                                         .slice(2, i, std::nullopt, stride[0])
                                         .slice(3, j, std::nullopt, stride[1])
                                         .flip({2, 3})
                                         .transpose(0, 1)));
    owned[0] = at::cat(phases);
    owned[1] = own_floats(bias);
    params.weight = owned[0].const_data_ptr();
    params.bias = owned[1].const_data_ptr<float>();
  }

  cpu::ConvTransposeParams at(const std::string& where, const Shape& x) const {
    TORCH_CHECK_VALUE(x.channels == params.in, where, ": expected x of ", params.in,
                      " channels, as the weight has, given ", x);
    cpu::ConvTransposeParams p = params;
    p.batch = x.batch;
    p.height = x.height;
    p.width = x.width;
    p.out_height = (x.height - 1) * p.stride_h - 2 * p.pad_h + p.kernel_h + output_padding[0];
    p.out_width = (x.width - 1) * p.stride_w - 2 * p.pad_w + p.kernel_w + output_padding[1];
    TORCH_CHECK_VALUE(p.out_height > 0 && p.out_width > 0, where,
                      ": expected x large enough for a result of at least one row and column, "
                      "given ",
                      x);
    return p;
  }
};

// A pool's settings; the parameters lack only the maps and their sizes.
struct PoolSettings {
  cpu::PoolParams params{};
  bool ceil_mode;

  PoolSettings(const std::string& where, cpu::Element element, const std::string& mode,
               at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
               bool ceil_mode, bool count_include_pad)
      : ceil_mode(ceil_mode) {
    TORCH_CHECK_VALUE(mode == "max" || mode == "avg", where,
                      ": expected the mode \"max\" or \"avg\", given \"", mode, "\"");
    check_pair(where, "kernel sizes", kernel, 1);
    check_pair(where, "strides", stride, 1);
    check_pair(where, "paddings", padding, 0);
    TORCH_CHECK_VALUE(2 * padding[0] <= kernel[0] && 2 * padding[1] <= kernel[1], where,
                      ": expected paddings of at most half the kernel of ", kernel, ", given ",
                      padding);
    params.element = element;
    params.mean = mode == "avg";
    params.count_pad = count_include_pad;
    params.kernel_h = kernel[0];
    params.kernel_w = kernel[1];
    params.stride_h = stride[0];
    params.stride_w = stride[1];
    params.pad_h = padding[0];
    params.pad_w = padding[1];
  }

  cpu::PoolParams at(const std::string& where, const Shape& x) const {
    cpu::PoolParams p = params;
    p.batch = x.batch;
    p.height = x.height;
    p.width = x.width;
    p.channels = x.channels;
    p.out_height = windows(x.height, p.kernel_h, p.stride_h, p.pad_h);
    p.out_width = windows(x.width, p.kernel_w, p.stride_w, p.pad_w);
    TORCH_CHECK_VALUE(p.out_height > 0 && p.out_width > 0, where,
                      ": expected x, with its padding, to be at least as large as the window of ",
                      p.kernel_h, "x", p.kernel_w, ", given ", x);
    return p;
  }

 private:
  int64_t windows(int64_t size, int64_t kernel, int64_t stride, int64_t pad) const {
    const int64_t room = size + 2 * pad - kernel;
    if (room < 0 && !(ceil_mode && room > -stride)) return 0;
    int64_t count = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
    // The last window begins in the map or in the padding before it.
    if (ceil_mode && (count - 1) * stride >= size + pad) --count;
    return count;
  }
};

// The shape of each kernel's result.
inline Shape result_of(const cpu::BottleneckParams& p) {
  const int64_t factor = p.pool_y ? 2 : 1;
  return {p.batch, p.out, p.height / factor, p.width / factor};
}

inline Shape result_of(const cpu::ConvParams& p) {
  const auto windows = [](int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                          int64_t dilation) {
    return (size + 2 * pad - (kernel - 1) * dilation - 1) / stride + 1;
  };
  return {p.batch, p.out, windows(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h),
          windows(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w)};
}

inline Shape result_of(const cpu::ConvTransposeParams& p) {
  return {p.batch, p.out, p.out_height, p.out_width};
}

inline Shape result_of(const cpu::PoolParams& p) {
  return {p.batch, p.channels, p.out_height, p.out_width};
}

// Memory that kernels may write to, kAlignment-aligned.
struct FreeCpu {
  void operator()(void* memory) const { c10::free_cpu(memory); }
};
using Memory = std::unique_ptr<void, FreeCpu>;
inline Memory allocate(size_t bytes) { return Memory(c10::alloc_cpu(bytes)); }

// Runs `kernel(begin, end, scratch)` over the tasks with torch's threads.
template <class Kernel>
void run_tasks(const cpu::Work& work, const Kernel& kernel) {
  at::parallel_for(0, work.tasks, 1, [&](int64_t begin, int64_t end) {
    const Memory scratch = work.scratch ? allocate(work.scratch) : nullptr;
    kernel(begin, end, scratch.get());
  });
}

}  // namespace hgfast
