// Adds bfloat16 products by VDPBF16PS to what AVX-512 offers.
#define LOWBIT_ISA avx512bf16
#include "bf16.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

struct DotProducts {
  struct Registers {};

  // Adds the products of kTokens tokens with kStrips decoded strips to sums [tokens][kBlockRows].
  template <int kTokens, int kStrips>
  static LOWBIT_LOOP void tile(const uint16_t* panel, const uint16_t* x, int pairs, float* sums) {
    __m512 v[kTokens][kStrips];
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; m++)
#pragma GCC unroll 4
      for (int n = 0; n < kStrips; n++)
        v[m][n] = _mm512_loadu_ps(sums + m * kBlockRows + n * kStrip);
    for (int k = 0; k < pairs; k++) {
      __m512bh w[kStrips];
#pragma GCC unroll 4
      for (int n = 0; n < kStrips; n++)
        std::memcpy(&w[n], panel + n * kPanelStride + k * 2 * kStrip, 64);
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; m++) {
        int32_t two;
        std::memcpy(&two, x + m * kBlockColumns + 2 * k, 4);
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
        for (int n = 0; n < kStrips; n++) v[m][n] = _mm512_dpbf16_ps(v[m][n], w[n], pair);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; m++)
#pragma GCC unroll 4
      for (int n = 0; n < kStrips; n++)
        _mm512_storeu_ps(sums + m * kBlockRows + n * kStrip, v[m][n]);
  }

  template <int kStrips>
  static void strips(const uint16_t* panel, const uint16_t* x, int tokens, int pairs, float* sums) {
    constexpr int kAtOnce = 6;  // 24 of 32 registers are sums, four weights
    for (; tokens >= kAtOnce; tokens -= kAtOnce) {
      tile<kAtOnce, kStrips>(panel, x, pairs, sums);
      x += kAtOnce * kBlockColumns;
      sums += kAtOnce * kBlockRows;
    }
    switch (tokens) {
      case 5: return tile<5, kStrips>(panel, x, pairs, sums);
      case 4: return tile<4, kStrips>(panel, x, pairs, sums);
      case 3: return tile<3, kStrips>(panel, x, pairs, sums);
      case 2: return tile<2, kStrips>(panel, x, pairs, sums);
      case 1: return tile<1, kStrips>(panel, x, pairs, sums);
    }
  }

  static void block(const uint16_t* panel, const uint16_t* x, int tokens, int columns, int count,
                    float* sums) {
    switch (count) {
      case 1: return strips<1>(panel, x, tokens, columns / 2, sums);
      case 2: return strips<2>(panel, x, tokens, columns / 2, sums);
      case 3: return strips<3>(panel, x, tokens, columns / 2, sums);
      default: return strips<4>(panel, x, tokens, columns / 2, sums);
    }
  }
};

}  // namespace
}  // namespace LOWBIT_ISA

const Kernels& avx512bf16_kernels() {
  using namespace LOWBIT_ISA;
  static const Kernels kernels = [] {
    Kernels all = avx512_kernels();
    all.arrange = arrange;
    all.multiply_pairs = multiply_pairs<DotProducts>;
    return all;
  }();
  return kernels;
}

}  // namespace lowbit
