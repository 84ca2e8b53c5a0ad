// Vector operations of AVX-512 with VNNI. Included by `isa.h`.
#pragma once
#include <immintrin.h>

#include <cstring>

namespace lowbit {
namespace LOWBIT_ISA {

struct Isa {
  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  using Four = Bytes;
  static constexpr bool kWords = false;  // two planes of activations are words of 16 bits
  static constexpr bool kUnpacks = false;      // see block.h
  static constexpr bool kInRegisters = true;
  static constexpr int kSums = 16, kTileStrips = 2, kBlockSums = 24, kTokensAtOnce = 14;

  static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_bytes(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
  // Not the intrinsic: GCC takes loops of nothing else for ones without effects.
  static void prefetch(const void* p) {
    asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p)));
  }
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
  // Not the intrinsic: GCC 12 copies sums of it at every step, and in time runs out of registers.
  template <bool kNarrow> static Ints dot(Ints sum, Bytes w, Bytes x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
  static Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
  // Byte `kByte` of every lane as a float.
  template <int kByte> static Floats byte(Bytes v) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(v, 8 * kByte), _mm512_set1_epi32(255)));
  }
  // 16 float32 values, looked up by `level`: byte `kByte` of every lane, below 16, is the index.
  using Levels = __m512;
  static Levels load_levels(const float* p) { return _mm512_loadu_ps(p); }
  template <int kByte> static Floats level(Levels levels, Bytes v) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(v, 8 * kByte), levels);  // of four bits
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

}  // namespace LOWBIT_ISA
}  // namespace lowbit
