// A register of float32 lanes, as wide as the instruction set at hand.
//
// GCC's vector extensions give arithmetic and conversions on every architecture; only the
// fused multiply-add needs a name per instruction set. It is spelled out everywhere, never
// left to contraction, so that one expression rounds alike wherever it is inlined.
//
// Loads and stores come in two kinds: Whole registers, and the Part of one that a row's end
// needs. each() walks a row with the first and ends it with the second.
#pragma once

#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace hgfast::cpu::HGFAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

struct bf16 {
  uint16_t bits;
};

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

inline Vec splat(float x) { return x - Vec{}; }  // x + 0 would lose the sign of -0

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// NaN stays NaN, as in torch: 0 > NaN is false. That is maxps, which gcc 12 does not see.
inline Vec relu(Vec x) {
#if defined(__AVX512F__)
  return _mm512_max_ps(Vec{}, x);
#elif defined(__AVX2__)
  return _mm256_max_ps(Vec{}, x);
#else
  return 0.0f > x ? Vec{} : x;
#endif
}

// The larger of two, NaN if either is.
inline Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)  // maxps returns b where either is NaN
  return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
#else
  return (a > b) | (a != a) ? a : b;
#endif
}

// To bfloat16, round to nearest even. A NaN's payload may sit in the bits that are cut off,
// so it gets its quiet bit set.
inline Halves to_bf16(Vec x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh(x);
#else
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, Halves);
#endif
}

inline Vec from_bf16(Halves x) {
#if defined(__AVX512F__)  // in one step, where gcc 12 takes five
  return (Vec)((Bits)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#else
  return (Vec)(__builtin_convertvector(x, Bits) << 16);
#endif
}

struct Whole {};
struct Part {
  int count;  // 1 ... kLanes - 1
};

inline Vec load(const float* p, Whole) {
  Vec x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline Halves load_halves(const void* p, Whole) {
  Halves x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x, Whole) { memcpy(p, &x, sizeof x); }
inline void store(bf16* p, Halves x, Whole) { memcpy(p, &x, sizeof x); }

#if defined(__AVX512F__)

inline __mmask16 mask(Part part) { return static_cast<__mmask16>((1u << part.count) - 1); }
inline Vec load(const float* p, Part part) { return _mm512_maskz_loadu_ps(mask(part), p); }
inline Halves load_halves(const void* p, Part part) {
  return (Halves)_mm256_maskz_loadu_epi16(mask(part), p);
}
inline void store(float* p, Vec x, Part part) { _mm512_mask_storeu_ps(p, mask(part), x); }
inline void store(bf16* p, Halves x, Part part) {
  _mm256_mask_storeu_epi16(p, mask(part), (__m256i)x);
}

#else

// In three steps of known size: a memcpy of any size is a call.
template <class T>
inline void copy(T* to, const T* from, int count) {
  if (kLanes > 4 && count & 4) {  // count < kLanes
    memcpy(to, from, 4 * sizeof(T));
    to += 4;
    from += 4;
  }
  if (count & 2) {
    memcpy(to, from, 2 * sizeof(T));
    to += 2;
    from += 2;
  }
  if (count & 1) *to = *from;
}
static_assert(kLanes <= 8);

inline Vec load(const float* p, Part part) {
  float x[kLanes] = {};
  copy(x, p, part.count);
  return load(x, Whole{});
}
inline Halves load_halves(const void* p, Part part) {
  uint16_t x[kLanes] = {};
  copy(x, static_cast<const uint16_t*>(p), part.count);
  return load_halves(x, Whole{});
}
inline void store(float* p, Vec x, Part part) {
  float from[kLanes];
  store(from, x, Whole{});
  copy(p, from, part.count);
}
inline void store(bf16* p, Halves x, Part part) {
  bf16 from[kLanes];
  store(from, x, Whole{});
  copy(p, from, part.count);
}

#endif

template <class Lanes>
inline Vec load(const bf16* p, Lanes lanes) {
  return from_bf16(load_halves(p, lanes));
}
template <class Lanes>
inline void store(bf16* p, Vec x, Lanes lanes) {
  store(p, to_bf16(x), lanes);
}

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

// f(i, lanes) for each register's worth of `count` elements.
template <class F>
inline void each(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, Whole{});
  if (i < count) f(i, Part{static_cast<int>(count - i)});
}

// Runs f with a value of the C++ type that `element` stands for.
template <class F>
inline void with_element(Element element, F f) {
  element == Element::float32 ? f(float{}) : f(bf16{});
}

}  // namespace hgfast::cpu::HGFAST_ISA
