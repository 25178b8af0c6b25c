// The residual block of kernels.h for few pixels on Hopper, over clusters of blocks: what a caller
// fills in.
#pragma once

#include "kernels.h"

namespace hgfast::cuda {

// The order of the weights: units of 512 bytes, each 16 channels of the result by 16 columns (of
// the sum), in a unit lane by lane the 8 elements (r, c) that the lane feeds to the matrix
// instructions: r = lane / 4 + 8 * (i / 4), c = 2 * (lane % 4) + 8 * (i / 2 % 2) + i % 2 for i in
// 0..7. Three matrices, of each for every 16 channels of the result the units of one after
// another, so that a block finds those for its channels in one piece:
//
//   conv1: in, padded with zeros to a multiple of 32 columns
//   conv2: for each column of the 3x3 window from left to right, for every 16 channels, the
//          window's three rows from top to bottom
//   conv3: if project, wp: in, padded likewise; then middle
//
// In conv1 and wp a lane finds the 8 columns 8 * (lane % 4) + j of 32 in the memory of x in one
// piece; so there column 2 * q + 8 * h + e of the second (j = 1) or first unit of two is column
// 8 * q + 4 * j + 2 * h + e of x.
struct LatencyTape {
  static constexpr int kUnit = 512;  // bytes
  int steps1, steps2, steps3;        // units for 16 channels of the result
  int64_t conv2, conv3, end;         // where they begin, and the tape's end; in units
};
constexpr LatencyTape latency_tape(int in, int middle, int out, bool project) {
  const int steps1 = (in + 31) / 32 * 2, steps2 = 9 * (middle / 16);
  const int steps3 = (project ? steps1 : 0) + middle / 16;
  const int64_t conv2 = int64_t{middle / 16} * steps1;
  const int64_t conv3 = conv2 + int64_t{middle / 16} * steps2;
  return {steps1, steps2, steps3, conv2, conv3, conv3 + int64_t{out / 16} * steps3};
}

// What a block of a cluster computes, and where things lie in its shared memory, in bytes.
struct LatencyLayout {
  int strips, out_strips;         // of 16 middle channels, of 16 channels of y
  int row;                        // of a pixel in T1 and T2
  int vectors, vector_bytes;      // begin; for each step
  int t1, t2, ring;               // begins
  int stages1, stages2, stages3;  // fillings of a slot for conv1, conv2, one pass of conv3
  int passes, stages;             // of conv3; all
};

// As BottleneckParams says it; in must be a multiple of 16, and middle and out, divided by the
// blocks of a cluster, too. See choose_latency for the sizes that there are.
//
// `tape` is another one than there, see LatencyTape, and it does not depend on the cluster; scale
// and shift are padded with zeros to a multiple of 32. Tape, biases, scale and shift are read
// before the kernel in front of this one has ended, if `programmatic`: that one may not write them.
struct LatencyParams {
  BottleneckParams block;
  bool programmatic;  // may begin before the kernel in front of it has ended
  // Filled in by the launcher.
  int cluster;  // blocks that share a tile: 2, 4 or 8
  int slots;    // places for weights in shared memory
  LatencyTape order;
  LatencyLayout at;
};

// A chain of blocks on maps of at most 8x8 pixels, in one launch: one cluster computes all of it
// for an image, and the maps between the steps stay in its shared memory. All have the same number
// of channels in x and y, a multiple of the cluster's blocks times 16, and 16 middle channels for
// each block: 32, 64 or 128. None is projected. Of a depth-4 hourglass at 64x64 this is what lies
// below 16x16: with a the pooled 16x16 map's block, six steps.
//
// Of `blocks`, x is read of the first alone, y written of the last alone, and low is not read. What
// a step reads is the result of an earlier one, or x.
struct SubtreeParams {
  static constexpr int kMostSteps = 8;
  int steps;
  BottleneckParams blocks[kMostSteps];
  int source[kMostSteps];  // the step whose result a step reads; -1: x, for the first
  int low[kMostSteps];     // the step whose result is upsampled and added; -1: none
  bool programmatic;       // may begin before the kernel in front of it has ended
  // Filled in by the launcher.
  int cluster, slots;
  LatencyTape order;
  LatencyLayout at;
  int maps[kMostSteps];  // where a step's result lies in shared memory
};

// One way to run a block.
struct LatencyVariant {
  const char* name;  // "latency<bfloat16, 16>": element, middle channels of a block at most
  int threads;
  int cluster;     // blocks that share a tile
  int64_t blocks;  // of the launch, and what each has of shared memory
  int shared_bytes;
  int slots, stages;  // places for weights there, and how often one is filled
};

// The largest cluster, of 8, 4 or 2 blocks, with which all blocks find a multiprocessor of their
// own; where none does, the smallest there is. False where the channels or the shared memory allow
// none: a block has at most 64 of the middle channels.
bool choose_latency(const BottleneckParams&, int multiprocessors, int shared_limit,
                    LatencyVariant& variant);

// All instances, each with the most shared memory that a block of it asks for where two blocks
// share a multiprocessor. `blocks` is 0.
std::vector<BottleneckVariant> latency_variants();

// Launches the variant that suits the current device; tells its name if asked.
// cudaErrorNotSupported where that is no Hopper (sm_90).
cudaError_t latency(const BottleneckParams&, bool programmatic, cudaStream_t,
                    const char** variant = nullptr);

// Launches the chain on the current device; cudaErrorNotSupported where that is no Hopper,
// cudaErrorInvalidConfiguration where the maps do not fit into shared memory.
cudaError_t subtree(const SubtreeParams&, cudaStream_t, const char** variant = nullptr);

// Its instances, each with the shared memory that six steps of 256 channels ask for. `blocks` is 0.
std::vector<BottleneckVariant> subtree_variants();

// What no kernel writes meanwhile.
template <class Visit>
void visit_latency_weights(const BottleneckParams& p, const LatencyTape& tape, Visit&& visit) {
  const auto weights = [&](const void* array, int64_t bytes) { visit(array, bytes, false, true); };
  if (p.scale) {
    weights(p.scale, int64_t{64} * tape.steps1);
    weights(p.shift, int64_t{64} * tape.steps1);
  }
  weights(p.b1, int64_t{4} * p.middle);
  weights(p.b2, int64_t{4} * p.middle);
  weights(p.b3, int64_t{4} * p.out);
  weights(p.tape, tape.end * LatencyTape::kUnit);
}

template <class Visit>
void visit_arrays(const LatencyParams& params, Visit&& visit) {
  const BottleneckParams& p = params.block;
  const int64_t pixels = p.batch * p.height * p.width;
  visit(p.x, p.batch * p.x_height * p.x_width * p.in * 2, false);
  if (p.low) visit(p.low, pixels / 4 * p.out * 2, false);
  visit(p.y, pixels * p.out * 2, true);
  visit_latency_weights(p, params.order, visit);
}

template <class Visit>
void visit_arrays(const SubtreeParams& params, Visit&& visit) {
  const BottleneckParams &first = params.blocks[0], &last = params.blocks[params.steps - 1];
  visit(first.x, first.batch * first.x_height * first.x_width * first.in * 2, false);
  visit(last.y, last.batch * last.height * last.width * last.out * 2, true);
  for (int i = 0; i < params.steps; ++i)
    visit_latency_weights(params.blocks[i], params.order, visit);
}

}  // namespace hgfast::cuda
