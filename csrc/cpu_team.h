// How the threads of one run take turns at the steps of a plan.
//
// Each step is cut into one part per thread. A thread runs its own part, the same rows at every
// step, so that they are still in its cache, and goes on when all parts are done. Unlike at a
// barrier nobody waits for a thread, only for a part: one that has not been begun after a few
// microseconds, because its thread has not woken up or another program holds its core, is run by
// whoever waits for it.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <new>
#include <thread>

#include "cpu_binding.h"

namespace hgfast {

class Turn {
 public:
  // The bytes that a turn at one step takes: this object, and a mark per part behind it.
  static size_t bytes(int team) { return aligned(sizeof(Turn) + team); }

  static Turn* create(void* memory, int team) {
    Turn* turn = new (memory) Turn;
    for (int part = 0; part < team; ++part) new (turn->marks() + part) Mark(false);
    return turn;
  }

  // Runs `part(begin, end)`, for this thread's part of the tasks and for those that it takes over;
  // returns when all tasks are done, whoever did them.
  template <class Part>
  void take(int64_t tasks, int thread, int team, const Part& part) {
    const auto parts = static_cast<int>(std::min<int64_t>(tasks, team));
    const auto try_part = [&](int i) {
      if (marks()[i].load(std::memory_order_relaxed) ||
          marks()[i].exchange(true, std::memory_order_relaxed))
        return;
      part(tasks * i / parts, tasks * (i + 1) / parts);
      done_.fetch_add(1, std::memory_order_release);
    };
    if (thread < parts) try_part(thread);
    for (int waited = 0; done_.load(std::memory_order_acquire) < parts; ++waited) {
      if (waited < kPatience) {
        pause();
      } else {
        for (int i = 0; i < parts; ++i) try_part(i);
        if (waited > 100 * kPatience) std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
    }
  }

 private:
  using Mark = std::atomic<bool>;  // somebody has begun this part

  static constexpr int kPatience = 64;  // pauses, of 10 to 140 cycles each

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  Mark* marks() { return reinterpret_cast<Mark*>(this + 1); }

  std::atomic<int> done_{0};  // parts
};

}  // namespace hgfast
