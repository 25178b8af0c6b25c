#include "device_model.h"

#include "block.h"
#include "formats.h"

namespace hgfast::cuda {

Shared shared_memory() { return emulator::SharedMemory::kBase; }

namespace emulator {

int thread_index() { return Block::current().thread(); }
int block_index() { return static_cast<int>(Block::current().index()); }
int grid_size() { return Block::current().grid_size(); }
void sync_block(Place place) { Block::current().sync_block(place); }
void sync_warp(Place place) { Block::current().sync_warp(place); }

void load_shared(void* to, Shared from, uint32_t bytes, Place place) {
  Block::current().load_shared(to, from, bytes, place);
}
void store_shared(Shared to, const void* from, uint32_t bytes, Place place) {
  Block::current().store_shared(to, from, bytes, place);
}
void load_global(void* to, const void* from, uint32_t bytes, Place place) {
  Block::current().load_global(to, from, bytes, place);
}
void store_global(void* to, const void* from, uint32_t bytes, Place place) {
  Block::current().store_global(to, from, bytes, place);
}
void copy_async(Shared to, const void* from, bool valid, Place place) {
  Block::current().copy_async(to, from, valid, place);
}
void commit_copies() { Block::current().commit_copies(); }
void wait_copies(int pending) { Block::current().wait_copies(pending); }

uint32_t bits_of_float(float value) { return bits_of(value); }
float float_of_bits(uint32_t bits) { return float_of(bits); }

// The instruction gives one NaN for all, and +0 for a pair of zeros that has one.
float relu(float value) {
  return is_nan(bits_of(value)) ? float_of(kNaN32) : value > 0 ? value : 0.0f;
}

template <class T>
float2 unpack(uint32_t pair) {
  return {to_float<T>(pair & 0xffff), to_float<T>(pair >> 16)};
}
template <class T>
uint32_t pack(float first, float second) {
  return from_float<T>(first) | from_float<T>(second) << 16;
}

namespace {

template <class T>
uint32_t larger(uint32_t a, uint32_t b) {
  const float x = to_float<T>(a), y = to_float<T>(b);
  if (x != x || y != y) return kNaN16;
  if (x == y) return a & b;  // the same bits, or two zeros: +0 if one is
  return x > y ? a : b;
}

}  // namespace

template <class T>
uint32_t maximum(uint32_t a, uint32_t b) {
  return larger<T>(a & 0xffff, b & 0xffff) | larger<T>(a >> 16, b >> 16) << 16;
}

template float2 unpack<BFloat16>(uint32_t);
template float2 unpack<Float16>(uint32_t);
template uint32_t pack<BFloat16>(float, float);
template uint32_t pack<Float16>(float, float);
template uint32_t maximum<BFloat16>(uint32_t, uint32_t);
template uint32_t maximum<Float16>(uint32_t, uint32_t);

}  // namespace emulator
}  // namespace hgfast::cuda
