// A prepared weight, as the kernels read it, and the activations they multiply it by.
//
// Rows lie in strips of 16, one strip after the other, so that 16 rows are 16 lanes of 32 bits. In a
// strip, four neighbouring columns (a quad) of one row are one 32-bit lane, and a vector of 64 bytes
// holds one or more quads of all 16 rows:
//
//     8 bits   1 quad    byte i of lane r: column i of row r
//     4 bits   2 quads   quad 0 in the low halves of the bytes, quad 1 in the high halves
//     2 bits   4 quads   quad j at bit 2 j of every byte
//     3 bits   the low two bits as for 2 bits, and for each 8 quads a vector of high bits: quad j at
//              bit j of every byte
//
// This is what the byte dot product of x86 (VPDPBUSD) and Arm (SDOT, UDOT) multiplies. Groups begin
// at multiples of 32 columns: each is padded with columns for which the activations are zero.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lowbit {

enum Kind : int32_t { kInt2 = 2, kInt3 = 3, kInt4 = 4, kInt8 = 8, kCodebook = 16 };
enum Type : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int kStrip = 16;      // rows of a strip
constexpr int kPad = 32;        // groups are padded to multiples of this many columns
constexpr int kSegment = 256;   // columns whose products are summed as integers
constexpr int kMaxTokens = 4;   // tokens that one pass over packed codes multiplies
constexpr int kTokenBlock = 64; // tokens whose activations are prepared at once

// The radix of a number in two bytes: value = 254 * high + low, both in -127 ... 127. With 256 the
// low byte could be -128, whose product with itself does not fit the 16-bit sums of AVX2.
constexpr int kRadix = 254;
// The largest such number whose high byte is not rounded up to 128.
constexpr int kLargest = kRadix * 127 + kRadix / 2 - 1;

struct Weight {
  int32_t kind;
  int32_t rows, columns;      // N, K
  int32_t group;              // columns of a full group, K for one group per row
  int32_t groups;
  int32_t scale_type;
  const uint8_t* codes;       // [strips][padded columns * bits / 8 * 16]
  const uint8_t* high;        // 3 bits: [strips][padded columns / 8 * 16]
  const void* scale;          // [strips][groups][16]
  const uint8_t* zero;        // [strips][groups][16], or null: 2^(bits-1)
  const uint8_t* table;       // codebook: 16 high bytes, 16 low bytes, each with 128 added
  const float* levels;        // codebook: 16 values
  float table_unit;           // codebook: value = unit * (254 * high + low)
};

inline int group_columns(const Weight& w, int g) {
  return g + 1 < w.groups ? w.group : w.columns - g * w.group;
}
inline int padded(int columns) { return (columns + kPad - 1) / kPad * kPad; }
inline int padded_columns(const Weight& w) {
  return (w.groups - 1) * padded(w.group) + padded(group_columns(w, w.groups - 1));
}
inline int strips(const Weight& w) { return (w.rows + kStrip - 1) / kStrip; }
inline int segments_of(int group_padded) { return (group_padded + kSegment - 1) / kSegment; }
inline int segments(const Weight& w) {
  return (w.groups - 1) * segments_of(padded(w.group)) +
         segments_of(padded(group_columns(w, w.groups - 1)));
}
inline int code_bits(const Weight& w) { return w.kind == kCodebook ? 4 : w.kind == kInt3 ? 2 : w.kind; }
inline size_t strip_bytes(const Weight& w) {
  return static_cast<size_t>(padded_columns(w)) * code_bits(w) / 8 * kStrip;
}

// Activations as integers: per token and segment one scale, `planes` bytes per value, high first.
//
// Segments come first and tokens second: what is multiplied together lies together. (A row of x per
// token would be a power of two apart, and all of them in the same few sets of the cache.)
struct Activations {
  int planes;
  int tokens;
  // 0: a unit per token and segment, from the largest value there; -1: one per token; above: that
  // unit for all, and values beyond 127 of it are 127.
  float step;
  // [segments][tokens][columns of the segment / 4][planes][4]. AVX2 has products of 16-bit words, but
  // hardly of bytes: two planes are four words there, high and low together, columns 0, 2, 1, 3.
  int8_t* bytes;
  float* unit;        // [segments][tokens]: value = unit * integer
  float* sum_high;    // [segments][tokens]: sums of the bytes
  float* sum_low;
};

}  // namespace lowbit
