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

// Whether they are as described.
inline bool is_sensible(const BottleneckParams& p) {
  for (const int channels : {p.in, p.middle, p.out})
    if (channels < 16 || channels % 16) return false;
  if (p.batch < 0 || p.height < 1 || p.width < 1) return false;
  const int64_t x_height = p.pool ? p.x_height / 2 : p.x_height;
  const int64_t x_width = p.pool ? p.x_width / 2 : p.x_width;
  if (x_height != p.height || x_width != p.width) return false;
  // Offsets in an image are int.
  if (p.x_height * p.x_width * p.in > INT32_MAX) return false;
  if (p.height * p.width * p.out > INT32_MAX) return false;
  if (!p.project && p.in != p.out) return false;
  if (!p.scale != !p.shift) return false;
  if (p.low && (p.height % 2 || p.width % 2)) return false;
  return p.x && p.y && p.b1 && p.b2 && p.b3 && p.tape;
}

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

// Whether the current device is a Hopper: sm_90, for which some kernels are made.
cudaError_t is_hopper(bool& there);

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

// The convolution that networks begin with, on images of three channels:
//
//   y = relu(w (scale * x + shift) + b)        7x7, stride 2, padding 3
//
// The padding is 0 behind the normalisation, so that this one cannot be folded into w.
enum class Pixel : int { uint8, bfloat16, float16, float32 };

struct StemParams {
  static constexpr int kChannels = 3, kKernel = 7;
  Element element;                              // of y and of the products
  Pixel pixel;                                  // of x
  int64_t batch, height, width;                 // of x; y is half as high and wide, rounded up
  int64_t x_batch, x_channel, x_row, x_column;  // strides in elements, at least 0
  int out;                                      // channels, a multiple of 16 up to 64
  const void* x;               // an image has less than 2^31 elements from the first to the last
  void* y;                     // (batch, (height + 1) / 2, (width + 1) / 2, out)
  const float *scale, *shift;  // (3), or null
  const float* b;              // (stem_rows(out))
  const void* tape;
  int tiles_a_block;  // the launcher's affair
};

// The tape holds w as a matrix of stem_rows(out) rows and kStemColumns columns, zeros where there
// is no weight, in the order of the bottleneck's with a chunk of all rows. The weight at row ky,
// column kx and channel c of the kernel has the column 22 ky + 3 kx + c: with 22 instead of 21 a
// kernel row begins at an even column, so that a pair of columns is a pair of neighbours in x.
constexpr int kStemRow = 22, kStemColumns = 160;
constexpr int stem_rows(int out) { return out <= 32 ? 32 : 64; }

// The chain of a pixel behind an hourglass:
//
//   z = relu(w1 y + b1)
//   heatmaps = wh z + bh
//   next = wn z + bn + x
//
// In a stacked hourglass wn is what leads the features and the heatmaps into the next stack, folded
// into one matrix.
struct HeadParams {
  Element element;
  int64_t pixels;             // of all images
  int in, middle;             // channels, multiples of 16
  int joints;                 // of heatmaps: any number up to kMostJoints, or 0: none are wanted
  int out;                    // of next: a multiple of 16, or 0: it is not wanted
  const void* y;              // (pixels, in)
  const void* x;              // (pixels, out), or null
  void* heatmaps;             // (pixels, joints), and zeros up to a multiple of 16 bytes
  void* next;                 // (pixels, out)
  const float *b1, *bn, *bh;  // (tape.middle), (tape.out), (tape.joints)
  const void* tape;
};
constexpr int kMostJoints = 128;

// The matrices w1, wn and wh one behind the other, in the order of the bottleneck's: w1 and wn in
// chunks of `chunk` rows, wh in chunks of kJointRows.
constexpr int kJointRows = 32;
struct HeadTape {
  int chunk;                    // rows
  int in, middle, out, joints;  // padded
  int64_t elements() const { return int64_t{middle} * in + int64_t{out + joints} * middle; }
};
HeadTape head_tape(int in, int middle, int out, int joints);

// Launch what suits the current device; tell its name if asked.
cudaError_t stem(const StemParams&, cudaStream_t, const char** variant = nullptr);
cudaError_t head(const HeadParams&, cudaStream_t, const char** variant = nullptr);

// All instances, as bottleneck_variants() tells them; a head's with 256 channels and 17 joints.
std::vector<BottleneckVariant> stem_variants();
std::vector<BottleneckVariant> head_variants();

// As choose_bottleneck().
bool choose_head(const HeadParams&, int multiprocessors, int shared_limit,
                 BottleneckVariant& variant);

// For checks and accounts: calls visit(pointer, bytes, written) for each array of a launch.
template <class Visit>
void visit_arrays(const UpsampleAddParams& p, Visit&& visit) {
  const int64_t bytes = p.batch * p.height * p.width * p.channels * 2;
  visit(p.skip, bytes, false);
  for (int i = 0; i < p.maps; ++i) visit(p.low[i], bytes >> (2 * p.shift[i]), false);
  visit(p.y, bytes, true);
}

template <class Visit>
void visit_arrays(const StemParams& p, Visit&& visit) {
  constexpr int kBytes[] = {1, 2, 2, 4};  // of a Pixel
  const int64_t last = (p.batch - 1) * p.x_batch + (StemParams::kChannels - 1) * p.x_channel +
                       (p.height - 1) * p.x_row + (p.width - 1) * p.x_column;
  visit(p.x, (last + 1) * kBytes[static_cast<int>(p.pixel)], false);
  visit(p.y, p.batch * ((p.height + 1) / 2) * ((p.width + 1) / 2) * p.out * 2, true);
  if (p.scale) {
    visit(p.scale, int64_t{4} * StemParams::kChannels, false);
    visit(p.shift, int64_t{4} * StemParams::kChannels, false);
  }
  visit(p.b, int64_t{4} * stem_rows(p.out), false);
  visit(p.tape, int64_t{2} * stem_rows(p.out) * kStemColumns, false);
}

template <class Visit>
void visit_arrays(const HeadParams& p, Visit&& visit) {
  const HeadTape tape = head_tape(p.in, p.middle, p.out, p.joints);
  visit(p.y, p.pixels * p.in * 2, false);
  if (p.x) visit(p.x, p.pixels * p.out * 2, false);
  if (p.joints) visit(p.heatmaps, (p.pixels * p.joints * 2 + 15) / 16 * 16, true);
  if (p.out) visit(p.next, p.pixels * p.out * 2, true);
  visit(p.b1, int64_t{4} * tape.middle, false);
  if (p.out) visit(p.bn, int64_t{4} * tape.out, false);
  if (p.joints) visit(p.bh, int64_t{4} * tape.joints, false);
  visit(p.tape, tape.elements() * 2, false);
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
