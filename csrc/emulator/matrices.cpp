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

template <class T>
void halves(const uint32_t (&registers)[kLanes], float (&elements)[2][kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    elements[0][lane] = to_float<T>(registers[lane] & 0xffff);
    elements[1][lane] = to_float<T>(registers[lane] >> 16);
  }
}

// Eight numbers side by side, in whatever vectors the machine has.
using Row = float __attribute__((vector_size(32)));

// The products of two 16-bit numbers are exact in float32; the hardware does not document in which
// order it adds them, nor how it rounds between. Here: one by one in float32, in order.
template <class T>
void multiply(Block& block, Place, void* const (&arguments)[kLanes]) {
  // [i][half][lane]: the element of that half of each lane's register i.
  uint32_t a_registers[4][kLanes], b_registers[2][kLanes];
  float a[4][2][kLanes], b_elements[2][2][kLanes], d[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& mine = argument_of<Product>(arguments, lane);
    for (int i = 0; i < 4; ++i) a_registers[i][lane] = mine.a[i];
    for (int i = 0; i < 2; ++i) b_registers[i][lane] = mine.b[i];
    std::memcpy(&d[lane / 4][lane % 4 * 2], mine.d, 8);
    std::memcpy(&d[lane / 4 + 8][lane % 4 * 2], mine.d + 2, 8);
  }
  for (int i = 0; i < 4; ++i) halves<T>(a_registers[i], a[i]);
  for (int i = 0; i < 2; ++i) halves<T>(b_registers[i], b_elements[i]);
  Row b[16];
  for (int k = 0; k < 16; ++k)
    for (int column = 0; column < 8; ++column)
      b[k][column] = b_elements[k / 8][k % 2][column * 4 + k % 8 / 2];
  // Four rows side by side: one alone would wait for each of its additions.
  for (int first = 0; first < 16; first += 4) {
    Row sums[4];
    std::memcpy(sums, d[first], sizeof sums);
    for (int k = 0; k < 16; ++k) {
      const float* const column = &a[k / 8 * 2 + first / 8][k % 2][first % 8 * 4 + k % 8 / 2];
      for (int i = 0; i < 4; ++i) sums[i] += column[4 * i] * b[k];
    }
    std::memcpy(d[first], sums, sizeof sums);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* const mine = argument_of<Product>(arguments, lane).d;
    std::memcpy(mine, &d[lane / 4][lane % 4 * 2], 8);
    std::memcpy(mine + 2, &d[lane / 4 + 8][lane % 4 * 2], 8);
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
