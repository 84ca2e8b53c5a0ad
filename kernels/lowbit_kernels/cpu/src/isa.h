// The few vector operations that the kernels are written in, for each instruction set.
//
// A file that includes this is compiled with the flags of one instruction set and sees one `Isa`:
// Bytes are 64 bytes, Ints and Floats 16 lanes.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "weight.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define LOWBIT_ISA avx512
#elif defined(__AVX2__)
#include <immintrin.h>
#define LOWBIT_ISA avx2
#else
#define LOWBIT_ISA portable
#endif

// For the innermost loops: inlined into their callers, GCC keeps their sums in memory.
#if defined(__GNUC__)
#define LOWBIT_LOOP __attribute__((noinline))
#else
#define LOWBIT_LOOP
#endif

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

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

struct Isa {
  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  using Four = Bytes;
  static constexpr int kStripsAtOnce = 4, kTokensAtOnce = 14, kBlockSums = 24;

  static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_bytes(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  // 16 bytes, looked up by `lookup`.
  static Bytes load_table(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Bytes lookup(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
  template <int kShift> static Bytes field(Bytes v, uint8_t mask) {
    const Bytes moved = kShift > 0   ? _mm512_srli_epi16(v, kShift > 0 ? kShift : 0)
                        : kShift < 0 ? _mm512_slli_epi16(v, kShift < 0 ? -kShift : 0)
                                     : v;
    return _mm512_and_si512(moved, _mm512_set1_epi8(static_cast<char>(mask)));
  }
  static Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  static Ints zero() { return _mm512_setzero_si512(); }
  // Four signed bytes in every lane.
  static Bytes four(const int8_t* x) {
    int32_t bytes;
    std::memcpy(&bytes, x, 4);
    return _mm512_set1_epi32(bytes);
  }
  // Adds the products of unsigned bytes w (at most 15 where kNarrow) with signed bytes, by lane.
  template <bool kNarrow> static Ints dot(Ints sum, Bytes w, Bytes x) {
    return _mm512_dpbusd_epi32(sum, w, x);
  }
  static Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
  // Byte `kByte` of every lane as a float.
  template <int kByte> static Floats byte(Bytes v) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(v, 8 * kByte), _mm512_set1_epi32(255)));
  }
  static Floats set(float v) { return _mm512_set1_ps(v); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static void store_half(uint16_t* p, Floats v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store_bfloat(uint16_t* p, Floats v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  // Lane j of v[i] becomes lane i of v[j].
  static void transpose(Floats* v) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; j++) {
        const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
        v[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        v[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      }
    for (int i = 0; i < 4; i++) {
      t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xDD);
      t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; i++) {
      v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      v[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
      v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
      v[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xDD);
    }
  }
  static Floats load_bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Floats load_halves(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Floats load_bfloats(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
};

#elif defined(__AVX2__)

struct Isa {
  struct Bytes { __m256i a, b; };
  using Ints = Bytes;
  using Four = Bytes;
  struct Floats { __m256 a, b; };
  static constexpr int kStripsAtOnce = 1, kTokensAtOnce = 6, kBlockSums = 4;

  static Bytes load(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  static void store_bytes(uint8_t* p, Bytes v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), v.b);
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static Bytes load_table(const uint8_t* p) {
    const __m256i t =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {t, t};
  }
  static Bytes lookup(Bytes t, Bytes i) {
    return {_mm256_shuffle_epi8(t.a, i.a), _mm256_shuffle_epi8(t.b, i.b)};
  }
  template <int kShift> static __m256i shifted(__m256i v) {
    return kShift > 0   ? _mm256_srli_epi16(v, kShift > 0 ? kShift : 0)
           : kShift < 0 ? _mm256_slli_epi16(v, kShift < 0 ? -kShift : 0)
                        : v;
  }
  template <int kShift> static Bytes field(Bytes v, uint8_t mask) {
    const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
    return {_mm256_and_si256(shifted<kShift>(v.a), m), _mm256_and_si256(shifted<kShift>(v.b), m)};
  }
  static Bytes either(Bytes a, Bytes b) {
    return {_mm256_or_si256(a.a, b.a), _mm256_or_si256(a.b, b.b)};
  }
  static Ints zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static __m256i dot_narrow(__m256i sum, __m256i w, __m256i x, int times) {
    // 15 * 127 * 2 fits the 16-bit sums.
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x),
                                                   _mm256_set1_epi16(static_cast<short>(times))));
  }
  static __m256i dot_wide(__m256i sum, __m256i w, __m256i x) {
    const __m256i m = _mm256_set1_epi8(15);
    sum = dot_narrow(sum, _mm256_and_si256(w, m), x, 1);
    return dot_narrow(sum, _mm256_and_si256(_mm256_srli_epi16(w, 4), m), x, 16);
  }
  static Bytes four(const int8_t* x) {
    int32_t bytes;
    std::memcpy(&bytes, x, 4);
    const __m256i v = _mm256_set1_epi32(bytes);
    return {v, v};
  }
  template <bool kNarrow> static Ints dot(Ints sum, Bytes w, Bytes x) {
    if (kNarrow) return {dot_narrow(sum.a, w.a, x.a, 1), dot_narrow(sum.b, w.b, x.b, 1)};
    return {dot_wide(sum.a, w.a, x.a), dot_wide(sum.b, w.b, x.b)};
  }
  static Floats to_float(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
  template <int kByte> static __m256 byte(__m256i v) {
    return _mm256_cvtepi32_ps(
        _mm256_and_si256(_mm256_srli_epi32(v, 8 * kByte), _mm256_set1_epi32(255)));
  }
  template <int kByte> static Floats byte(Bytes v) { return {byte<kByte>(v.a), byte<kByte>(v.b)}; }
  static Floats set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static Floats mul(Floats x, Floats y) {
    return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
  }
  static Floats add(Floats x, Floats y) {
    return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
  }
  static Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static Floats load_floats(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  }
  static void store(float* p, Floats v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
  }
  static void store16(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
  static void store_half(uint16_t* p, Floats v) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    store16(p, _mm256_cvtps_ph(v.a, kNearest));
    store16(p + 8, _mm256_cvtps_ph(v.b, kNearest));
  }
  static __m256i bfloat_bits(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  }
  static void store_bfloat(uint16_t* p, Floats v) {
    // Packing works on halves of 128 bits, so the middle quarters change places.
    const __m256i packed = _mm256_packus_epi32(bfloat_bits(v.a), bfloat_bits(v.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
  }
  static void transpose(Floats* v) {
    alignas(32) float in[16][16], out[16][16];
    for (int i = 0; i < 16; i++) store(in[i], v[i]);
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 16; j++) out[j][i] = in[i][j];
    for (int i = 0; i < 16; i++) v[i] = load_floats(out[i]);
  }
  static __m128i load16(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  static Floats load_bytes(const uint8_t* p) {
    const __m128i v = load16(p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)))};
  }
  static Floats load_halves(const uint16_t* p) {
    return {_mm256_cvtph_ps(load16(p)), _mm256_cvtph_ps(load16(p + 8))};
  }
  static __m256 widened(__m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static Floats load_bfloats(const uint16_t* p) {
    return {widened(load16(p)), widened(load16(p + 8))};
  }
};

#else

// Loops over 16 lanes that a compiler turns into whatever vectors the machine has.
struct Isa {
  struct Bytes { uint8_t v[64]; };
  struct Ints { int32_t v[16]; };
  struct Floats { float v[16]; };
  static constexpr int kStripsAtOnce = 1, kTokensAtOnce = 4, kBlockSums = 4;

  static Bytes load(const uint8_t* p) {
    Bytes r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  static void store_bytes(uint8_t* p, const Bytes& v) { std::memcpy(p, v.v, 64); }
  static void prefetch(const void*) {}
  static Bytes load_table(const uint8_t* p) {
    Bytes r;
    for (int i = 0; i < 64; i++) r.v[i] = p[i % 16];
    return r;
  }
  static Bytes lookup(const Bytes& t, const Bytes& index) {
    Bytes r;
    for (int i = 0; i < 64; i++) r.v[i] = t.v[index.v[i]];
    return r;
  }
  template <int kShift> static Bytes field(const Bytes& v, uint8_t mask) {
    Bytes r;
    for (int i = 0; i < 64; i++) {
      const int byte = v.v[i];
      const int moved = kShift >= 0 ? byte >> (kShift >= 0 ? kShift : 0)
                                    : byte << (kShift < 0 ? -kShift : 0);
      r.v[i] = static_cast<uint8_t>(moved & mask);
    }
    return r;
  }
  static Bytes either(const Bytes& a, const Bytes& b) {
    Bytes r;
    for (int i = 0; i < 64; i++) r.v[i] = a.v[i] | b.v[i];
    return r;
  }
  static Ints zero() { return Ints{}; }
  struct Four { int8_t v[4]; };
  static Four four(const int8_t* x) { return {{x[0], x[1], x[2], x[3]}}; }
  template <bool kNarrow> static Ints dot(Ints sum, const Bytes& w, const Four& x) {
    for (int r = 0; r < 16; r++)
      sum.v[r] += w.v[4 * r] * x.v[0] + w.v[4 * r + 1] * x.v[1] + w.v[4 * r + 2] * x.v[2] +
                  w.v[4 * r + 3] * x.v[3];
    return sum;
  }
  template <class F> static Floats each(F f) {
    Floats r;
    for (int i = 0; i < 16; i++) r.v[i] = f(i);
    return r;
  }
  template <int kByte> static Floats byte(const Bytes& v) {
    return each([&](int i) { return static_cast<float>(v.v[4 * i + kByte]); });
  }
  static Floats to_float(const Ints& v) {
    return each([&](int i) { return static_cast<float>(v.v[i]); });
  }
  static Floats set(float v) { return each([=](int) { return v; }); }
  static Floats mul(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static Floats add(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static Floats load_floats(const float* p) {
    return each([=](int i) { return p[i]; });
  }
  static void store(float* p, const Floats& v) { std::memcpy(p, v.v, sizeof v.v); }
  static void store_half(uint16_t* p, const Floats& v) {
    for (int i = 0; i < 16; i++) p[i] = float_to_half(v.v[i]);
  }
  static void store_bfloat(uint16_t* p, const Floats& v) {
    for (int i = 0; i < 16; i++) p[i] = float_to_bfloat(v.v[i]);
  }
  static void transpose(Floats* v) {
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < i; j++) {
        const float t = v[i].v[j];
        v[i].v[j] = v[j].v[i];
        v[j].v[i] = t;
      }
  }
  static Floats load_bytes(const uint8_t* p) {
    return each([=](int i) { return static_cast<float>(p[i]); });
  }
  static Floats load_halves(const uint16_t* p) {
    return each([=](int i) { return half_to_float(p[i]); });
  }
  static Floats load_bfloats(const uint16_t* p) {
    return each([=](int i) { return bfloat_to_float(p[i]); });
  }
};

#endif

inline Isa::Floats load_typed(const void* p, size_t index, int type) {
  if (type == kFloat16) return Isa::load_halves(static_cast<const uint16_t*>(p) + index);
  if (type == kBFloat16) return Isa::load_bfloats(static_cast<const uint16_t*>(p) + index);
  return Isa::load_floats(static_cast<const float*>(p) + index);
}

inline void store_typed(void* p, size_t index, int type, const Isa::Floats& v) {
  if (type == kFloat16)
    Isa::store_half(static_cast<uint16_t*>(p) + index, v);
  else if (type == kBFloat16)
    Isa::store_bfloat(static_cast<uint16_t*>(p) + index, v);
  else
    Isa::store(static_cast<float*>(p) + index, v);
}
// The first `count` lanes, at most 16.
inline void store_some(void* p, size_t index, int type, const Isa::Floats& v, int count) {
  if (count == 16) return store_typed(p, index, type, v);
  float lanes[16];
  Isa::store(lanes, v);
  for (int i = 0; i < count; i++) {
    if (type == kFloat16)
      static_cast<uint16_t*>(p)[index + i] = float_to_half(lanes[i]);
    else if (type == kBFloat16)
      static_cast<uint16_t*>(p)[index + i] = float_to_bfloat(lanes[i]);
    else
      static_cast<float*>(p)[index + i] = lanes[i];
  }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
