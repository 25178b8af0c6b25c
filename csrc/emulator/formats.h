// The 16-bit formats as the hardware converts them, in integer arithmetic that compilers vectorise:
// no dependence on the rounding mode, nor on flushing denormals to zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "../cuda/device.cuh"

namespace hgfast::cuda::emulator {

constexpr uint32_t kNaN16 = 0x7fff;  // what instructions give, of either format
constexpr uint32_t kNaN32 = 0x7fffffff;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline bool is_nan(uint32_t bits) { return (bits & 0x7fffffff) > 0x7f800000; }

template <class T>
float to_float(uint32_t bits);

template <>
inline float to_float<BFloat16>(uint32_t bits) {
  return float_of(bits << 16);
}
template <>
inline float to_float<Float16>(uint32_t bits) {
  const uint32_t magnitude = (bits & 0x7fff) << 13;
  const uint32_t sign = (bits & 0x8000) << 16;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = magnitude + (224u << 23);  // infinity, NaN
  // A denormal's bits as the fraction of 2^-14, and that taken away: exact, and nowhere a denormal.
  const uint32_t denormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  const uint32_t chosen = magnitude < (1u << 23)         ? denormal
                          : magnitude >= (0x7c00u << 13) ? special
                                                         : normal;
  return float_of(chosen | sign);
}

// Rounded to the nearest, ties to even; NaN as the instruction gives it.
template <class T>
uint32_t from_float(float value);

template <>
inline uint32_t from_float<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  return is_nan(bits) ? kNaN16 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <>
inline uint32_t from_float<Float16>(float value) {
  const uint32_t bits = bits_of(value);
  if (is_nan(bits)) return kNaN16;
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above: infinity
  if (magnitude >= 0x38800000)                        // 2^-14 and above: normal
    return sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const int shift = 126 - static_cast<int>(magnitude >> 23);  // to units of 2^-24
  if (shift > 24) return sign;
  const uint32_t fraction = (magnitude & 0x7fffff) | 0x800000;
  const uint32_t whole = fraction >> shift;
  const uint32_t rest = fraction & ((1u << shift) - 1);
  const uint32_t half = 1u << (shift - 1);
  return sign | (whole + (rest > half || (rest == half && (whole & 1))));
}

}  // namespace hgfast::cuda::emulator
