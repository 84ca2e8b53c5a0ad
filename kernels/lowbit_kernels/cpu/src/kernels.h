// What one instruction set offers, behind function pointers: `api.cpp` picks a set at run time.
#pragma once
#include <cstddef>
#include <cstdint>

#include "weight.h"

namespace lowbit {

// Bfloat16 products (bf16.h) decode this much of a weight at a time.
constexpr int kBlockStrips = 4;
constexpr int kBlockRows = kBlockStrips * kStrip;
constexpr int kBlockColumns = 256;
// Elements from one decoded strip to the next. Not a power of two: AMD's prediction of cache ways
// takes places 4096 bytes apart for one, and a loop over both takes three times as long.
constexpr int kPanelStride = kBlockColumns * kStrip + 32;
// Tokens that are multiplied with a block while it is there, and what their number is padded to.
constexpr int kPairTokens = 512, kTokenTile = 16;

struct Kernels {
  // Rows of x of any type as float32 in the padded order of columns, [padded columns].
  void (*widen)(const Weight& w, const void* x, int type, float* out);
  // One token as integers. `x` is what `widen` wrote.
  void (*quantize)(const Weight& w, const float* x, int token, const Activations& a);
  // Products of up to kMaxTokens tokens with the rows of strips first ... last - 1.
  void (*multiply)(const Weight& w, const Activations& a, int first, int last, float* out,
                   size_t out_stride);
  // The same for up to kTokenBlock tokens.
  void (*multiply_block)(const Weight& w, const Activations& a, int first, int last, float* out,
                         size_t out_stride);
  // The same for any number of float32 tokens [tokens][padded columns]; weights are decoded into
  // `panel`, float32 [panel_floats(w)], once for all of them.
  void (*multiply_many)(const Weight& w, const float* x, int tokens, int first, int last,
                        float* panel, float* out, size_t out_stride);
  // The first `rows` rows of a strip as `type` [rows][columns].
  void (*decode)(const Weight& w, int strip, int rows, float* panel, void* out, int type);
  // Float32 sums as another type, with the bias added before rounding where there is one; `in` may
  // be read up to a multiple of 16.
  void (*narrow)(const float* in, const float* bias, int count, int type, void* out);
  // Bfloat16 products; null where the instruction set has none. One token of x, [columns] or null
  // for zeros, as row `token` of [blocks of columns][rows][kBlockColumns].
  void (*arrange)(const Weight& w, const uint16_t* x, int token, int rows, uint16_t* out);
  // Products of the first `tokens` of those rows (`rows`: them, up to a multiple of kTokenTile) with
  // `count` strips, [rows][kBlockRows]. `panel` is bfloat16 [kBlockStrips][kPanelStride].
  void (*multiply_pairs)(const Weight& w, const uint16_t* x, int tokens, int rows, int strip,
                         int count, uint16_t* panel, float* sums);
};

inline size_t panel_floats(const Weight& w) {
  return static_cast<size_t>(padded_columns(w)) * kStrip;
}

const Kernels& amx_kernels();
const Kernels& avx512bf16_kernels();
const Kernels& avx512_kernels();
const Kernels& avx2_kernels();
const Kernels& portable_kernels();

}  // namespace lowbit
