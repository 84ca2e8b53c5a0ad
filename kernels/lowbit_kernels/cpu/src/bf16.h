// Products of bfloat16 activations with weights decoded to bfloat16, for many tokens.
//
// A block of weights, kBlockStrips strips by kBlockColumns columns, is decoded once, in the
// first-level cache, and multiplied with all tokens of the call. A decoded strip is
//
//     [pairs of columns][16 rows][2] bfloat16
//
// which is at once the operand of VDPBF16PS (a vector per pair) and a B tile of AMX (16 pairs).
// Padding columns decode to scale * (0 - zero) and meet activations of zero.
//
// Sums of one row and token run over the columns in one order, whatever lies beside them.
#pragma once
#include "product.h"

namespace lowbit {
namespace LOWBIT_ISA {

// Where decoding a strip has come to: columns are decoded in order, a block at a time.
struct Cursor {
  const uint8_t* codes;
  const uint8_t* high;
  int strip, group;
  int left;  // padded columns of the group
};

template <int kKind> inline Cursor begin_strip(const Weight& w, int strip) {
  const size_t high_of_strip = Codes<kKind>::kHigh ? static_cast<size_t>(padded_columns(w)) * 2 : 0;
  return {w.codes + strip * strip_bytes(w), w.high + strip * high_of_strip, strip, 0,
          padded(group_columns(w, 0))};
}

// What decoding needs beside the codes of a group. Two neighbouring lanes belong to one row: lanes
// 2 r and 2 r + 1 of [0] to row r, those of [1] to row 8 + r.
struct GroupScale {
  __m512 scale[2], zero[2];
};

// 2^23 + code, for a code in the lowest byte, is this with the byte put in.
constexpr float kIntegers = 8388608.0f;

template <int kKind> inline GroupScale group_scale(const Weight& w, int strip, int group) {
  __m512 scale, zero;
  load_scale<kKind>(w, strip, group, scale, zero);
  zero = _mm512_add_ps(zero, _mm512_set1_ps(kIntegers));
  const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {{_mm512_permutexvar_ps(first, scale), _mm512_permutexvar_ps(second, scale)},
          {_mm512_permutexvar_ps(first, zero), _mm512_permutexvar_ps(second, zero)}};
}

// Bytes 4 r + 2 pair and 4 r + 2 pair + 1 of a quad, r = 8 half ... 8 half + 7, to the lowest bytes
// of 16 lanes.
inline __m512i pair_bytes(int pair, int half) {
  const __m512i first = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29);
  return _mm512_add_epi32(first, _mm512_set1_epi32(2 * pair + 32 * half));
}

// 16 values of a quad in float32: scale * (code - zero), or scale * level.
template <int kKind>
inline __m512 decoded(__m512i quad, __m512i bytes, __m512 levels, const GroupScale& s, int half) {
  if (kKind == kCodebook) {
    // Only the lowest four bits of a lane count.
    const __m512i index = _mm512_permutexvar_epi8(bytes, quad);
    return _mm512_mul_ps(_mm512_permutexvar_ps(index, levels), s.scale[half]);
  }
  const __m512i integer = _mm512_mask_permutexvar_epi8(
      _mm512_castps_si512(_mm512_set1_ps(kIntegers)), 0x1111111111111111ull, bytes, quad);
  return _mm512_mul_ps(_mm512_sub_ps(_mm512_castsi512_ps(integer), s.zero[half]), s.scale[half]);
}

// The next `columns` columns of one group, [columns / 2][16][2]. The codes of the next block are
// asked for meanwhile: there is time to read them while this one is multiplied.
template <int kKind>
LOWBIT_LOOP void decode_run(Cursor& at, int columns, const GroupScale& scales, const float* level,
                            uint16_t* out) {
  using Layout = Codes<kKind == kCodebook ? kInt4 : kKind>;  // codes, not what they stand for
  constexpr int kNextBlock = kBlockColumns / Layout::kColumns;
  const __m512i bytes[2][2] = {{pair_bytes(0, 0), pair_bytes(0, 1)},
                               {pair_bytes(1, 0), pair_bytes(1, 1)}};
  const __m512 levels = kKind == kCodebook ? _mm512_loadu_ps(level) : _mm512_setzero_ps();
  const GroupScale s = scales;  // in registers
  const Isa::Bytes none = {};
  const uint8_t* codes = at.codes;
  const uint8_t* high = at.high;
  for (int i = 0; i < columns; i += Layout::kColumns) {
    for (int line = 0; line < Layout::kBytes; line += 64)
      Isa::prefetch(codes + kNextBlock * Layout::kBytes + line);
    if (Layout::kHigh) Isa::prefetch(high + kNextBlock * Layout::kHigh);
    Layout::visit(codes, high, none, none, [&](int quad, __m512i v, __m512i) {
      for (int pair = 0; pair < 2; pair++) {
        const __m512 first = decoded<kKind>(v, bytes[pair][0], levels, s, 0);
        const __m512 second = decoded<kKind>(v, bytes[pair][1], levels, s, 1);
        const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
        std::memcpy(out + (quad * 2 + pair) * 2 * kStrip, &both, 64);
      }
    });
    codes += Layout::kBytes;
    high += Layout::kHigh;
    out += Layout::kColumns * kStrip;
  }
  at.codes = codes;
  at.high = high;
}

// The next `columns` padded columns of a strip, of as many groups as they belong to.
template <int kKind>
inline void decode_columns(const Weight& w, Cursor& at, int columns, uint16_t* out) {
  while (columns > 0) {
    if (at.left == 0) at.left = padded(group_columns(w, ++at.group));
    const int run = columns < at.left ? columns : at.left;
    decode_run<kKind>(at, run, group_scale<kKind>(w, at.strip, at.group), w.levels, out);
    at.left -= run;
    columns -= run;
    out += static_cast<size_t>(run) * kStrip;
  }
}

// One token of `x`, [columns], or zeros for null, into the blocks that are multiplied,
// [blocks][rows][kBlockColumns].
inline void arrange(const Weight& w, const uint16_t* x, int token, int rows, uint16_t* out) {
  const size_t block = static_cast<size_t>(rows) * kBlockColumns;
  out += static_cast<size_t>(token) * kBlockColumns;
  int at = 0;  // the padded column
  for (int g = 0; g < w.groups; g++) {
    int left = group_columns(w, g), padding = padded(left) - left;
    while (left + padding > 0) {
      const int room = kBlockColumns - at % kBlockColumns;
      const int count = left < room ? left : room;
      const int zeros = padding < room - count ? padding : room - count;
      uint16_t* to = out + at / kBlockColumns * block + at % kBlockColumns;
      if (x) {
        std::memcpy(to, x, sizeof(uint16_t) * count);
        x += count;
      } else {
        std::memset(to, 0, sizeof(uint16_t) * count);
      }
      std::memset(to + count, 0, sizeof(uint16_t) * zeros);
      at += count + zeros;
      left -= count;
      padding -= zeros;
    }
  }
}

// Sums of `tokens` tokens and the rows of `count` strips, [tokens][kBlockRows]. Multiply::block
// adds the products of one decoded block to them.
template <class Multiply, int kKind>
void multiply_pairs_kind(const Weight& w, const uint16_t* x, int tokens, int rows, int strip,
                         int count, uint16_t* panel, float* sums) {
  Cursor at[kBlockStrips];
  for (int n = 0; n < count; n++) at[n] = begin_strip<kKind>(w, strip + n);
  const int columns = padded_columns(w);
  for (int start = 0; start < columns; start += kBlockColumns) {
    const int length = columns - start < kBlockColumns ? columns - start : kBlockColumns;
    for (int n = 0; n < count; n++)
      decode_columns<kKind>(w, at[n], length, panel + n * kPanelStride);
    Multiply::block(panel, x, tokens, length, count, sums);
    x += static_cast<size_t>(rows) * kBlockColumns;
  }
}

template <class Multiply>
void multiply_pairs(const Weight& w, const uint16_t* x, int tokens, int rows, int strip, int count,
                    uint16_t* panel, float* sums) {
  std::memset(sums, 0, sizeof(float) * rows * kBlockRows);
  [[maybe_unused]] const typename Multiply::Registers registers;  // set up, and given back
  const auto run = [&](auto multiply) { multiply(w, x, tokens, rows, strip, count, panel, sums); };
  switch (w.kind) {
    case kInt2: return run(multiply_pairs_kind<Multiply, kInt2>);
    case kInt3: return run(multiply_pairs_kind<Multiply, kInt3>);
    case kInt4: return run(multiply_pairs_kind<Multiply, kInt4>);
    case kInt8: return run(multiply_pairs_kind<Multiply, kInt8>);
    default: return run(multiply_pairs_kind<Multiply, kCodebook>);
  }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
