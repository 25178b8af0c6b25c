// The functions of ../cuda/hopper.cuh as models on a CPU; included by it, and described there.
#pragma once

#include "../cuda/hopper.cuh"

namespace hgfast::cuda {

// The shape and the address: what the copy engine works out from its 128 bytes.
struct TensorMap {
  const char* address = nullptr;
  TileShape shape = {};
};
cudaError_t make_tensor_map(TensorMap&, const void* address, const TileShape&, bool bfloat16);

namespace emulator {

// What stands behind the functions below; see block.h.
void init_barrier(Barrier, int arrivals, Place);
void fence_barriers();
void arrive(Barrier, int rank, int bytes, const char* function, Place);  // rank -1: here
void wait_barrier(Barrier, int parity, Place);
void sync_some(int number, int threads, Place);
void fence_async();
void load_tile(Shared to, const TensorMap&, Barrier, const int (&at)[4], Place);
void load_bulk(Shared to, const void* from, int bytes, Barrier, uint32_t ranks,
               const char* function, Place);
void store_tile(const TensorMap&, Shared from, const int (&at)[4], Place);
void commit_stores();
void wait_stores(int pending);
void begin_products(Place);
void commit_products(Place);
void wait_products(int pending, Place);
template <class T>
void add_product(float* d, int n, const uint32_t* a, uint64_t a_operand, uint64_t b,
                 bool accumulate, Place);
int cluster_rank();
void arrive_cluster(Place);
void wait_cluster(Place);
void store_remote(Shared to, int rank, const void* from, uint32_t bytes, Place);
void set_registers(int registers, bool raise, Place);
void wait_for_previous_kernel();

}  // namespace emulator

inline void init_barrier(Barrier barrier, int arrivals, emulator::Place place = emulator::here()) {
  emulator::init_barrier(barrier, arrivals, place);
}
inline void fence_barriers() { emulator::fence_barriers(); }
inline void arrive(Barrier barrier, emulator::Place place = emulator::here()) {
  emulator::arrive(barrier, -1, 0, "arrive", place);
}
inline void arrive_expecting(Barrier barrier, int bytes, emulator::Place place = emulator::here()) {
  emulator::arrive(barrier, -1, bytes, "arrive_expecting", place);
}
inline void arrive_at(Barrier barrier, int rank, emulator::Place place = emulator::here()) {
  emulator::arrive(barrier, rank, 0, "arrive_at", place);
}
inline void wait_barrier(Barrier barrier, int parity, emulator::Place place = emulator::here()) {
  emulator::wait_barrier(barrier, parity, place);
}
inline void sync_some(int number, int threads, emulator::Place place = emulator::here()) {
  emulator::sync_some(number, threads, place);
}

inline void fence_async() { emulator::fence_async(); }
inline void load_tile(Shared to, const TensorMap& map, Barrier barrier, int channel, int x, int y,
                      int image, emulator::Place place = emulator::here()) {
  emulator::load_tile(to, map, barrier, {channel, x, y, image}, place);
}
inline void load_bulk(Shared to, const void* from, int bytes, Barrier barrier,
                      emulator::Place place = emulator::here()) {
  emulator::load_bulk(to, from, bytes, barrier, 1u << emulator::cluster_rank(), "load_bulk", place);
}
inline void load_bulk_multicast(Shared to, const void* from, int bytes, Barrier barrier,
                                uint32_t ranks, emulator::Place place = emulator::here()) {
  emulator::load_bulk(to, from, bytes, barrier, ranks, "load_bulk_multicast", place);
}
inline void store_tile(const TensorMap& map, Shared from, int channel, int x, int y, int image,
                       emulator::Place place = emulator::here()) {
  emulator::store_tile(map, from, {channel, x, y, image}, place);
}
inline void commit_stores() { emulator::commit_stores(); }
template <int pending>
void wait_stores() {
  emulator::wait_stores(pending);
}

namespace emulator {
// Set in an operand that cannot be written down. No bit that hopper.cuh sets.
constexpr uint64_t kMisaligned = uint64_t{1} << 63;
}  // namespace emulator
constexpr uint64_t operand(Shared start, int columns, int rows) {
  const auto all = static_cast<uint32_t>(start | columns | rows);
  return (all % 16 || all >> 18 ? emulator::kMisaligned : 0) |
         static_cast<uint64_t>((start & 0x3ffff) >> 4) |
         static_cast<uint64_t>((columns & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((rows & 0x3ffff) >> 4) << 32;
}
template <int n>
void settle(float (&)[n]) {}
inline void settle(uint32_t (&)[4]) {}
inline void begin_products(emulator::Place place = emulator::here()) {
  emulator::begin_products(place);
}
inline void commit_products(emulator::Place place = emulator::here()) {
  emulator::commit_products(place);
}
template <int pending>
void wait_products(emulator::Place place = emulator::here()) {
  emulator::wait_products(pending, place);
}
template <class T, int n>
void add_product(float (&d)[n], const uint32_t (&a)[4], uint64_t b, bool accumulate = true,
                 emulator::Place place = emulator::here()) {
  static_assert(n == 32 || n == 64, "hopper.cuh has these");
  emulator::add_product<T>(d, 2 * n, a, 0, b, accumulate, place);
}
template <class T, int n>
void add_product(float (&d)[n], uint64_t a, uint64_t b, bool accumulate = true,
                 emulator::Place place = emulator::here()) {
  static_assert(n == 32 || n == 64, "hopper.cuh has these");
  emulator::add_product<T>(d, 2 * n, nullptr, a, b, accumulate, place);
}

inline int cluster_rank() { return emulator::cluster_rank(); }
inline void arrive_cluster(emulator::Place place = emulator::here()) {
  emulator::arrive_cluster(place);
}
inline void wait_cluster(emulator::Place place = emulator::here()) {
  emulator::wait_cluster(place);
}
inline void sync_cluster(emulator::Place place = emulator::here()) {
  emulator::arrive_cluster(place);
  emulator::wait_cluster(place);
}
template <class V>
void store_remote(Shared to, int rank, V value, emulator::Place place = emulator::here()) {
  emulator::store_remote(to, rank, &value, sizeof(V), place);
}

template <int registers>
void lower_registers(emulator::Place place = emulator::here()) {
  emulator::set_registers(registers, false, place);
}
template <int registers>
void raise_registers(emulator::Place place = emulator::here()) {
  emulator::set_registers(registers, true, place);
}
inline void wait_for_previous_kernel() { emulator::wait_for_previous_kernel(); }
inline void let_next_kernel_begin() {}

}  // namespace hgfast::cuda
