// Everything that a kernel asks of the machine it runs on: the only header of csrc/cuda that names
// an instruction, but for hopper.cuh, which has what only Hopper can. Under HGFAST_EMULATE the same functions are models that run on a CPU and look for
// mistakes (csrc/emulator, docs/emulator.md); that is why kernels reach shared and global memory
// through the functions here alone, and never through a pointer of their own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hgfast::cuda {

// A 16-bit floating-point element, as it lies in memory. Two of them, packed into a uint32_t with
// the first in the low half, are what registers hold.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A byte address in the block's shared memory.
using Shared = uint32_t;

constexpr int kWarp = 32;  // lanes

}  // namespace hgfast::cuda

#ifdef HGFAST_EMULATE
#include "../emulator/device_model.h"
#else

#define HGFAST_DEVICE __device__ __forceinline__
#define HGFAST_HOST_DEVICE __host__ __device__

namespace hgfast::cuda {

// ---- Where am I, and waiting for the others
// ------------------------------------------------------

HGFAST_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
HGFAST_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
HGFAST_DEVICE int grid_size() { return static_cast<int>(gridDim.x); }  // blocks

// All threads of the block; orders their accesses to shared and global memory.
HGFAST_DEVICE void sync_block() { __syncthreads(); }
// All lanes of the warp; orders their accesses likewise.
HGFAST_DEVICE void sync_warp() { __syncwarp(); }

// The value itself, of which the compiler then knows nothing: what follows from it is computed
// again where it is needed instead of being kept in a register through a loop.
HGFAST_DEVICE int forget(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A value that is the same in all lanes of the warp, all of which must take part: the compiler then
// knows it too, and computes what follows from it once for the warp.
HGFAST_DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// The value of the lane whose number differs in the bits of `mask`. All lanes must take part.
HGFAST_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
HGFAST_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- Memory
// -------------------------------------------------------------------------------------- V is
// uint32_t, float, float2, uint4 or float4; addresses are multiples of its size.

// Start of the block's dynamic shared memory; 1024-byte aligned.
HGFAST_DEVICE Shared shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return static_cast<Shared>(__cvta_generic_to_shared(memory));
}

template <class V>
HGFAST_DEVICE V load_shared(Shared address) {
  return *static_cast<const V*>(__cvta_shared_to_generic(address));
}
template <class V>
HGFAST_DEVICE void store_shared(Shared address, V value) {
  *static_cast<V*>(__cvta_shared_to_generic(address)) = value;
}

// Global memory that nobody writes while the kernel runs.
template <class V>
HGFAST_DEVICE V load_global(const void* address) {
  return __ldg(static_cast<const V*>(address));
}
// The same, but never before a barrier in front of it: where registers are short until then.
HGFAST_DEVICE float2 load_global_now(const float* address) {
  float2 value;
  asm volatile("ld.global.v2.f32 {%0, %1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "l"(address)
               : "memory");
  return value;
}
template <class V>
HGFAST_DEVICE void store_global(void* address, V value) {
  *static_cast<V*>(address) = value;
}

// 16 bytes from global to shared memory, without waiting for them; zeros, and nothing read, where
// not `valid`. They may be read after wait_copies() and, by other threads, a barrier behind it.
HGFAST_DEVICE void copy_async(Shared to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Closes this thread's group of copies begun since the last call; a group may be empty.
HGFAST_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are under way, the newest ones.
template <int pending>
HGFAST_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- Matrices
// ------------------------------------------------------------------------------------ Fragments as
// the PTX manual draws them: of an 8x8 matrix of 16-bit elements, lane l holds the elements 2 * (l
// % 4) and the one behind it of row l / 4.

// Four 8x8 matrices. Lane l gives the address of the 16-byte row l % 8 of matrix l / 8.
HGFAST_DEVICE void load_matrices(uint32_t (&fragment)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row)
               : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// The way back, from sm_90 on.
HGFAST_DEVICE void store_matrices(Shared row, const uint32_t (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}
#endif

// d += a * b for a of 16 x 16, b of 16 x 8, sums in float32. The fragment of a is its four 8x8
// quarters: rows 0-7 of columns 0-7, rows 8-15 of columns 0-7, then columns 8-15 likewise; that of
// b, transposed, the rows 0-7 and the rows 8-15. Lane l holds of d the columns 2 * (l % 4) and the
// one behind it, of row l / 4 in d[0], d[1] and of row l / 4 + 8 in d[2], d[3].
template <class T>
HGFAST_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
HGFAST_DEVICE void multiply_add<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
HGFAST_DEVICE void multiply_add<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Two elements in a register
// ------------------------------------------------------------------

template <class T>
HGFAST_DEVICE float2 unpack(uint32_t pair);
template <>
HGFAST_DEVICE float2 unpack<BFloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
HGFAST_DEVICE float2 unpack<Float16>(uint32_t pair) {
  float2 values;
  asm("{.reg .f16 low, high;\n\t"
      "mov.b32 {low, high}, %2;\n\t"
      "cvt.f32.f16 %0, low;\n\t"
      "cvt.f32.f16 %1, high;}"
      : "=f"(values.x), "=f"(values.y)
      : "r"(pair));
  return values;
}

// Rounded to the nearest, ties to even.
template <class T>
HGFAST_DEVICE uint32_t pack(float first, float second);
template <>
HGFAST_DEVICE uint32_t pack<BFloat16>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
template <>
HGFAST_DEVICE uint32_t pack<Float16>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// pack(max(first, 0), max(second, 0)), where NaN stays NaN, as in PyTorch's ReLU.
template <class T>
HGFAST_DEVICE uint32_t pack_relu(float first, float second);
template <>
HGFAST_DEVICE uint32_t pack_relu<BFloat16>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
template <>
HGFAST_DEVICE uint32_t pack_relu<Float16>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// The larger of each; a NaN wins.
template <class T>
HGFAST_DEVICE uint32_t maximum(uint32_t a, uint32_t b);
template <>
HGFAST_DEVICE uint32_t maximum<BFloat16>(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}
template <>
HGFAST_DEVICE uint32_t maximum<Float16>(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// max(value, 0), where NaN stays NaN, as in PyTorch.
HGFAST_DEVICE float relu(float value) {
  float positive;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(positive) : "f"(value));
  return positive;
}

}  // namespace hgfast::cuda

#endif  // HGFAST_EMULATE
