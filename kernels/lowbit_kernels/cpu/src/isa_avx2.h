// Vector operations of AVX2: 64 bytes are two registers. Included by `isa.h`.
#pragma once
#include <immintrin.h>

#include <cstring>

namespace lowbit {
namespace LOWBIT_ISA {

struct Isa {
  struct Bytes { __m256i a, b; };
  using Ints = Bytes;
  using Four = Bytes;
  struct Floats { __m256 a, b; };
  static constexpr bool kWords = true;  // two planes of activations are words of 16 bits
  static constexpr bool kUnpacks = true;      // see block.h
  static constexpr bool kInRegisters = true;
  static constexpr int kSums = 1, kTileStrips = 1, kBlockSums = 4, kTokensAtOnce = 6;

  static Bytes load(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  static void store_bytes(uint8_t* p, Bytes v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), v.b);
  }
  // Not the intrinsic: GCC takes loops of nothing else for ones without effects.
  static void prefetch(const void* p) {
    asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p)));
  }
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
  // Columns 0 and 2 of every lane, and columns 1 and 3.
  struct Words { Bytes even, odd; };
  static Words words(Bytes v) {
    const __m256i m = _mm256_set1_epi16(255);
    return {{_mm256_and_si256(v.a, m), _mm256_and_si256(v.b, m)},
            {_mm256_srli_epi16(v.a, 8), _mm256_srli_epi16(v.b, 8)}};
  }
  // Adds the products with two words of 16 bits each.
  static Ints dot_words(Ints sum, const Words& w, Bytes even, Bytes odd) {
    return {_mm256_add_epi32(sum.a, _mm256_add_epi32(_mm256_madd_epi16(w.even.a, even.a),
                                                     _mm256_madd_epi16(w.odd.a, odd.a))),
            _mm256_add_epi32(sum.b, _mm256_add_epi32(_mm256_madd_epi16(w.even.b, even.b),
                                                     _mm256_madd_epi16(w.odd.b, odd.b)))};
  }
  static Floats to_float(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
  template <int kByte> static __m256 byte(__m256i v) {
    return _mm256_cvtepi32_ps(
        _mm256_and_si256(_mm256_srli_epi32(v, 8 * kByte), _mm256_set1_epi32(255)));
  }
  template <int kByte> static Floats byte(Bytes v) { return {byte<kByte>(v.a), byte<kByte>(v.b)}; }
  struct Levels { __m256 a, b; };
  static Levels load_levels(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  template <int kByte> static __m256 level(const Levels& levels, __m256i v) {
    const __m256i index = _mm256_srli_epi32(v, 8 * kByte);  // of three bits, and one that chooses
    const __m256 chosen = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(levels.a, index),
                            _mm256_permutevar8x32_ps(levels.b, index), chosen);
  }
  template <int kByte> static Floats level(const Levels& levels, Bytes v) {
    return {level<kByte>(levels, v.a), level<kByte>(levels, v.b)};
  }
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

}  // namespace LOWBIT_ISA
}  // namespace lowbit
