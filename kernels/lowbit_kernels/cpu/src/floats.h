// Activations in and out of the kernels, and products in float32 for many tokens.
#pragma once
#include <utility>

#include "block.h"

namespace lowbit {
namespace LOWBIT_ISA {

inline void widen_run(const void* x, size_t from, int count, int type, float* out) {
  if (type == kFloat32) {
    std::memcpy(out, static_cast<const float*>(x) + from, sizeof(float) * count);
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(x) + from;
  int i = 0;
  for (; i + 16 <= count; i += 16) Isa::store(out + i, load_typed(bits, i, type));
  for (; i < count; i++)
    out[i] = type == kFloat16 ? half_to_float(bits[i]) : bfloat_to_float(bits[i]);
}

inline void widen(const Weight& w, const void* x, int type, float* out) {
  for (int g = 0; g < w.groups; g++) {
    const int columns = group_columns(w, g), width = padded(columns);
    widen_run(x, static_cast<size_t>(g) * w.group, columns, type, out);
    std::memset(out + columns, 0, sizeof(float) * (width - columns));
    out += width;
  }
}

// Adding and subtracting 1.5 * 2^23 rounds to the nearest even integer, in any vector.
inline float rounded(float v) {
  const float magic = 12582912.0f;
  return (v + magic) - magic;
}

// Bits of the largest magnitude: positive floats are ordered as their bits, NaN above infinity.
inline int32_t largest_bits(const float* x, int columns) {
  int32_t largest = 0;
  for (int i = 0; i < columns; i++) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// What integers are multiplied by to give values, and values to give integers.
struct Units {
  float unit, inverse;
};

inline Units units_of(int32_t bits, int planes, float step) {
  float largest;
  std::memcpy(&largest, &bits, 4);
  if (step > 0.0f) return {largest != largest ? largest : step, largest != largest ? 0.0f : 1.0f / step};
  const float top = planes == 2 ? static_cast<float>(kLargest) : 127.0f;
  // What is too small for its inverse to exist counts as zero; NaN and infinity give NaN.
  return {std::isfinite(largest) ? largest / top : largest - largest,
          largest > 0.0f && std::isfinite(top / largest) ? top / largest : 0.0f};
}

inline void quantize_segment(const float* x, int columns, int planes, const Units& units,
                             bool clamped, int8_t* bytes, float* sum_high, float* sum_low) {
  alignas(64) int32_t high[kSegment], low[kSegment];
  int32_t total_high = 0, total_low = 0;
  for (int i = 0; i < columns; i++) {
    float scaled = x[i] * units.inverse;
    if (clamped) scaled = scaled > 127.0f ? 127.0f : scaled < -127.0f ? -127.0f : scaled;
    // The unit is NaN then; NaN as an integer is undefined, and a sum of what x86 makes of it overflows.
    if (scaled != scaled) scaled = 0.0f;
    const float value = rounded(scaled);
    const float upper = planes == 2 ? rounded(value * (1.0f / kRadix)) : value;
    high[i] = static_cast<int32_t>(upper);
    low[i] = static_cast<int32_t>(value - upper * kRadix);
    total_high += high[i];
    total_low += low[i];
  }
  *sum_high = static_cast<float>(total_high);
  *sum_low = planes == 2 ? static_cast<float>(total_low) : 0.0f;
  for (int quad = 0; quad < columns / 4; quad++) {
    int8_t* out = bytes + quad * 4 * planes;
    const int32_t *upper = high + 4 * quad, *lower = low + 4 * quad;
    if (Isa::kWords && planes == 2) {
      int16_t words[4];
      for (int i = 0; i < 4; i++) words[i] = static_cast<int16_t>(kRadix * upper[i] + lower[i]);
      std::swap(words[1], words[2]);
      std::memcpy(out, words, sizeof(words));
      continue;
    }
    for (int i = 0; i < 4; i++) {
      out[i] = static_cast<int8_t>(upper[i]);
      if (planes == 2) out[4 + i] = static_cast<int8_t>(lower[i]);
    }
  }
}

inline void quantize(const Weight& w, const float* x, int token, const Activations& a) {
  int8_t* bytes = a.bytes;
  size_t at = token;
  const bool shared = a.step != 0.0f;
  Units units = {};
  if (shared) units = units_of(largest_bits(x, padded_columns(w)), a.planes, a.step);
  for (int g = 0; g < w.groups; g++) {
    const int group = padded(group_columns(w, g));
    for (int start = 0; start < group; start += kSegment, at += a.tokens) {
      const int length = group - start < kSegment ? group - start : kSegment;
      const size_t row = static_cast<size_t>(length) * a.planes;
      if (!shared) units = units_of(largest_bits(x, length), a.planes, 0.0f);
      quantize_segment(x, length, a.planes, units, a.step > 0.0f, bytes + token * row,
                       a.sum_high + at, a.sum_low + at);
      a.unit[at] = units.unit;
      x += length;
      bytes += a.tokens * row;
    }
  }
}

// What codes of one group become: scale * (code - zero), or scale * level.
template <int kKind> struct Decoder {
  Isa::Floats scale, minus_zero;
  Isa::Levels levels;

  template <int kByte> Isa::Floats value(const Isa::Bytes& v) const {
    if constexpr (kKind == kCodebook)
      return Isa::mul(Isa::template level<kByte>(levels, v), scale);
    else
      return Isa::mul(Isa::add(Isa::template byte<kByte>(v), minus_zero), scale);
  }
};

// One strip as float32 [padded columns][16], rounded once.
template <int kKind> void decode_panel(const Weight& w, int strip, float* panel) {
  using Layout = Codes<kKind == kCodebook ? kInt4 : kKind>;  // codes, not what they stand for
  const uint8_t* p = w.codes + strip * strip_bytes(w);
  const uint8_t* h = w.high + static_cast<size_t>(strip) * padded_columns(w) * 2;
  const float middle = kKind == kCodebook ? 0.0f : static_cast<float>(1 << (w.kind - 1));
  const Isa::Bytes none = {};
  Decoder<kKind> decoder = {};
  if (kKind == kCodebook) decoder.levels = Isa::load_levels(w.levels);
  for (int g = 0; g < w.groups; g++) {
    const size_t at = (static_cast<size_t>(strip) * w.groups + g) * kStrip;
    decoder.scale = load_typed(w.scale, at, w.scale_type);
    decoder.minus_zero =
        Isa::mul(w.zero ? Isa::load_bytes(w.zero + at) : Isa::set(middle), Isa::set(-1.0f));
    const int group = padded(group_columns(w, g));
    for (int i = 0; i < group; i += Layout::kColumns) {
      Layout::visit(p, h, none, none, [&](int quad, const Isa::Bytes& v, const Isa::Bytes&) {
        float* out = panel + quad * 4 * kStrip;
        Isa::store(out, decoder.template value<0>(v));
        Isa::store(out + 16, decoder.template value<1>(v));
        Isa::store(out + 32, decoder.template value<2>(v));
        Isa::store(out + 48, decoder.template value<3>(v));
      });
      p += Layout::kBytes;
      h += Layout::kHigh;
      panel += Layout::kColumns * kStrip;
    }
  }
}

inline void decode_any(const Weight& w, int strip, float* panel) {
  switch (w.kind) {
    case kInt2: return decode_panel<kInt2>(w, strip, panel);
    case kInt3: return decode_panel<kInt3>(w, strip, panel);
    case kInt4: return decode_panel<kInt4>(w, strip, panel);
    case kInt8: return decode_panel<kInt8>(w, strip, panel);
    default: return decode_panel<kCodebook>(w, strip, panel);
  }
}

// Rows of a strip from its panel, `rows` of them, into out [rows][columns].
inline void decode(const Weight& w, int strip, int rows, float* panel, void* out, int type) {
  decode_any(w, strip, panel);
  for (int g = 0; g < w.groups; g++) {
    const int columns = group_columns(w, g);
    for (int k = 0; k < columns; k += 16) {
      // Groups are padded to 32 columns, so that reading 16 is always right.
      Isa::Floats block[16];
      for (int i = 0; i < 16; i++) block[i] = Isa::load_floats(panel + (k + i) * kStrip);
      Isa::transpose(block);
      const int count = columns - k < 16 ? columns - k : 16;
      for (int r = 0; r < rows; r++)
        store_some(out, static_cast<size_t>(r) * w.columns + static_cast<size_t>(g) * w.group + k,
                   type, block[r], count);
    }
    panel += static_cast<size_t>(padded(columns)) * kStrip;
  }
}

template <int kTokens>
void multiply_panel(const float* panel, const float* x, size_t x_stride, int columns, float* out,
                    size_t out_stride) {
  Isa::Floats sum[kTokens];
  for (int m = 0; m < kTokens; m++) sum[m] = Isa::set(0.0f);
  for (int k = 0; k < columns; k++) {
    const Isa::Floats w = Isa::load_floats(panel + static_cast<size_t>(k) * kStrip);
    for (int m = 0; m < kTokens; m++) sum[m] = Isa::fma(w, Isa::set(x[m * x_stride + k]), sum[m]);
  }
  for (int m = 0; m < kTokens; m++) Isa::store(out + m * out_stride, sum[m]);
}

inline void multiply_many(const Weight& w, const float* x, int tokens, int first, int last,
                          float* panel, float* out, size_t out_stride) {
  const int columns = padded_columns(w);
  for (int strip = first; strip < last; strip++) {
    decode_any(w, strip, panel);
    float* at = out + strip * kStrip;
    int m = 0;
    for (; m + Isa::kTokensAtOnce <= tokens; m += Isa::kTokensAtOnce)
      multiply_panel<Isa::kTokensAtOnce>(panel, x + static_cast<size_t>(m) * columns, columns,
                                         columns, at + m * out_stride, out_stride);
    for (; m < tokens; m++)
      multiply_panel<1>(panel, x + static_cast<size_t>(m) * columns, columns, columns,
                        at + m * out_stride, out_stride);
  }
}

inline void narrow(const float* in, const float* bias, int count, int type, void* out) {
  for (int i = 0; i < count; i += 16) {
    const int lanes = count - i < 16 ? count - i : 16;
    Isa::Floats v = Isa::load_floats(in + i);  // sums are padded to whole strips
    if (bias && lanes == 16) {
      v = Isa::add(v, Isa::load_floats(bias + i));
    } else if (bias) {
      float rest[16] = {};
      std::memcpy(rest, bias + i, sizeof(float) * lanes);
      v = Isa::add(v, Isa::load_floats(rest));
    }
    store_some(out, i, type, v, lanes);
  }
}

}  // namespace LOWBIT_ISA

inline Kernels kernels_of_this_isa() {
  using namespace LOWBIT_ISA;
  return {widen,  quantize, multiply, multiply_block, multiply_many,
          decode, narrow,   nullptr,  nullptr};
}

}  // namespace lowbit
