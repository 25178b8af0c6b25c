// The CUDA kernels' face: what a caller fills in, and what it may launch.
//
// Nothing here or below knows torch: raw device pointers, sizes, a stream. A launcher only puts a
// kernel into the stream; it never allocates, never waits, and may stand in a stream capture.
// It returns cudaErrorInvalidValue where the parameters are not as described.
//
// Activations are dense NHWC: (batch, height, width, channels), channels innermost, 16-byte
// aligned, in bfloat16 or float16. Products accumulate in float32. NaN and infinity travel as they
// do in PyTorch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hgfast::cuda {

enum class Element : int { bfloat16, float16 };

// A residual block of three convolutions, 1x1 -> 3x3 (padding 1) -> 1x1:
//
//   t = pool ? 2x2 maximum of x with stride 2 : x
//   u = scale ? relu(scale * t + shift) : t
//   u = relu(w1 u + b1)
//   u = relu(w2 u + b2)
//   y = w3 u + b3 + (project ? wp t : t)
//   y = relu ? relu(y) : y
//   y = low ? y + low, upsampled x2 by nearest neighbour : y
//
// The pre-activation bottleneck has scale and shift, the post-activation one relu. BatchNorms
// behind a convolution are folded into it, and wp's bias into b3.
struct BottleneckParams {
  Element element;
  int64_t batch, height, width;  // of y
  int64_t x_height, x_width;     // of x: the same; if pool, twice as much or one more
  int in, middle, out;           // channels, multiples of 16
  bool pool, project, relu;
  const void* x;               // (batch, x_height, x_width, in)
  const void* low;             // (batch, height / 2, width / 2, out), or null
  void* y;                     // (batch, height, width, out); may not alias x or low
  const float *scale, *shift;  // (tape.in), or null
  const float *b1, *b2, *b3;   // (tape.middle), (tape.middle), (tape.out)
  const void* tape;            // all weights, in the order in which a block needs them
};

// The order of the weights on the tape. Three matrices of (rows, columns), padded with zeros:
//
//   conv1: (middle, in)
//   conv2: (middle, 9 * middle), the taps from left to right and top to bottom
//   conv3: (out, middle), and behind it, if project, wp: (out, in)
//
// Each is cut into chunks of `chunk` rows, and a chunk into slices of kSliceColumns columns. In a
// slice come the first 16 columns, then the last 16; of each, group by group, 16 rows; of a group,
// lane by lane, the 8 elements (r, c) that the lane feeds to the matrix instructions:
// r = lane / 4 + 8 * (i / 4), c = 2 * (lane % 4) + 8 * (i / 2 % 2) + i % 2 for i in 0..7.
constexpr int kSliceColumns = 32;

struct BottleneckTape {
  int chunk;            // rows
  int in, middle, out;  // padded channels
  int64_t elements(bool project) const {
    return int64_t{middle} * in + int64_t{9} * middle * middle +
           int64_t{out} * (middle + (project ? in : 0));
  }
};
BottleneckTape bottleneck_tape(int in, int middle, int out);

// cudaSuccess if this build has machine code or PTX that the current device runs.
cudaError_t runs_here();

// What a block of threads may have of shared memory on the current device.
cudaError_t shared_memory_of_a_block(int& bytes);

// One way to run a block: an instance of the kernel.
struct BottleneckVariant {
  const char* name;  // "bottleneck<bfloat16, 128, 8x16>": element, chunk, tile
  int threads;
  int64_t blocks;  // of the launch, and what each has of shared memory
  int shared_bytes;
};

// The variant for a device with so many multiprocessors and so much shared memory for one block.
// False where none fits into its shared memory; `variant` then is the one that needs the least.
bool choose_bottleneck(const BottleneckParams&, int multiprocessors, int shared_limit,
                       BottleneckVariant& variant);

// All variants, each with the most shared memory that it asks for: of a projected block, and of
// the variants for any number of channels with 256 middle channels. `blocks` is 0.
std::vector<BottleneckVariant> bottleneck_variants();

// Launches the variant that suits the current device; tells its name if asked.
cudaError_t bottleneck(const BottleneckParams&, cudaStream_t, const char** variant = nullptr);

// y = skip + sum of maps, each upsampled by nearest neighbour; then relu if relu.
struct UpsampleAddParams {
  static constexpr int kMaps = 4;
  Element element;
  int64_t batch, height, width;  // of skip and y: multiples of every factor
  int channels;                  // a multiple of 8
  int maps;                      // 1 to kMaps
  bool relu;
  const void* skip;
  const void* low[kMaps];  // (batch, height >> shift, width >> shift, channels)
  int shift[kMaps];        // log2 of the factor: 0 to 3
  void* y;
};
cudaError_t upsample_add(const UpsampleAddParams&, cudaStream_t);

// For checks and accounts: calls visit(pointer, bytes, written) for each array of a launch.
template <class Visit>
void visit_arrays(const UpsampleAddParams& p, Visit&& visit) {
  const int64_t bytes = p.batch * p.height * p.width * p.channels * 2;
  visit(p.skip, bytes, false);
  for (int i = 0; i < p.maps; ++i) visit(p.low[i], bytes >> (2 * p.shift[i]), false);
  visit(p.y, bytes, true);
}

template <class Visit>
void visit_arrays(const BottleneckParams& p, Visit&& visit) {
  const BottleneckTape tape = bottleneck_tape(p.in, p.middle, p.out);
  const int64_t pixels = p.batch * p.height * p.width;
  visit(p.x, p.batch * p.x_height * p.x_width * p.in * 2, false);
  if (p.low) visit(p.low, pixels / 4 * p.out * 2, false);
  visit(p.y, pixels * p.out * 2, true);
  if (p.scale) {
    visit(p.scale, int64_t{4} * tape.in, false);
    visit(p.shift, int64_t{4} * tape.in, false);
  }
  visit(p.b1, int64_t{4} * tape.middle, false);
  visit(p.b2, int64_t{4} * tape.middle, false);
  visit(p.b3, int64_t{4} * tape.out, false);
  visit(p.tape, tape.elements(p.project) * 2, false);
}

}  // namespace hgfast::cuda
