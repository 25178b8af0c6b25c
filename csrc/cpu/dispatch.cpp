// Chooses the instruction set, once: the best that was built, that this machine and its
// operating system can run, and that multiplies correctly when tried.
//
// This file is compiled without instruction set flags and may use the standard library.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hgfast::cpu {

// ---- What this machine can run -----------------------------------------------------------------

namespace {

#if defined(__x86_64__)

struct CpuidLeaf {
  unsigned a = 0, b = 0, c = 0, d = 0;

  CpuidLeaf(unsigned leaf, unsigned subleaf) {
    if (!__get_cpuid_count(leaf, subleaf, &a, &b, &c, &d)) a = b = c = d = 0;
  }
};

constexpr bool all(unsigned word, std::initializer_list<int> bits) {
  for (int bit : bits) {
    if (!(word >> bit & 1)) return false;
  }
  return true;
}

// The register states that the operating system saves, as XCR0 lists them.
unsigned saved_states() {
  if (!all(CpuidLeaf(1, 0).c, {27})) return 0;  // no XGETBV
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool has_avx2() {
  return all(saved_states(), {1, 2}) &&
         all(CpuidLeaf(1, 0).c, {12 /*fma*/, 28 /*avx*/, 29 /*f16c*/}) &&
         all(CpuidLeaf(7, 0).b, {5 /*avx2*/});
}

bool has_avx512() {
  return has_avx2() && all(saved_states(), {5, 6, 7}) &&
         all(CpuidLeaf(7, 0).b, {16 /*f*/, 17 /*dq*/, 30 /*bw*/, 31 /*vl*/});
}

// Linux lends the 8 KB of tile state only to processes that ask.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  return has_avx512() && all(saved_states(), {17, 18}) &&
         all(CpuidLeaf(7, 0).d, {22 /*amx-bf16*/, 24 /*amx-tile*/}) &&
         all(CpuidLeaf(7, 1).a, {5 /*avx512_bf16*/}) && tiles_granted();
}

#endif

bool always() { return true; }

}  // namespace

// ---- The sets that were built -------------------------------------------------------------------

#define HGFAST_DECLARE(isa)   \
  namespace isa {             \
  extern const Kernels table; \
  }
#if defined(HGFAST_ISA_AMX)
HGFAST_DECLARE(amx)
#endif
#if defined(HGFAST_ISA_AVX512)
HGFAST_DECLARE(avx512)
#endif
#if defined(HGFAST_ISA_AVX2)
HGFAST_DECLARE(avx2)
#endif
HGFAST_DECLARE(portable)
#if defined(HGFAST_ISA_AMX_MODEL)
HGFAST_DECLARE(amx_model)
#endif
#undef HGFAST_DECLARE

namespace {

struct Set {
  const Kernels* kernels;
  bool (*runs_here)();
  bool on_request_only;
};

const Set sets[] = {
// best first
#if defined(HGFAST_ISA_AMX)
    {&amx::table, has_amx, false},
#endif
#if defined(HGFAST_ISA_AVX512)
    {&avx512::table, has_avx512, false},
#endif
#if defined(HGFAST_ISA_AVX2)
    {&avx2::table, has_avx2, false},
#endif
    {&portable::table, always, false},
#if defined(HGFAST_ISA_AMX_MODEL)
    {&amx_model::table, has_avx512, true},
#endif
};

// ---- Trying a set before trusting it
// --------------------------------------------------------------

float bf16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

// 64-byte-aligned memory of `bytes`.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : storage_(bytes + 64) {}
  template <class T>
  T* as() {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(storage_.data()) + 63) &
                                ~uintptr_t{63});
  }

 private:
  std::vector<char> storage_;
};

// A 1x1 convolution of 32 pixels from 64 to 32 channels over whole numbers, which come out exactly,
// against the same in plain C++. Numbers of nine bits for float32: in bf16x3 they have two parts.
bool multiplies(const Kernels& kernels, Precision precision) {
  constexpr int64_t kPixels = 32, kIn = 64, kOut = 32;
  Buffer x(kPixels * kIn * 4), y(kPixels * kOut * 4);
  Buffer packed(kernels.packed_bytes(precision, Method::direct, kOut, kIn, 1, 1));
  std::vector<float> weight(kOut * kIn), bias(kOut, 1.0f);
  const int64_t wide = precision == Precision::medium ? 1 : 257;
  const auto x_at = [wide](int64_t i) {
    return static_cast<float>((i % 3 - 1) * (i % 2 ? wide : 1));
  };
  for (int64_t i = 0; i < kOut * kIn; ++i)
    weight[i] = static_cast<float>((i % 5 - 2) * (i % 2 ? 1 : wide));
  for (int64_t i = 0; i < kPixels * kIn; ++i) {
    const float value = x_at(i);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (precision == Precision::medium) {
      x.as<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
    } else {
      x.as<float>()[i] = value;
    }
  }
  kernels.pack(precision, Method::direct, kOut, kIn, 1, 1, weight.data(), packed.as<void>());
  ConvParams p{};
  p.precision = precision;
  p.batch = p.height = 1;
  p.width = kPixels;
  p.in = kIn;
  p.out = kOut;
  p.kernel_h = p.kernel_w = p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
  p.x = x.as<void>();
  p.y = y.as<void>();
  p.weight = packed.as<void>();
  p.bias = bias.data();
  const Work work = kernels.plan_conv(p, 1);
  Buffer scratch(work.scratch);
  kernels.conv(p, 1, 0, work.tasks, scratch.as<void>());

  for (int64_t i = 0; i < kPixels; ++i) {
    for (int64_t n = 0; n < kOut; ++n) {
      float expected = bias[n];
      for (int64_t k = 0; k < kIn; ++k) expected += x_at(i * kIn + k) * weight[n * kIn + k];
      const float given = precision == Precision::medium
                              ? bf16_to_float(y.as<uint16_t>()[i * kOut + n])
                              : y.as<float>()[i * kOut + n];
      if (given != expected) return false;
    }
  }
  return true;
}

bool trusted(const Set& set) {
  return set.runs_here() && multiplies(*set.kernels, Precision::highest) &&
         multiplies(*set.kernels, Precision::high) && multiplies(*set.kernels, Precision::medium);
}

const Kernels& choose() {
  const char* wanted = std::getenv("HGFAST_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string built;
  for (const Set& set : sets) {
    const char* name = set.kernels->name;
    built += std::string(built.empty() ? "" : ", ") + name;
    if (any ? set.on_request_only : std::strcmp(wanted, name) != 0) continue;
    if (trusted(set)) return *set.kernels;
    if (!any) {
      throw std::runtime_error(std::string("HGFAST_CPU_ISA=") + name + ": " +
                               (set.runs_here() ? "its kernels compute wrong results here"
                                                : "this machine cannot run it"));
    }
  }
  if (any) throw std::runtime_error("no CPU kernels compute right results on this machine");
  throw std::runtime_error(std::string("HGFAST_CPU_ISA=") + wanted + ": not one of " + built);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

int isa_list(const Isa** list) {
  static const std::vector<Isa> isas = [] {
    std::vector<Isa> found;
    for (const Set& set : sets) found.push_back({set.kernels->name, trusted(set)});
    return found;
  }();
  *list = isas.data();
  return static_cast<int>(isas.size());
}

}  // namespace hgfast::cpu
