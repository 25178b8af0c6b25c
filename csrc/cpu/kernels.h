// The CPU kernels' face: what a caller fills in, and what it may run.
//
// Nothing here or below knows torch: raw pointers, sizes, a task range. Every kernel splits
// its work into independent tasks (bands of rows); the caller decides which thread runs
// which range of tasks and lends each thread 64-byte-aligned scratch. One thread's tasks
// never read what another's write.
//
// The same sources are compiled once per instruction set (see cmake/kernels.cmake), each into a
// namespace of its own, and meet again in one table of functions per instruction set.
//
// Activations are dense NHWC: (batch, height, width, channels), channels innermost, stored as
// float32 or bfloat16. Products accumulate in float32 either way. NaN and infinity travel as
// they do in PyTorch, but for convolutions by tiles: those subtract neighbours from each other, so
// there infinities may become NaN, and tiles of 4x4 share their NaN.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hgfast::cpu {

enum class Element : int { float32, bfloat16 };

// How products are formed. The activations follow: bfloat16 at `medium`, else float32.
enum class Precision : int {
  highest,  // of float32 operands
  high,     // float32-grade: whatever is fastest here
  medium    // of bfloat16 operands
};

// How a convolution is computed, and what its weights are packed for: the sum over a window as it
// stands; for 3x3 windows at every pixel, Winograd's algorithm on tiles of 2x2 or 4x4 pixels of y
// (winograd.h); for few channels, the sum over windows that overlap in memory (conv.cpp).
enum class Method : int { direct, tiles2, tiles4, lines };

struct Work {
  int64_t tasks;   // independent pieces, numbered from 0
  size_t scratch;  // bytes that each thread needs, 64-byte aligned
};

// y = act(conv3(relu(b2 + conv2(relu(b1 + conv1(pre(x)))))) + b3 + shortcut)
//     [+ low, upsampled x2 by nearest neighbour]
// pre = relu(scale * x + shift) if scale, else x; act = relu if relu. conv1, conv3: 1x1; conv2:
// 3x3, padding 1. The shortcut is x (in == out channels), or project(x) + bp. The other BatchNorms
// are folded into the convolutions. With `pool`, x stands for the maximum over its 2x2 windows;
// with `pool_y`, which leaves no room for low, only that of y is kept.
struct BottleneckParams {
  Precision precision;
  Method method;  // of conv2
  bool relu, pool, pool_y;
  int64_t batch, height, width;    // of y
  int64_t in, middle, out;         // channels
  int64_t x_height, x_width;       // height and width; with pool twice as much, or one more
  const void* x;                   // (batch, x_height, x_width, in)
  const void* low;                 // (batch, height / 2, width / 2, out), or null
  void* y;                         // (batch, height, width, out), or, with pool_y, half of each
                                   // side; may not alias x or low
  const float *scale, *shift;      // (in), or null
  const void *w1, *w2, *w3, *wp;   // packed; wp null: identity shortcut
  const float *b1, *b2, *b3, *bp;  // (middle), (middle), (out), (out)
};

struct Strides {
  int64_t batch, channels, height, width;  // in elements
};

// y = act_sum(act(conv(pre(x)) + bias) [+ add]); pre = relu(scale * x + shift) if scale, else x;
// act = relu if relu, act_sum likewise. Any kernel size, stride, padding, dilation; zero padding
// applies after pre.
struct ConvParams {
  Precision precision;
  Method method;
  int64_t batch, height, width;  // of x
  int64_t in, out;               // channels
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool relu, relu_sum;
  const void* x;               // (batch, height, width, in)
  const void* add;             // like y, or null
  void* y;                     // (batch, out_height, out_width, out)
  const float *scale, *shift;  // (in), or null
  const void* weight;          // packed
  const float* bias;           // (out)
  // Where x is the caller's own map: its layout and element type. It is read as it is, rounded to
  // the activations' type: for few channels, since every block of pixels lays out anew the rows it
  // needs.
  bool as_given = false;
  Element x_element = Element::float32;
  Strides x_strides{};
};

// The transposed convolution: pixel (i, j) of x adds its products with the kernel to the pixels of
// y from (i * stride - pad, j * stride - pad) on; otherwise as above.
//
// The pixels of y whose place, plus pad, leaves the rest r when divided by the stride form a phase.
// Only every stride-th tap of the kernel, from tap r, reaches them: each phase is an ordinary
// convolution by those taps, in reverse order, and has its weight packed for itself.
struct ConvTransposeParams {
  Precision precision;
  int64_t batch, height, width;   // of x
  int64_t in, out;                // channels
  int64_t out_height, out_width;  // of y
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  bool relu, relu_sum;
  const void* x;       // (batch, height, width, in)
  const void* add;     // like y, or null
  void* y;             // (batch, out_height, out_width, out)
  const void* weight;  // packed, phase by phase: rest (0, 0), (0, 1), ...
  const float* bias;   // (out)
};

// z = relu(features(x) + b1); heatmaps = maps(z) + b_maps; next = merge(z) + b_next [+ add]: all
// 1x1. joints or out is 0 where that result is not wanted.
struct HeadParams {
  Precision precision;
  int64_t batch, pixels;            // pixels of an image
  int64_t in, middle, joints, out;  // channels
  const void* x;                    // (batch, pixels, in)
  const void* add;                  // like next, or null
  void* heatmaps;                   // (batch, pixels, joints)
  void* next;                       // (batch, pixels, out)
  const void *w1, *w_maps, *w_next;
  const float *b1, *b_maps, *b_next;
  // Where the heatmaps are the caller's own: their layout, in which rows follow each other at the
  // distance of their pixels, and their element type.
  bool as_wanted = false;
  Element maps_element = Element::float32;
  Strides maps_strides{};
};

// y = skip + every low, upsampled x1 to x8 by nearest neighbour; then relu if relu.
struct UpsampleAddParams {
  static constexpr int kMaps = 4;
  Element element;
  int64_t batch, height, width, channels;  // of skip and y: multiples of every factor
  int maps;                                // 1 to kMaps
  bool relu;
  const void* skip;
  const void* low[kMaps];  // (batch, height >> shift, width >> shift, channels)
  int shift[kMaps];        // log2 of the factor
  void* y;
};

// y = the maximum of x over windows, where NaN wins, or their mean. Every window has a pixel of x.
// The mean is over the window's pixels of x, or with count_pad over its places in the padded map.
struct PoolParams {
  Element element;
  bool mean, count_pad;
  int64_t batch, height, width, channels;  // of x
  int64_t out_height, out_width;           // of y
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  const void* x;
  void* y;
};

// y = maps one after the other in every pixel's channels [+ add].
struct ConcatParams {
  static constexpr int kMaps = 16;
  Element element;
  int64_t pixels;  // over the batch
  int maps;        // 1 to kMaps
  int64_t channels[kMaps];
  const void* x[kMaps];  // (pixels, channels[i])
  const void* add;       // like y, or null
  void* y;               // (pixels, sum of the channels)
};

// y = x in another layout, another element type, or both.
struct RelayoutParams {
  Element x_element, y_element;
  int64_t batch, channels, height, width;
  Strides from, to;
  const void* x;
  void* y;
};

// y = a + b, elementwise over `count` elements; then relu if relu.
struct AddParams {
  Element element;
  bool relu;
  int64_t count;
  const void *a, *b;
  void* y;
};

enum class HeatmapType : int { float32, bfloat16, float16 };

// How a place is found; formulas in hgfast/decoding/reference.py.
enum class DecodeMethod : int {
  argmax,
  quarter,
  newell,
  princeton,
  msra,
  dark,
  udp,
  megvii,
  softargmax
};

struct Heatmaps {
  const void* data;
  int64_t stride_b, stride_k, stride_h, stride_w;  // in elements, any
};

// Per heatmap one joint (k = 0), or its k highest peaks: coordinates and scores.
struct DecodeParams {
  HeatmapType type;
  DecodeMethod method;
  int64_t batch, joints, height, width;
  Heatmaps maps;
  Heatmaps flipped;       // of the mirrored image, to be merged with; data null: none
  const int64_t* mirror;  // (joints): the map of `flipped` that shows this joint
  bool shift, mean;       // mirrored back one column to the right; the mean, else the sum
  const double* matrix;   // (batch, 2, 3), to the image, or null
  double origin_x, origin_y;
  bool truncate;      // image coordinates
  int64_t reach;      // of the Gaussian, in cells to each side
  const float* taps;  // (reach + 1): its weights from the middle outwards
  double beta;        // of softargmax
  int64_t k, window;  // peaks: no cell of window x window exceeds them
  float* coords;      // (batch, joints, [k,] 2): x, y
  float* scores;      // (batch, joints, [k])
};

// One instruction set's kernels. `plan_*` says how the work splits for so many threads;
// the kernel runs tasks [begin, end).
struct Kernels {
  const char* name;
  const char* high;  // how Precision::high multiplies: "winograd" or "bf16x3"

  // The fastest method for a 3x3 convolution with stride and dilation 1 whose y has this size. It
  // does not depend on batch or threads: neither do the bits of a result.
  Method (*choose)(Precision, int64_t height, int64_t width, int64_t in, int64_t out);

  // Whether a convolution goes by Method::lines, whatever the size of its maps.
  bool (*goes_by_lines)(const ConvParams&);

  // A convolution's weight (out, in, kernel_h, kernel_w), float32, into the layout this
  // instruction set multiplies fastest at this precision. 64-byte aligned.
  size_t (*packed_bytes)(Precision, Method, int64_t out, int64_t in, int64_t kernel_h,
                         int64_t kernel_w);
  void (*pack)(Precision, Method, int64_t out, int64_t in, int64_t kernel_h, int64_t kernel_w,
               const float* weight, void* packed);

  Work (*plan_bottleneck)(const BottleneckParams&, int threads);
  void (*bottleneck)(const BottleneckParams&, int threads, int64_t begin, int64_t end,
                     void* scratch);
  Work (*plan_conv)(const ConvParams&, int threads);
  void (*conv)(const ConvParams&, int threads, int64_t begin, int64_t end, void* scratch);
  Work (*plan_conv_transpose)(const ConvTransposeParams&, int threads);
  void (*conv_transpose)(const ConvTransposeParams&, int threads, int64_t begin, int64_t end,
                         void* scratch);
  Work (*plan_head)(const HeadParams&, int threads);
  void (*head)(const HeadParams&, int threads, int64_t begin, int64_t end, void* scratch);
  Work (*plan_upsample_add)(const UpsampleAddParams&, int threads);
  void (*upsample_add)(const UpsampleAddParams&, int threads, int64_t begin, int64_t end,
                       void* scratch);
  Work (*plan_pool)(const PoolParams&, int threads);
  void (*pool)(const PoolParams&, int threads, int64_t begin, int64_t end, void* scratch);
  Work (*plan_concat)(const ConcatParams&, int threads);
  void (*concat)(const ConcatParams&, int threads, int64_t begin, int64_t end, void* scratch);
  Work (*plan_add)(const AddParams&, int threads);
  void (*add)(const AddParams&, int threads, int64_t begin, int64_t end, void* scratch);
  Work (*plan_relayout)(const RelayoutParams&, int threads);
  void (*relayout)(const RelayoutParams&, int threads, int64_t begin, int64_t end, void* scratch);
  Work (*plan_decode)(const DecodeParams&, int threads);
  void (*decode)(const DecodeParams&, int threads, int64_t begin, int64_t end, void* scratch);
};

// The kernels for this machine: the best instruction set it has, or the one that the
// environment variable HGFAST_CPU_ISA names (an error, in words, where it cannot run).
// Chosen once; thread-safe.
const Kernels& kernels();

// What was built, what this machine can run, best first: for `python -m hgfast info`.
struct Isa {
  const char* name;
  bool runnable;
};
int isa_list(const Isa** list);

}  // namespace hgfast::cpu
