// Integer products for more tokens than one pass over packed codes can hold in registers.
//
// The codes of one segment of a few strips are unpacked into bytes once, in the first-level cache,
// and multiplied with blocks of tokens: one load of codes and one of activations feed several
// products.
#pragma once
#include "product.h"

namespace lowbit {
namespace LOWBIT_ISA {

// Bytes of an unpacked segment. Not a power of two: two strips 4096 bytes apart share one place in
// AMD's prediction of cache ways, and the loop takes three times as long.
constexpr int kSegmentBytes = kSegment * 16 + 64;

// One segment of one strip as bytes, [quads][64]; for a codebook also its low bytes.
template <int kKind>
inline void unpack_segment(const uint8_t* codes, const uint8_t* high, int columns,
                           const Isa::Bytes& table_high, const Isa::Bytes& table_low,
                           uint8_t* bytes, uint8_t* low_bytes) {
  using Layout = Codes<kKind>;
  for (int i = 0; i < columns; i += Layout::kColumns) {
    Isa::prefetch(codes + kAhead);
    Layout::visit(codes, high, table_high, table_low,
                  [&](int quad, const Isa::Bytes& w, const Isa::Bytes& w_low) {
                    Isa::store_bytes(bytes + quad * 64, w);
                    if (kKind == kCodebook) Isa::store_bytes(low_bytes + quad * 64, w_low);
                  });
    codes += Layout::kBytes;
    high += Layout::kHigh;
    bytes += Layout::kColumns * 16;
    low_bytes += Layout::kColumns * 16;
  }
}

template <int kKind, int kPlanes, int kTokens, int kStrips>
LOWBIT_LOOP void block_sums(const uint8_t* bytes, const uint8_t* low_bytes, size_t strip_stride,
                       int quads, const int8_t* x, size_t x_stride,
                       Isa::Ints (&sums)[kTokens][kStrips][kPlanes]) {
  constexpr bool kNarrow = kKind != kInt8 && kKind != kCodebook;
  Isa::Ints v[kTokens][kStrips][kPlanes];
#pragma GCC unroll 16
  for (int m = 0; m < kTokens; m++)
#pragma GCC unroll 4
    for (int n = 0; n < kStrips; n++)
#pragma GCC unroll 2
      for (int p = 0; p < kPlanes; p++) v[m][n][p] = Isa::zero();
  for (int q = 0; q < quads; q++) {
    Isa::Bytes w[kStrips], w_low[kStrips];
#pragma GCC unroll 4
    for (int n = 0; n < kStrips; n++) {
      w[n] = Isa::load(bytes + n * strip_stride + q * 64);
      if (kKind == kCodebook && kPlanes == 2)
        w_low[n] = Isa::load(low_bytes + n * strip_stride + q * 64);
    }
    const int8_t* xq = x + q * 4 * kPlanes;
#pragma GCC unroll 16
    for (int m = 0; m < kTokens; m++) {
      const Isa::Four x_high = Isa::four(xq + m * x_stride);
      const Isa::Four x_low = Isa::four(xq + m * x_stride + 4 * (kPlanes - 1));
#pragma GCC unroll 4
      for (int n = 0; n < kStrips; n++) {
        v[m][n][0] = Isa::template dot<kNarrow>(v[m][n][0], w[n], x_high);
        if (kPlanes == 2) {
          v[m][n][kPlanes - 1] = Isa::template dot<kNarrow>(v[m][n][kPlanes - 1], w[n], x_low);
          if (kKind == kCodebook)
            v[m][n][kPlanes - 1] =
                Isa::template dot<kNarrow>(v[m][n][kPlanes - 1], w_low[n], x_high);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kTokens; m++)
#pragma GCC unroll 4
    for (int n = 0; n < kStrips; n++)
#pragma GCC unroll 2
      for (int p = 0; p < kPlanes; p++) sums[m][n][p] = v[m][n][p];
}

template <int kStrips> struct SegmentScale {
  Isa::Floats scale[kStrips], zero[kStrips];
};

// Adds one segment's products of kTokens tokens to out [tokens][kStrips * 16].
template <int kKind, int kPlanes, int kTokens, int kStrips>
inline void block_segment(const Weight& w, const Activations& a, int token, int index,
                          const uint8_t* bytes, const uint8_t* low_bytes, const int8_t* x,
                          int columns, const SegmentScale<kStrips>& scales, float* out) {
  Isa::Ints sums[kTokens][kStrips][kPlanes];
  const size_t row_bytes = static_cast<size_t>(columns) * kPlanes;
  block_sums<kKind, kPlanes, kTokens, kStrips>(bytes, low_bytes, kSegmentBytes, columns / 4,
                                               x + token * row_bytes, row_bytes, sums);
#pragma GCC unroll 16
  for (int m = 0; m < kTokens; m++) {
    const size_t at = static_cast<size_t>(index) * a.tokens + token + m;
    const SegmentUnit part = segment_unit<kKind, kPlanes>(w, a, at);
    float* row = out + (token + m) * kStrips * kStrip;
#pragma GCC unroll 4
    for (int n = 0; n < kStrips; n++)
      Isa::store(row + n * kStrip,
                 scaled_sum<kPlanes>(sums[m][n], part, scales.scale[n], scales.zero[n],
                                     Isa::load_floats(row + n * kStrip)));
  }
}

template <int kKind, int kPlanes, int kStrips>
void multiply_block_strips(const Weight& w, const Activations& a, int strip, float* out,
                           size_t out_stride) {
  using Layout = Codes<kKind>;
  constexpr bool kTwoTables = kKind == kCodebook;
  constexpr int kTokens = Isa::kBlockSums / kPlanes / kStrips > 2 ? Isa::kBlockSums / kPlanes / kStrips : 2;
  const size_t bytes_of_strip = strip_bytes(w);
  const size_t high_of_strip = Layout::kHigh ? static_cast<size_t>(padded_columns(w)) * 2 : 0;
  alignas(64) uint8_t bytes[kStrips][kSegmentBytes];
  alignas(64) uint8_t low_bytes[kTwoTables ? kStrips : 1][kTwoTables ? kSegmentBytes : 64];
  alignas(64) float sums[kTokenBlock * kStrips * kStrip] = {};
  Isa::Bytes table_high = {}, table_low = {};
  if (kTwoTables) {
    table_high = Isa::load_table(w.table);
    table_low = Isa::load_table(w.table + 16);
  }
  const int8_t* x = a.bytes;
  const uint8_t* codes = w.codes + strip * bytes_of_strip;
  const uint8_t* high = Layout::kHigh ? w.high + strip * high_of_strip : w.codes;
  int index = 0;
  for (int g = 0; g < w.groups; g++) {
    SegmentScale<kStrips> scales;
    for (int n = 0; n < kStrips; n++)
      load_scale<kKind>(w, strip + n, g, scales.scale[n], scales.zero[n]);
    const int group = padded(group_columns(w, g));
    for (int start = 0; start < group; start += kSegment, index++) {
      const int length = group - start < kSegment ? group - start : kSegment;
      for (int n = 0; n < kStrips; n++)
        unpack_segment<kKind>(codes + n * bytes_of_strip, high + n * high_of_strip, length,
                              table_high, table_low, bytes[n], low_bytes[kTwoTables ? n : 0]);
      int m = 0;
      for (; m + kTokens <= a.tokens; m += kTokens)
        block_segment<kKind, kPlanes, kTokens, kStrips>(w, a, m, index, bytes[0], low_bytes[0], x,
                                                        length, scales, sums);
      for (; m + 2 <= a.tokens; m += 2)
        block_segment<kKind, kPlanes, 2, kStrips>(w, a, m, index, bytes[0], low_bytes[0], x,
                                                  length, scales, sums);
      if (m < a.tokens)
        block_segment<kKind, kPlanes, 1, kStrips>(w, a, m, index, bytes[0], low_bytes[0], x,
                                                  length, scales, sums);
      codes += static_cast<size_t>(length) / Layout::kColumns * Layout::kBytes;
      high += static_cast<size_t>(length) / Layout::kColumns * Layout::kHigh;
      x += static_cast<size_t>(length) * kPlanes * a.tokens;
    }
  }
  for (int m = 0; m < a.tokens; m++)
    std::memcpy(out + m * out_stride, sums + m * kStrips * kStrip, sizeof(float) * kStrips * kStrip);
}

template <int kKind, int kPlanes>
void multiply_block_range(const Weight& w, const Activations& a, int first, int last,
                          float* out, size_t out_stride) {
  int strip = first;
  for (; strip + 2 <= last; strip += 2)
    multiply_block_strips<kKind, kPlanes, 2>(w, a, strip, out + strip * kStrip, out_stride);
  if (strip < last)
    multiply_block_strips<kKind, kPlanes, 1>(w, a, strip, out + strip * kStrip, out_stride);
}

template <int kKind>
void multiply_block_planes(const Weight& w, const Activations& a, int first, int last,
                           float* out, size_t out_stride) {
  if (a.planes == 2)
    multiply_block_range<kKind, 2>(w, a, first, last, out, out_stride);
  else
    multiply_block_range<kKind, 1>(w, a, first, last, out, out_stride);
}

inline void multiply_block(const Weight& w, const Activations& a, int first, int last,
                           float* out, size_t out_stride) {
  switch (w.kind) {
    case kInt2: return multiply_block_planes<kInt2>(w, a, first, last, out, out_stride);
    case kInt3: return multiply_block_planes<kInt3>(w, a, first, last, out, out_stride);
    case kInt4: return multiply_block_planes<kInt4>(w, a, first, last, out, out_stride);
    case kInt8: return multiply_block_planes<kInt8>(w, a, first, last, out, out_stride);
    default: return multiply_block_planes<kCodebook>(w, a, first, last, out, out_stride);
  }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
