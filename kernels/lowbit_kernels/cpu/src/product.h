// Products of integer activations with packed codes, in the vectors of the current instruction set.
//
// A weight is read once for up to four tokens. Codes become unsigned bytes (for a codebook: the high
// and low byte of its 16-bit values, each plus 128), are multiplied with the signed bytes of the
// activations four at a time, and summed as 32-bit integers within a segment, exactly:
//
//     sum_k code_k x_k = 254 sum(code high_x) + sum(code low_x)
//     sum_k (code_k - zero) x_k = the above - zero * sum_k x_k
//
// Only then are they scaled, in float32. With two planes of activations the result is that of 16-bit
// activations; reading the weight takes longer than both multiplications.
#pragma once
#include "isa.h"
#include "kernels.h"

namespace lowbit {
namespace LOWBIT_ISA {

// Bytes of one strip for `kColumns` columns; `visit(quad, bytes, low bytes)` for each quad.
template <int kKind> struct Codes;

template <> struct Codes<kInt8> {
  static constexpr int kColumns = 4, kBytes = 64, kHigh = 0;
  template <class F>
  static void visit(const uint8_t* p, const uint8_t*, const Isa::Bytes&, const Isa::Bytes&, F f) {
    const Isa::Bytes v = Isa::load(p);
    f(0, v, v);
  }
};
template <> struct Codes<kInt4> {
  static constexpr int kColumns = 8, kBytes = 64, kHigh = 0;
  template <class F>
  static void visit(const uint8_t* p, const uint8_t*, const Isa::Bytes&, const Isa::Bytes&, F f) {
    const Isa::Bytes v = Isa::load(p);
    const Isa::Bytes even = Isa::field<0>(v, 15), odd = Isa::field<4>(v, 15);
    f(0, even, even);
    f(1, odd, odd);
  }
};
template <> struct Codes<kCodebook> {
  static constexpr int kColumns = 8, kBytes = 64, kHigh = 0;
  template <class F>
  static void visit(const uint8_t* p, const uint8_t*, const Isa::Bytes& high, const Isa::Bytes& low,
                    F f) {
    const Isa::Bytes v = Isa::load(p);
    const Isa::Bytes even = Isa::field<0>(v, 15), odd = Isa::field<4>(v, 15);
    f(0, Isa::lookup(high, even), Isa::lookup(low, even));
    f(1, Isa::lookup(high, odd), Isa::lookup(low, odd));
  }
};
template <> struct Codes<kInt2> {
  static constexpr int kColumns = 16, kBytes = 64, kHigh = 0;
  template <class F>
  static void visit(const uint8_t* p, const uint8_t*, const Isa::Bytes&, const Isa::Bytes&, F f) {
    const Isa::Bytes v = Isa::load(p);
    const Isa::Bytes a = Isa::field<0>(v, 3), b = Isa::field<2>(v, 3);
    const Isa::Bytes c = Isa::field<4>(v, 3), d = Isa::field<6>(v, 3);
    f(0, a, a);
    f(1, b, b);
    f(2, c, c);
    f(3, d, d);
  }
};
template <> struct Codes<kInt3> {
  static constexpr int kColumns = 32, kBytes = 128, kHigh = 64;
  template <int kQuad, class F>
  static void quad(const Isa::Bytes& low, const Isa::Bytes& high, F f) {
    const Isa::Bytes v =
        Isa::either(Isa::field<2 * (kQuad % 4)>(low, 3), Isa::field<kQuad - 2>(high, 4));
    f(kQuad, v, v);
  }
  template <class F>
  static void visit(const uint8_t* p, const uint8_t* h, const Isa::Bytes&, const Isa::Bytes&, F f) {
    const Isa::Bytes first = Isa::load(p), second = Isa::load(p + 64), high = Isa::load(h);
    quad<0>(first, high, f);
    quad<1>(first, high, f);
    quad<2>(first, high, f);
    quad<3>(first, high, f);
    quad<4>(second, high, f);
    quad<5>(second, high, f);
    quad<6>(second, high, f);
    quad<7>(second, high, f);
  }
};

constexpr int kAhead = 1024;  // bytes that a strip's codes are asked for in advance

// Sums of one segment; [0]: with the high bytes of x, [1]: with its low bytes (codebook: high times
// low plus low times high; the product of both low bytes is under the rounding of x).
template <int kKind, int kPlanes, int kTokens, int kStrips>
struct Sums {
  Isa::Ints v[kStrips][kTokens][kPlanes];
};

template <int kKind, int kPlanes, int kTokens, int kStrips>
LOWBIT_LOOP void segment_sums(const uint8_t* const* codes, const uint8_t* const* high, int columns,
                         const int8_t* x, size_t x_stride, const Isa::Bytes& table_high,
                         const Isa::Bytes& table_low, Sums<kKind, kPlanes, kTokens, kStrips>& sums) {
  using Layout = Codes<kKind>;
  constexpr bool kNarrow = kKind != kInt8 && kKind != kCodebook;
  Isa::Ints v[kStrips][kTokens][kPlanes];
  for (int n = 0; n < kStrips; n++)
    for (int m = 0; m < kTokens; m++)
      for (int p = 0; p < kPlanes; p++) v[n][m][p] = Isa::zero();
  const int steps = columns / Layout::kColumns;
  for (int i = 0; i < steps; i++) {
    const int8_t* xi = x + static_cast<size_t>(i) * Layout::kColumns * kPlanes;
    for (int n = 0; n < kStrips; n++) {
      const uint8_t* p = codes[n] + static_cast<size_t>(i) * Layout::kBytes;
      const uint8_t* h = Layout::kHigh ? high[n] + static_cast<size_t>(i) * Layout::kHigh : nullptr;
      Isa::prefetch(p + kAhead);
      Layout::visit(p, h, table_high, table_low,
                    [&](int quad, const Isa::Bytes& w, const Isa::Bytes& w_low) {
                      for (int m = 0; m < kTokens; m++) {
                        const int8_t* at = xi + m * x_stride + quad * 4 * kPlanes;
                        const Isa::Four x_high = Isa::four(at);
                        Isa::Ints* sum = v[n][m];
                        sum[0] = Isa::template dot<kNarrow>(sum[0], w, x_high);
                        if (kPlanes == 2) {
                          const Isa::Four x_low = Isa::four(at + 4);
                          sum[kPlanes - 1] =
                              Isa::template dot<kNarrow>(sum[kPlanes - 1], w, x_low);
                          if (kKind == kCodebook)
                            sum[kPlanes - 1] =
                                Isa::template dot<kNarrow>(sum[kPlanes - 1], w_low, x_high);
                        }
                      }
                    });
    }
  }
  for (int n = 0; n < kStrips; n++)
    for (int m = 0; m < kTokens; m++)
      for (int p = 0; p < kPlanes; p++) sums.v[n][m][p] = v[n][m][p];
}

// What one token's sums of one segment are multiplied with, and with which the zero points are.
struct SegmentUnit {
  float unit, bias;
};

template <int kKind, int kPlanes>
inline SegmentUnit segment_unit(const Weight& w, const Activations& a, size_t at) {
  const float sum_high = a.sum_high[at];
  float bias = sum_high, unit = a.unit[at];
  if (kPlanes == 2) bias = kRadix * sum_high + a.sum_low[at];
  if (kKind == kCodebook) {
    // Both bytes of a value are 128 too large, and the low one meets the high byte of x.
    if (kPlanes == 2) bias += sum_high;
    unit *= w.table_unit * kRadix;
  }
  return {unit, bias};
}

template <int kPlanes>
inline Isa::Floats scaled_sum(const Isa::Ints* sums, const SegmentUnit& part,
                              const Isa::Floats& scale, const Isa::Floats& zero,
                              const Isa::Floats& before) {
  Isa::Floats sum = Isa::to_float(sums[0]);
  if (kPlanes == 2)
    sum = Isa::fma(sum, Isa::set(kRadix), Isa::to_float(sums[kPlanes - 1]));
  sum = Isa::fma(zero, Isa::set(-part.bias), sum);
  return Isa::fma(Isa::mul(scale, Isa::set(part.unit)), sum, before);
}

template <int kKind>
inline void load_scale(const Weight& w, int strip, int group, Isa::Floats& scale,
                       Isa::Floats& zero) {
  const size_t at = (static_cast<size_t>(strip) * w.groups + group) * kStrip;
  scale = load_typed(w.scale, at, w.scale_type);
  const float middle = kKind == kCodebook ? 128.0f : static_cast<float>(1 << (w.kind - 1));
  zero = kKind != kCodebook && w.zero ? Isa::load_bytes(w.zero + at) : Isa::set(middle);
}

template <int kKind, int kPlanes, int kTokens, int kStrips>
void multiply_strips(const Weight& w, const Activations& a, int strip, float* out,
                     size_t out_stride) {
  using Layout = Codes<kKind>;
  const size_t bytes = strip_bytes(w), high_bytes = static_cast<size_t>(padded_columns(w)) * 2;
  const uint8_t* codes[kStrips];
  const uint8_t* high[kStrips] = {};
  for (int n = 0; n < kStrips; n++) {
    codes[n] = w.codes + (strip + n) * bytes;
    if (Layout::kHigh) high[n] = w.high + (strip + n) * high_bytes;
  }
  Isa::Bytes table_high = {}, table_low = {};
  if (kKind == kCodebook) {
    table_high = Isa::load_table(w.table);
    table_low = Isa::load_table(w.table + 16);
  }
  Isa::Floats result[kStrips][kTokens];
  for (int n = 0; n < kStrips; n++)
    for (int m = 0; m < kTokens; m++) result[n][m] = Isa::set(0.0f);
  const int8_t* x = a.bytes;
  int index = 0;  // of the segment
  for (int g = 0; g < w.groups; g++) {
    Isa::Floats scale[kStrips], zero[kStrips];
    for (int n = 0; n < kStrips; n++) load_scale<kKind>(w, strip + n, g, scale[n], zero[n]);
    const int group = padded(group_columns(w, g));
    for (int start = 0; start < group; start += kSegment, index++) {
      const int length = group - start < kSegment ? group - start : kSegment;
      Sums<kKind, kPlanes, kTokens, kStrips> sums;
      segment_sums<kKind, kPlanes, kTokens, kStrips>(codes, high, length, x,
                                                     length * kPlanes, table_high,
                                                     table_low, sums);
      for (int n = 0; n < kStrips; n++) {
        codes[n] += static_cast<size_t>(length) / Layout::kColumns * Layout::kBytes;
        if (Layout::kHigh) high[n] += static_cast<size_t>(length) / Layout::kColumns * Layout::kHigh;
      }
      x += static_cast<size_t>(length) * kPlanes * kTokens;
      for (int m = 0; m < kTokens; m++) {
        const size_t at = static_cast<size_t>(index) * kTokens + m;
        const SegmentUnit part = segment_unit<kKind, kPlanes>(w, a, at);
        for (int n = 0; n < kStrips; n++)
          result[n][m] = scaled_sum<kPlanes>(sums.v[n][m], part, scale[n], zero[n], result[n][m]);
      }
    }
  }
  for (int n = 0; n < kStrips; n++)
    for (int m = 0; m < kTokens; m++)
      Isa::store(out + m * out_stride + static_cast<size_t>(n) * kStrip, result[n][m]);
}

template <int kKind, int kPlanes, int kTokens>
void multiply_range(const Weight& w, const Activations& a, int first, int last, float* out,
                    size_t out_stride) {
  // Registers hold the sums of this many strips.
  constexpr int kStrips = Isa::kStripsAtOnce / kTokens > 1 ? Isa::kStripsAtOnce / kTokens : 1;
  int strip = first;
  for (; strip + kStrips <= last; strip += kStrips)
    multiply_strips<kKind, kPlanes, kTokens, kStrips>(w, a, strip, out + strip * kStrip, out_stride);
  for (; strip < last; strip++)
    multiply_strips<kKind, kPlanes, kTokens, 1>(w, a, strip, out + strip * kStrip, out_stride);
}

template <int kKind, int kPlanes>
void multiply_tokens(const Weight& w, const Activations& a, int first, int last,
                     float* out, size_t out_stride) {
  switch (a.tokens) {
    case 1: return multiply_range<kKind, kPlanes, 1>(w, a, first, last, out, out_stride);
    case 2: return multiply_range<kKind, kPlanes, 2>(w, a, first, last, out, out_stride);
    case 3: return multiply_range<kKind, kPlanes, 3>(w, a, first, last, out, out_stride);
    default: return multiply_range<kKind, kPlanes, 4>(w, a, first, last, out, out_stride);
  }
}

template <int kKind>
void multiply_planes(const Weight& w, const Activations& a, int first, int last,
                     float* out, size_t out_stride) {
  if (a.planes == 2)
    multiply_tokens<kKind, 2>(w, a, first, last, out, out_stride);
  else
    multiply_tokens<kKind, 1>(w, a, first, last, out, out_stride);
}

inline void multiply(const Weight& w, const Activations& a, int first, int last,
                     float* out, size_t out_stride) {
  switch (w.kind) {
    case kInt2: return multiply_planes<kInt2>(w, a, first, last, out, out_stride);
    case kInt3: return multiply_planes<kInt3>(w, a, first, last, out, out_stride);
    case kInt4: return multiply_planes<kInt4>(w, a, first, last, out, out_stride);
    case kInt8: return multiply_planes<kInt8>(w, a, first, last, out, out_stride);
    default: return multiply_planes<kCodebook>(w, a, first, last, out, out_stride);
  }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
