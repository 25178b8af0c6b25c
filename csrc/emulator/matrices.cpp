// What a warp computes together.
#include <cstring>

#include "block.h"
#include "device_model.h"
#include "formats.h"

namespace hgfast::cuda::emulator {
namespace {

struct Shuffle {
  uint32_t value, result;
  int mask;
};
struct Matrices {
  uint32_t row;
  uint32_t* fragment;
};
struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <class Argument>
const Argument& argument_of(void* const (&arguments)[kLanes], int lane) {
  return *static_cast<const Argument*>(arguments[lane]);
}

template <Block::Direction direction>
void move(Block& block, Place place, void* const (&arguments)[kLanes]) {
  uint32_t rows[kLanes];
  uint32_t* fragments[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    rows[lane] = argument_of<Matrices>(arguments, lane).row;
    fragments[lane] = argument_of<Matrices>(arguments, lane).fragment;
  }
  block.move_matrices(direction, rows, fragments, place);
}

// The products of two 16-bit numbers are exact in float32; the hardware does not document in which
// order it adds them, nor how it rounds between. Here: one by one in float32, in order.
template <class T>
void multiply(Block& block, Place, void* const (&arguments)[kLanes]) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& mine = argument_of<Product>(arguments, lane);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j)
        a[row + i % 2 * 8][column + i / 2 * 8 + j] = to_float<T>(mine.a[i] >> (16 * j) & 0xffff);
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j)
        b[column + i * 8 + j][row] = to_float<T>(mine.b[i] >> (16 * j) & 0xffff);
    for (int i = 0; i < 4; ++i) d[row + i / 2 * 8][column + i % 2] = mine.d[i];
  }
  for (int row = 0; row < 16; ++row) {
    float sum[8];
    for (int column = 0; column < 8; ++column) sum[column] = d[row][column];
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
    for (int column = 0; column < 8; ++column) d[row][column] = sum[column];
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* const mine = argument_of<Product>(arguments, lane).d;
    for (int i = 0; i < 4; ++i) mine[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
  ++block.counters().multiply_adds;
  block.counters().flops += 2 * 16 * 8 * 16;
}

}  // namespace

uint32_t shuffle_xor_bits(uint32_t value, int mask, Place place) {
  Shuffle mine{value, 0, mask};
  Block& block = Block::current();
  block.collective(
      "shuffle_xor", place, &mine, [](Block& block, Place, void* const(&arguments)[kLanes]) {
        for (int lane = 0; lane < kLanes; ++lane) {
          auto* const to = static_cast<Shuffle*>(arguments[lane]);
          to->result = argument_of<Shuffle>(arguments, (lane ^ to->mask) & (kLanes - 1)).value;
        }
        ++block.counters().shuffles;
      });
  return mine.result;
}

void load_matrices(uint32_t* fragment, Shared row, Place place) {
  Matrices mine{row, fragment};
  Block::current().collective("load_matrices", place, &mine, move<Block::Direction::load>);
}

void store_matrices(Shared row, const uint32_t* fragment, Place place) {
  Matrices mine{row, const_cast<uint32_t*>(fragment)};  // of which nothing is written
  Block::current().collective("store_matrices", place, &mine, move<Block::Direction::store>);
}

template <class T>
void multiply_add(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Place place) {
  Product mine{d, a, {b0, b1}};
  Block::current().collective("multiply_add", place, &mine, multiply<T>);
}
template void multiply_add<BFloat16>(float*, const uint32_t*, uint32_t, uint32_t, Place);
template void multiply_add<Float16>(float*, const uint32_t*, uint32_t, uint32_t, Place);

}  // namespace hgfast::cuda::emulator
