// Floats of 16 bits to and from float32, one at a time. Included by `isa.h`, which names the
// namespace.
#pragma once
#include <cstdint>
#include <cstring>

namespace lowbit {
namespace LOWBIT_ISA {

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFF) << 13;
  uint32_t bits;
  float value;
  if (magnitude >= 0x7C00u << 13) {  // infinity and NaN
    bits = sign | 0x7F800000u | (magnitude & 0x7FFFFFu);
    std::memcpy(&value, &bits, 4);
    return value;
  }
  // The exponent of a half is 112 too small; the product is exact for subnormals too.
  bits = magnitude;
  std::memcpy(&value, &bits, 4);
  value *= 5.192296858534828e33f;  // 2^112
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float bfloat_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline uint16_t float_to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (bits >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to 65536
  if (bits < 0x38800000) {  // subnormal half: adding 0.5 leaves its bits, rounded to even
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000));
  }
  bits += 0xFFF + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | (bits - (112u << 23)) >> 13);
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
