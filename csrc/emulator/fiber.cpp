#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifndef HGFAST_FIBER_UCONTEXT
// switch(&from, to). What the ABI lets a callee change freely, the compiler has saved already. It
// ends in a jump, as a processor expects `ret` to go back to the latest call. Measured at 2.5 GHz:
// 6 ns; with `ret` 15 ns; and swapcontext, which has the system save the signal mask, 200 ns.
asm(R"(
  .text
  .p2align 4
  .hidden hgfast_emulator_switch
  .globl hgfast_emulator_switch
  .type hgfast_emulator_switch, @function
hgfast_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rdx
  jmpq *%rdx
  .size hgfast_emulator_switch, .-hgfast_emulator_switch
)");
extern "C" void hgfast_emulator_switch(void** from, void* to);
#endif

namespace hgfast::cuda::emulator {
namespace {

constexpr size_t kStack = 256 * 1024;  // touched pages alone cost memory
constexpr size_t kGuard = 4096;

}  // namespace

#ifdef HGFAST_FIBER_UCONTEXT

void Fiber::start(char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}
void Fiber::switch_to(Fiber& next) { swapcontext(&context_, &next.context_); }

#else

void Fiber::start(char* stack, size_t bytes, void (*entry)()) {
  // As if entry() had been called (a return address below 16-byte alignment) and had then called
  // switch: its own address to return to, and six registers.
  auto** top =
      reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}
void Fiber::switch_to(Fiber& next) { hgfast_emulator_switch(&stack_pointer_, next.stack_pointer_); }

#endif

Stacks::~Stacks() {
  if (memory_) munmap(memory_, count_ * kStack);
}

void Stacks::reserve(int count) {
  if (count <= count_) return;
  if (memory_) munmap(memory_, count_ * kStack);
  memory_ = nullptr;
  count_ = 0;
  void* memory = mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  count_ = count;
  // Where the system has no more mappings to give, the emulator does without the guards.
  for (int i = 0; i < count; ++i) (void)mprotect(memory_ + i * kStack, kGuard, PROT_NONE);
}

void Stacks::start(Fiber& fiber, int number, void (*entry)()) {
  // Equal addresses modulo a page share the sets of a first-level cache, and the lanes of a warp
  // take turns all the time: their stacks begin at different ones.
  const size_t shift = static_cast<size_t>(number) * 1344 % 16384;
  fiber.start(memory_ + number * kStack + kGuard, kStack - kGuard - shift, entry);
}

}  // namespace hgfast::cuda::emulator
