// Threads that take turns by agreement: a switch saves a few registers and changes the stack.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(HGFAST_EMULATOR_UCONTEXT)
#define HGFAST_FIBER_UCONTEXT
#include <ucontext.h>
#endif

namespace hgfast::cuda::emulator {

class Fiber {
 public:
  // The next switch to this fiber calls entry() on that stack. It must never return.
  void start(char* stack, size_t bytes, void (*entry)());
  // Goes on in `next`; returns when somebody switches back. A fiber may be left for good: nothing
  // on its stack is destroyed then.
  void switch_to(Fiber& next);

 private:
#ifdef HGFAST_FIBER_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

// Stacks for `count` fibers, with a page behind each that traps an overflow.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();

  void reserve(int count);
  void start(Fiber&, int number, void (*entry)());

 private:
  char* memory_ = nullptr;
  int count_ = 0;
};

}  // namespace hgfast::cuda::emulator
