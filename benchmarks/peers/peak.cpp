// What this machine can multiply at best: products and sums that never leave the registers.
//
//   c++ -O3 -march=native -ffp-contract=fast -pthread peak.cpp -o peak && ./peak THREADS SECONDS
//
// A line "NAME GFLOP/s" for each kind of instruction and each window of time. All threads start
// together; a window ends with the last of them. These are ceilings for code that has nothing to
// load: no kernel reaches them.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
constexpr int kWindows = 10;

// As wide as this machine's registers.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vec __attribute__((vector_size(kBytes)));

// Twelve chains hide the latency of the multiply-add: 4 clocks at two a clock need eight, and
// twelve and two operands fit into 16 registers.
constexpr int kChains = 12;

double float32(int64_t rounds) {
  Vec c[kChains], a = Vec{} + 0.999f, b = Vec{} + 0.001f;
  for (int i = 0; i < kChains; ++i) c[i] = Vec{} + float(i);
  asm volatile("" : "+m"(a), "+m"(b));  // unknown to the compiler
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) c[i] = c[i] * a + b;
  }
  for (int i = 0; i < kChains; ++i) asm volatile("" : "+m"(c[i]));  // wanted by somebody
  return 2.0 * rounds * kChains * (kBytes / sizeof(float));
}

#if defined(__AVX512BF16__)
double avx512_bf16(int64_t rounds) {
  __m512 c[kChains];
  __m512i bits = _mm512_set1_epi16(0x3f7f);  // just below one
  asm volatile("" : "+m"(bits));
  const __m512bh a = (__m512bh)bits;
  for (int i = 0; i < kChains; ++i) c[i] = _mm512_set1_ps(float(i));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) c[i] = _mm512_dpbf16_ps(c[i], a, a);
  }
  for (int i = 0; i < kChains; ++i) asm volatile("" : "+m"(c[i]));
  return 2.0 * rounds * kChains * 32;
}
#endif

#if defined(HAS_AMX)
struct alignas(64) Tiles {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Linux gives the tiles' state to a process that asks for it.
bool amx_allowed() {
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

double amx_bf16(int64_t rounds) {
  Tiles tiles;
  for (int t = 0; t < 8; ++t) tiles.row_bytes[t] = 64, tiles.rows[t] = 16;
  alignas(64) uint16_t operand[16 * 32];  // zeros may cost less power, and clock higher
  for (uint16_t& value : operand) value = 0x3f7f;
  asm volatile(
      "ldtilecfg %0\n"
      "tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3\n"
      "tilezero %%tmm4\n tilezero %%tmm5\n"
      "tileloadd (%1,%2,1), %%tmm6\n tileloadd (%1,%2,1), %%tmm7\n" ::"m"(tiles),
      "r"(operand), "r"(int64_t(64))
      : "memory");
  for (int64_t r = 0; r < rounds; ++r)  // six sums hide the latency: 52 clocks, one in 16
    asm volatile(
        "tdpbf16ps %tmm7, %tmm6, %tmm0\n tdpbf16ps %tmm7, %tmm6, %tmm1\n"
        "tdpbf16ps %tmm7, %tmm6, %tmm2\n tdpbf16ps %tmm7, %tmm6, %tmm3\n"
        "tdpbf16ps %tmm7, %tmm6, %tmm4\n tdpbf16ps %tmm7, %tmm6, %tmm5\n");
  asm volatile("tilerelease");
  return 2.0 * rounds * 6 * 16 * 16 * 32;
}
#endif

// FLOP/s of all threads together, for about the given seconds.
double window(double (*run)(int64_t), int threads, int64_t rounds) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<double> flops(threads);
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      run(rounds / 8 + 1);  // wakes the wide units, and the clock of the core settles
      ready.fetch_add(1);
      while (!go.load()) std::this_thread::yield();
      flops[t] = run(rounds);
    });
  while (ready.load() < threads) std::this_thread::yield();
  const auto begin = Clock::now();
  go.store(true);
  for (std::thread& thread : team) thread.join();
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  double sum = 0;
  for (double f : flops) sum += f;
  return sum / seconds;
}

void measure(const char* name, double (*run)(int64_t), int threads, double seconds) {
  int64_t rounds = 1 << 12;
  for (double took = 0; took < 0.01; rounds *= 2) {
    const auto begin = Clock::now();
    run(rounds);
    took = std::chrono::duration<double>(Clock::now() - begin).count();
    if (took >= 0.01) rounds = int64_t(rounds * (seconds / kWindows / took) / 2) + 1;
  }
  for (int w = 0; w < kWindows; ++w)
    std::printf("%s %.1f\n", name, window(run, threads, rounds) / 1e9);
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 0;
  const double seconds = count > 2 ? std::atof(arguments[2]) : 0.5;
  if (threads < 1 || !(seconds > 0)) {
    std::fprintf(stderr, "usage: peak THREADS [SECONDS for each kind of instruction]\n");
    return 2;
  }
  measure("float32", float32, threads, seconds);
#if defined(__AVX512BF16__)
  measure("avx512_bf16", avx512_bf16, threads, seconds);
#endif
#if defined(HAS_AMX)
  if (amx_allowed()) measure("amx_bf16", amx_bf16, threads, seconds);
#endif
}
