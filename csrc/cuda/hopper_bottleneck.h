// The residual block of kernels.h for Hopper's warpgroup instructions: what a caller fills in.
#pragma once

#include "kernels.h"

namespace hgfast::cuda {

// As BottleneckParams says it, with 128 middle channels, in and out multiples of 64, and no pool:
// the block that gives x pools it, and writes that beside its result.
//
//   pooled = 2x2 maximum of y with stride 2, the last row and column of odd sizes left out
//
// `tape` is another one than there, see HopperTape.
struct HopperBottleneckParams {
  BottleneckParams block;
  void* pooled;  // (batch, height / 2, width / 2, out), or null
};

// The order of the weights. Each matrix is cut into items of so many columns (of the sum) and rows
// (channels of the result); in an item come the columns in groups of 8, of a group the rows, of a
// row the 8 elements: what a matrix descriptor without swizzle describes.
//
//   conv1: items of 64 columns, 128 rows
//   conv2: for each tap, from left to right and top to bottom, two items of 64 columns, 128 rows
//   conv3: for each 64 channels of y an item of 128 columns, 64 rows; behind it, where x is
//          projected, items of 64 columns of wp, 64 rows
struct HopperTape {
  static constexpr int kMiddle = 128, kColumns = 64, kOut = 64;
  int64_t conv2, conv3, end;  // where they begin, and where the tape ends; in elements
  int64_t output;             // elements of conv3 for 64 channels of y
};
constexpr HopperTape hopper_tape(int in, int out, bool project) {
  const int64_t conv2 = int64_t{HopperTape::kMiddle} * in;
  const int64_t conv3 = conv2 + int64_t{9} * HopperTape::kMiddle * HopperTape::kMiddle;
  const int64_t output = int64_t{HopperTape::kOut} * (HopperTape::kMiddle + (project ? in : 0));
  return {conv2, conv3, conv3 + out / HopperTape::kOut * output, output};
}

// Whether the kernel computes such a block.
bool hopper_bottleneck_fits(int in, int middle, int out);

// As for the other kernels. cudaErrorNotSupported where the device is no Hopper, or its driver too
// old for the copy engine.
cudaError_t hopper_bottleneck(const HopperBottleneckParams&, cudaStream_t,
                              const char** variant = nullptr);

// All instances, each with the shared memory of a block. `blocks` is 0.
std::vector<BottleneckVariant> hopper_bottleneck_variants();

}  // namespace hgfast::cuda
