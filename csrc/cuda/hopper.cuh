// What a kernel asks of Hopper (sm_90a) beyond device.cuh: barriers in shared memory, copies of
// tiles by the copy engine (TMA), products of warpgroups, clusters of blocks. The only other header
// of csrc/cuda that names an instruction; under HGFAST_EMULATE, models, as there.
#pragma once

#include "device.cuh"

namespace hgfast::cuda {

constexpr int kWarpgroup = 128;  // threads

// Eight bytes of shared memory that count arrivals and bytes. It goes from phase to phase: a phase
// is over when all arrivals and all bytes that it expects have come.
using Barrier = Shared;

// How the 16-byte pieces of a box's rows lie in shared memory: piece p of the row at address a at
// a + 16 * (p ^ (a / 128 % n)), with n = 2, 4, 8 for rows of 32, 64, 128 bytes.
enum class Swizzle : int { none, rows_of_32, rows_of_64, rows_of_128 };

// A dense NHWC map of 16-bit elements, and the box of it that one copy moves.
struct TileShape {
  int64_t batch, height, width;
  int channels;
  int box_channels, box_width, box_height;  // of one image
  Swizzle swizzle;
};

}  // namespace hgfast::cuda

#ifdef HGFAST_EMULATE
#include "../emulator/hopper_model.h"
#else

#include <cuda.h>

namespace hgfast::cuda {

// What the copy engine knows of a map. A kernel takes it as part of its parameters, which must be
// __grid_constant__.
struct TensorMap {
  CUtensorMap map;
};

// Host side: fills in a map. cudaErrorInvalidValue where the engine cannot: the address and the
// bytes of a pixel must be multiples of 16, a box at most 256 pixels wide and high, and its rows
// as long as the swizzle says.
inline cudaError_t make_tensor_map(TensorMap& map, const void* address, const TileShape& shape,
                                   bool bfloat16) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {  // from the driver that is there: nothing links to it
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                        cudaEnableDefault, &result);
    if (error != cudaSuccess) (void)cudaGetLastError();
    return error == cudaSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  constexpr int kRows[] = {0, 32, 64, 128};
  const int row = kRows[static_cast<int>(shape.swizzle)];
  if (row && 2 * shape.box_channels != row) return cudaErrorInvalidValue;  // it would be padded
  const cuuint64_t pixel = uint64_t{2} * static_cast<uint64_t>(shape.channels);
  const cuuint64_t sizes[] = {
      static_cast<cuuint64_t>(shape.channels), static_cast<cuuint64_t>(shape.width),
      static_cast<cuuint64_t>(shape.height), static_cast<cuuint64_t>(shape.batch)};
  const cuuint64_t strides[] = {pixel, pixel * sizes[1], pixel * sizes[1] * sizes[2]};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(shape.box_channels),
                            static_cast<cuuint32_t>(shape.box_width),
                            static_cast<cuuint32_t>(shape.box_height), 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                              CU_TENSOR_MAP_SWIZZLE_64B,
                                              CU_TENSOR_MAP_SWIZZLE_128B};
  const CUresult result = encode(
      &map.map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(address), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      kSwizzles[static_cast<int>(shape.swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// ---- Barriers
// ------------------------------------------------------------------------------------

// A barrier whose phases expect so many arrivals. One thread calls it, then fence_barriers(); the
// others may use it behind a barrier of the block (of the cluster, where other blocks do).
HGFAST_DEVICE void init_barrier(Barrier barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
HGFAST_DEVICE void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
HGFAST_DEVICE void arrive(Barrier barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and says that the phase expects so many bytes more.
HGFAST_DEVICE void arrive_expecting(Barrier barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Arrives at the same barrier of another block of the cluster, behind this thread's reads. (Behind
// its writes to other blocks' shared memory it would need a fence, which takes longer than a
// barrier of the cluster.)
HGFAST_DEVICE void arrive_at(Barrier barrier, int rank) {
  asm volatile(
      "{.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Waits until the phase of that parity is over: 0 for the first one. What was done before its
// arrivals, also in other blocks of the cluster, and what its copies brought, is there then.
HGFAST_DEVICE void wait_barrier(Barrier barrier, int parity) {
  asm volatile(
      "{.reg .pred over;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], %1;\n\t"
      "@!over bra again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A barrier of `threads` threads in whole warps, one of 15 (1 to 15) that the block has.
HGFAST_DEVICE void sync_some(int number, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- The asynchronous proxy
// ----------------------------------------------------------------------

// What this thread wrote to shared memory is there for tile stores and for products' operands.
// Others' writes need their own, and a barrier.
HGFAST_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A box of a map, from its first channel, column, row on, zeros where that is outside of the map;
// its bytes arrive at the barrier, all of them, also those that are zeros. `to` is a multiple of
// 128, better of eight rows, with which the swizzle begins anew.
HGFAST_DEVICE void load_tile(Shared to, const TensorMap& map, Barrier barrier, int channel, int x,
                             int y, int image) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map.map), "r"(barrier), "r"(channel), "r"(x), "r"(y), "r"(image)
      : "memory");
}
// So many bytes as they lie in memory, 16 at a time; nobody writes them while the kernel runs.
HGFAST_DEVICE void load_bulk(Shared to, const void* from, int bytes, Barrier barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// Likewise into all blocks of the cluster whose bits are set, to the same place in each, and
// arriving at the barrier there that lies where `barrier` lies here.
HGFAST_DEVICE void load_bulk_multicast(Shared to, const void* from, int bytes, Barrier barrier,
                                       uint32_t ranks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<uint16_t>(ranks))
      : "memory");
}
// A box from shared memory into a map; what is outside of the map is dropped. Threads' writes need
// fence_async() before.
HGFAST_DEVICE void store_tile(const TensorMap& map, Shared from, int channel, int x, int y,
                              int image) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::
          "l"(&map.map),
      "r"(from), "r"(channel), "r"(x), "r"(y), "r"(image)
      : "memory");
}
// Closes this thread's group of stores begun since the last call.
HGFAST_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until of this thread's groups of stores at most `pending`, the newest ones, have still to
// read shared memory.
template <int pending>
HGFAST_DEVICE void wait_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// ---- Products of a warpgroup
// ---------------------------------------------------------------------

// An operand in shared memory: blocks of eight rows of 16 bytes, each 128 bytes in a row. The next
// eight columns (of the sum) lie `columns` bytes on, the next eight rows (pixels, or channels of
// the result) `rows` bytes on. All are multiples of 16: a start need not be one of 128.
HGFAST_HOST_DEVICE constexpr uint64_t operand(Shared start, int columns, int rows) {
  return static_cast<uint64_t>((start & 0x3ffff) >> 4) |
         static_cast<uint64_t>((columns & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((rows & 0x3ffff) >> 4) << 32;
}

// Before the first product, and wherever threads have touched sums or fragments since.
HGFAST_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes this warp's group of products begun since the last call.
HGFAST_DEVICE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `pending` groups are under way. Until then nobody may touch sums, fragments
// or operands.
template <int pending>
HGFAST_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// d = a * b, plus d if `accumulate`, for a of 64 x 16 and b of 16 x n, sums in float32. Warp w of
// the group has the rows 16 * w to 16 * w + 15, as d[4 * i ... 4 * i + 3] those of
// multiply_add(d, ...) for the columns 8 * i to 8 * i + 7. a lies in registers, as fragments for
// multiply_add, or in shared memory; b lies there transposed.
#define HGFAST_SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HGFAST_SUMS_16(d, i) \
  HGFAST_SUMS_4(d, i), HGFAST_SUMS_4(d, i + 4), HGFAST_SUMS_4(d, i + 8), HGFAST_SUMS_4(d, i + 12)
#define HGFAST_SUMS_32(d) HGFAST_SUMS_16(d, 0), HGFAST_SUMS_16(d, 16)
#define HGFAST_SUMS_64(d) HGFAST_SUMS_32(d), HGFAST_SUMS_16(d, 32), HGFAST_SUMS_16(d, 48)
#define HGFAST_NAMES_32                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HGFAST_NAMES_64                                                                          \
  HGFAST_NAMES_32                                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

template <class T, int n>
struct Products;

#define HGFAST_PRODUCTS(T, type, n, sums, a0, a1, a2, a3, b, flag)                               \
  template <>                                                                                    \
  struct Products<T, n> {                                                                        \
    HGFAST_DEVICE static void add(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b_,        \
                                  bool accumulate) {                                             \
      asm volatile("{.reg .pred add;\n\tsetp.ne.b32 add, " flag                                  \
                   ", 0;\n\t"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type               \
                   " {" HGFAST_NAMES_##sums "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b            \
                                            ", add, 1, 1, 0;}"                                   \
                   : HGFAST_SUMS_##sums(d)                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_),                        \
                     "r"(static_cast<int>(accumulate)));                                         \
    }                                                                                            \
    HGFAST_DEVICE static void add(float (&d)[n / 2], uint64_t a, uint64_t b_, bool accumulate) { \
      asm volatile("{.reg .pred add;\n\tsetp.ne.b32 add, " a2                                    \
                   ", 0;\n\t"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type               \
                   " {" HGFAST_NAMES_##sums "}, " a0 ", " a1 ", add, 1, 1, 0, 0;}"               \
                   : HGFAST_SUMS_##sums(d)                                                       \
                   : "l"(a), "l"(b_), "r"(static_cast<int>(accumulate)));                        \
    }                                                                                            \
  };
HGFAST_PRODUCTS(BFloat16, "bf16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
HGFAST_PRODUCTS(BFloat16, "bf16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
HGFAST_PRODUCTS(Float16, "f16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
HGFAST_PRODUCTS(Float16, "f16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
#undef HGFAST_PRODUCTS
#undef HGFAST_NAMES_64
#undef HGFAST_NAMES_32
#undef HGFAST_SUMS_64
#undef HGFAST_SUMS_32
#undef HGFAST_SUMS_16
#undef HGFAST_SUMS_4

template <class T, int n>
HGFAST_DEVICE void add_product(float (&d)[n], const uint32_t (&a)[4], uint64_t b,
                               bool accumulate = true) {
  Products<T, 2 * n>::add(d, a, b, accumulate);
}
template <class T, int n>
HGFAST_DEVICE void add_product(float (&d)[n], uint64_t a, uint64_t b, bool accumulate = true) {
  Products<T, 2 * n>::add(d, a, b, accumulate);
}

// ---- Clusters
// ------------------------------------------------------------------------------------

// This block's number in its cluster.
HGFAST_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// All threads of the cluster, in two steps: what was done before arrive_cluster() is there for
// everyone behind wait_cluster().
HGFAST_DEVICE void arrive_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
HGFAST_DEVICE void wait_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
HGFAST_DEVICE void sync_cluster() {
  arrive_cluster();
  wait_cluster();
}
// Into the shared memory of another block of the cluster, to the place that `to` is in this one's.
HGFAST_DEVICE void store_remote(Shared to, int rank, uint4 value) {
  asm volatile(
      "{.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "st.shared::cluster.v4.u32 [remote], {%2, %3, %4, %5};}" ::"r"(to),
      "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
}
HGFAST_DEVICE void store_remote(Shared to, int rank, uint32_t value) {
  asm volatile(
      "{.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "st.shared::cluster.u32 [remote], %2;}" ::"r"(to),
      "r"(rank), "r"(value)
      : "memory");
}

// ---- Registers, and the next kernel
// --------------------------------------------------------------

// A warpgroup's registers for each thread, a multiple of 8: it gives back what it has too much, or
// takes, waiting for it, what others of the block gave back.
template <int registers>
HGFAST_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
HGFAST_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// In a launch that may begin before the kernel in front of it has ended: waits for that end. Only
// what that kernel does not write may be read before, and nothing may be written.
HGFAST_DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The kernel behind this one may begin, as far as there is room.
HGFAST_DEVICE void let_next_kernel_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- More of barriers
// --------------------------------------------------------------------------------

// As wait_barrier(), where other blocks arrive behind reads alone, or not at all: without dropping
// what the multiprocessor has of global memory in its L1 cache, as one that waits for what other
// blocks wrote must.
HGFAST_DEVICE void wait_own_barrier(Barrier barrier, int parity) {
  asm volatile(
      "{.reg .pred over;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 over, [%0], %1;\n\t"
      "@!over bra again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// 16 bytes that the kernel in front may have written after this one began. load_global() is for
// what nobody writes from the kernel's begin on: its cache need not see what came since.
HGFAST_DEVICE uint4 load_written(const void* address) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

}  // namespace hgfast::cuda

#endif  // HGFAST_EMULATE
