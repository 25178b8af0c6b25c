// The functions of ../cuda/device.cuh as models on a CPU; included by it, and described there.
// Each takes one argument more, the line that called it.
#pragma once

#include <cmath>
#include <cstdint>

#include "../cuda/device.cuh"
#include "launch.h"
#include "place.h"

#define HGFAST_DEVICE inline
#define HGFAST_HOST_DEVICE

namespace hgfast::cuda {

namespace emulator {

// What stands behind the functions below; see block.h.
int thread_index();
int block_index();
int grid_size();
void sync_block(Place);
void sync_warp(Place);
uint32_t shuffle_xor_bits(uint32_t value, int mask, Place);
void load_shared(void* to, Shared from, uint32_t bytes, Place);
void store_shared(Shared to, const void* from, uint32_t bytes, Place);
void load_global(void* to, const void* from, uint32_t bytes, Place);
void store_global(void* to, const void* from, uint32_t bytes, Place);
void copy_async(Shared to, const void* from, bool valid, Place);
void commit_copies();
void wait_copies(int pending);
void load_matrices(uint32_t* fragment, Shared row, Place);
void store_matrices(Shared row, const uint32_t* fragment, Place);
template <class T>
void multiply_add(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Place);
template <class T>
float2 unpack(uint32_t pair);
template <class T>
uint32_t pack(float first, float second);
template <class T>
uint32_t maximum(uint32_t a, uint32_t b);
float relu(float value);
uint32_t bits_of_float(float value);
float float_of_bits(uint32_t bits);

}  // namespace emulator

inline int thread_index() { return emulator::thread_index(); }
inline int block_index() { return emulator::block_index(); }
inline int grid_size() { return emulator::grid_size(); }

inline void sync_block(emulator::Place place = emulator::here()) { emulator::sync_block(place); }
inline void sync_warp(emulator::Place place = emulator::here()) { emulator::sync_warp(place); }

inline int forget(int value) { return value; }
inline int uniform(int value) { return value; }

inline uint32_t shuffle_xor(uint32_t value, int mask, emulator::Place place = emulator::here()) {
  return emulator::shuffle_xor_bits(value, mask, place);
}
inline float shuffle_xor(float value, int mask, emulator::Place place = emulator::here()) {
  return emulator::float_of_bits(
      emulator::shuffle_xor_bits(emulator::bits_of_float(value), mask, place));
}

Shared shared_memory();

template <class V>
V load_shared(Shared address, emulator::Place place = emulator::here()) {
  V value;
  emulator::load_shared(&value, address, sizeof(V), place);
  return value;
}
template <class V>
void store_shared(Shared address, V value, emulator::Place place = emulator::here()) {
  emulator::store_shared(address, &value, sizeof(V), place);
}
template <class V>
V load_global(const void* address, emulator::Place place = emulator::here()) {
  V value;
  emulator::load_global(&value, address, sizeof(V), place);
  return value;
}
inline float2 load_global_now(const float* address, emulator::Place place = emulator::here()) {
  return load_global<float2>(address, place);
}
inline uint4 load_written(const void* address, emulator::Place place = emulator::here()) {
  return load_global<uint4>(address, place);
}
template <class V>
void store_global(void* address, V value, emulator::Place place = emulator::here()) {
  emulator::store_global(address, &value, sizeof(V), place);
}

inline void copy_async(Shared to, const void* from, bool valid = true,
                       emulator::Place place = emulator::here()) {
  emulator::copy_async(to, from, valid, place);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int pending>
void wait_copies() {
  emulator::wait_copies(pending);
}

inline void load_matrices(uint32_t (&fragment)[4], Shared row,
                          emulator::Place place = emulator::here()) {
  emulator::load_matrices(fragment, row, place);
}
inline void store_matrices(Shared row, const uint32_t (&fragment)[4],
                           emulator::Place place = emulator::here()) {
  emulator::store_matrices(row, fragment, place);
}
template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  emulator::Place place = emulator::here()) {
  emulator::multiply_add<T>(d, a, b0, b1, place);
}

template <class T>
float2 unpack(uint32_t pair) {
  return emulator::unpack<T>(pair);
}
template <class T>
uint32_t pack(float first, float second) {
  return emulator::pack<T>(first, second);
}
template <class T>
uint32_t pack_relu(float first, float second) {
  return emulator::pack<T>(emulator::relu(first), emulator::relu(second));
}
template <class T>
uint32_t maximum(uint32_t a, uint32_t b) {
  return emulator::maximum<T>(a, b);
}
inline float relu(float value) { return emulator::relu(value); }

}  // namespace hgfast::cuda
