// Small arithmetic shared by the kernels, and scratch memory.
//
// Kernel files use no std:: templates or inline functions: each is compiled once per
// instruction set, and the linker keeps one copy of an inline function for all of them,
// perhaps the one with instructions that this machine lacks. What stands in the namespace
// HGFAST_ISA is each set's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace hgfast::cpu::HGFAST_ISA {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t kAlign = 64;  // bytes: a cache line, an AVX-512 register, an AMX tile row

// Hands out aligned arrays from a thread's scratch. On a null base it only counts: a kernel
// lays its scratch out in one function, run once by plan_* to measure and once to use it.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlign);
    return reinterpret_cast<T*>(p);
  }

  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Elementwise work over `count` elements or rows, a task per `piece` of them.
inline Work elementwise_work(int64_t count, int64_t piece) {
  return {.tasks = ceil_div(count, piece), .scratch = 0};
}

}  // namespace hgfast::cpu::HGFAST_ISA
