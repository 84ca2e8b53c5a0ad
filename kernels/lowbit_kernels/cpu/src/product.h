// Products of integer activations with packed codes, in the vectors of the current instruction set.
//
// Codes become unsigned bytes in registers (for a codebook: the high and low byte of its 16-bit
// values, each plus 128), are multiplied with the signed bytes of the activations four at a time,
// and summed as 32-bit integers within a segment, exactly:
//
//     sum_k code_k x_k = 254 sum(code high_x) + sum(code low_x)
//     sum_k (code_k - zero) x_k = the above - zero * sum_k x_k
//
// Only then are they scaled, in float32. With two planes of activations the result is that of
// 16-bit activations; at one token, reading the weight takes longer than both multiplications.
#pragma once
#include "codes.h"
#include "kernels.h"

namespace lowbit {
namespace LOWBIT_ISA {

// A weight is asked for this many bytes in advance: all strips that are read side by side together.
constexpr size_t kAhead = 8192;
constexpr int kGroupsAhead = 8;  // scales and zero points, in groups

// How many sums of integers a product of one row and one token takes.
template <int kKind, int kPlanes> constexpr int parts() {
  return !(Isa::kWords && kPlanes == 2) ? kPlanes : has_table(kKind) ? 2 : 1;
}

// Integer sums of one segment. [0]: with the high bytes of x, [1]: with its low bytes (codebook:
// high times low plus low times high; the product of both low bytes is under the rounding of x).
// Where x is of words, [0]: of codes, or of the high bytes of a codebook's values, [1]: of the low.
template <int kParts, int kTokens, int kStrips> struct Sums {
  Isa::Ints v[kStrips][kTokens][kParts];
};
template <int kKind, int kPlanes, int kTokens, int kStrips>
using SumsOf = Sums<parts<kKind, kPlanes>(), kTokens, kStrips>;

// Neighbouring strips at one column, and how many bytes further their codes are asked for.
struct StripCursor {
  const uint8_t* codes;
  const uint8_t* high;
  size_t stride, high_stride;  // bytes from strip to strip
  size_t ahead;
};

template <int kKind> inline StripCursor cursor_at(const Weight& w, int strip) {
  const size_t bytes = strip_bytes(w);
  if (!Codes<kKind>::kHigh) return {w.codes + strip * bytes, nullptr, bytes, 0, 0};
  const size_t high_bytes = static_cast<size_t>(padded_columns(w)) * 2;
  return {w.codes + strip * bytes, w.high + strip * high_bytes, bytes, high_bytes, 0};
}

template <int kKind> inline void advance(StripCursor& cursor, int columns) {
  cursor.codes += static_cast<size_t>(columns) / Codes<kKind>::kColumns * Codes<kKind>::kBytes;
  cursor.high += static_cast<size_t>(columns) / Codes<kKind>::kColumns * Codes<kKind>::kHigh;
}

// add_quad for tokens of words. (`V` is Isa, of which only some can do this.)
template <int kKind, int kTokens, int kStrips, class V>
LOWBIT_INLINE void add_words(const Isa::Bytes (&w)[kStrips], const Isa::Bytes (&w_low)[kStrips],
                             const int8_t* x, size_t x_stride,
                             SumsOf<kKind, 2, kTokens, kStrips>& sums) {
  repeat<kStrips>([&](auto n) LOWBIT_INLINED {
    const auto words = V::words(w[n]);
    repeat<kTokens>([&](auto m) LOWBIT_INLINED {
      const int8_t* at = x + m * x_stride;
      auto& sum = sums.v[n][m];
      sum[0] = V::dot_words(sum[0], words, V::four(at), V::four(at + 4));
      if constexpr (has_table(kKind))
        sum[1] = V::dot_words(sum[1], V::words(w_low[n]), V::four(at), V::four(at + 4));
    });
  });
}

// Adds the products of a quad of every strip with that of every token.
template <int kKind, int kPlanes, int kTokens, int kStrips>
LOWBIT_INLINE void add_quad(const Isa::Bytes (&w)[kStrips], const Isa::Bytes (&w_low)[kStrips],
                            const int8_t* x, size_t x_stride,
                            SumsOf<kKind, kPlanes, kTokens, kStrips>& sums) {
  if constexpr (Isa::kWords && kPlanes == 2)
    return add_words<kKind, kTokens, kStrips, Isa>(w, w_low, x, x_stride, sums);
  constexpr bool kNarrow = kKind != kInt8 && kKind != kWideBytes && !has_table(kKind);
  repeat<kTokens>([&](auto m) LOWBIT_INLINED {
    const Isa::Four high = Isa::four(x + m * x_stride);
    repeat<kStrips>([&](auto n) LOWBIT_INLINED {
      Isa::Ints& sum = sums.v[n][m][0];
      sum = Isa::template dot<kNarrow>(sum, w[n], high);
    });
    if constexpr (kPlanes == 2) {
      const Isa::Four low = Isa::four(x + m * x_stride + 4);
      repeat<kStrips>([&](auto n) LOWBIT_INLINED {
        Isa::Ints& sum = sums.v[n][m][1];
        sum = Isa::template dot<kNarrow>(sum, w[n], low);
        if constexpr (has_table(kKind)) sum = Isa::template dot<kNarrow>(sum, w_low[n], high);
      });
    }
  });
}

// Sums of one segment; rows of x are `columns` * kPlanes bytes.
template <int kKind, int kPlanes, int kTokens, int kStrips>
LOWBIT_INLINE void segment_sums(const StripCursor& cursor, int columns, const int8_t* x,
                                const Tables& tables,
                                SumsOf<kKind, kPlanes, kTokens, kStrips>& sums) {
  using Layout = Codes<kKind>;
  const size_t x_stride = static_cast<size_t>(columns) * kPlanes;
  const size_t high_ahead = cursor.ahead / Layout::kBytes * Layout::kHigh;
  const uint8_t* codes = cursor.codes;
  const uint8_t* high = cursor.high;
  repeat<kStrips>([&](auto n) LOWBIT_INLINED {
    repeat<kTokens>([&](auto m) LOWBIT_INLINED {
      repeat<parts<kKind, kPlanes>()>(
          [&](auto p) LOWBIT_INLINED { sums.v[n][m][p] = Isa::zero(); });
    });
  });
  const uint8_t* end = codes + columns / Layout::kColumns * Layout::kBytes;
  do {  // a segment has columns: GCC copies sums that might be those before the loop
    Layout strip[kStrips];
    repeat<kStrips>([&](auto n) LOWBIT_INLINED {
      const uint8_t* p = codes + n * cursor.stride;
      const uint8_t* h = high + n * cursor.high_stride;
      if constexpr (kKind < kNarrowBytes) {
        for (int i = 0; i < Layout::kBytes; i += 64) Isa::prefetch(p + cursor.ahead + i);
        if constexpr (Layout::kHigh > 0) Isa::prefetch(h + high_ahead);
      }
      strip[n].read(p, h);
    });
    with_constants<Layout::kColumns / 4>([&](auto quad) LOWBIT_INLINED {
      Isa::Bytes w[kStrips], w_low[kStrips];
      repeat<kStrips>([&](auto n) LOWBIT_INLINED {
        w[n] = strip[n].template quad<quad>();
        if constexpr (kKind == kCodebook) {
          w_low[n] = Isa::lookup(tables.low, w[n]);
          w[n] = Isa::lookup(tables.high, w[n]);
        }
        if constexpr (kKind == kTwoBytes) w_low[n] = strip[n].low;
      });
      add_quad<kKind, kPlanes, kTokens, kStrips>(w, w_low, x + quad * 4 * kPlanes, x_stride, sums);
    });
    x += Layout::kColumns * kPlanes;
    codes += Layout::kBytes;
    high += Layout::kHigh;
  } while (codes != end);
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
  if (has_table(kKind) && Isa::kWords && kPlanes == 2) {
    bias *= kRadix + 1;  // both bytes of a value are 128 too large
    unit *= w.table_unit;
  } else if (has_table(kKind)) {
    // The same, and the low one meets the high byte of x.
    if (kPlanes == 2) bias += sum_high;
    unit *= w.table_unit * kRadix;
  }
  return {unit, bias};
}

// Scales and zero points of neighbouring strips in one group.
template <int kStrips> struct StripScales {
  Isa::Floats scale[kStrips], zero[kStrips];
};

template <int kKind, int kStrips>
LOWBIT_INLINE void load_scales(const Weight& w, int strip, int group, StripScales<kStrips>& out) {
  const size_t stride = static_cast<size_t>(w.groups) * kStrip;
  const size_t at = strip * stride + static_cast<size_t>(group) * kStrip;
  const size_t past = group + kGroupsAhead < w.groups ? 0 : (kStrips - 1) * stride;
  const size_t next = at + past + kGroupsAhead * kStrip;
  const size_t bytes = w.scale_type == kFloat32 ? 4 : 2;
  for (int n = 0; n < kStrips; n++)
    Isa::prefetch(static_cast<const char*>(w.scale) + (next + n * stride) * bytes);
  load_typed_strips<kStrips>(w.scale, at, stride, w.scale_type, out.scale);
  if (kKind != kCodebook && w.zero) {
    for (int n = 0; n < kStrips; n++) Isa::prefetch(w.zero + next + n * stride);
    repeat<kStrips>([&](auto n) LOWBIT_INLINED {
      out.zero[n] = Isa::load_bytes(w.zero + at + n * stride);
    });
  } else {
    const float middle = kKind == kCodebook ? 128.0f : static_cast<float>(1 << (w.kind - 1));
    repeat<kStrips>([&](auto n) LOWBIT_INLINED { out.zero[n] = Isa::set(middle); });
  }
}

// The same for one strip.
template <int kKind>
inline void load_scale(const Weight& w, int strip, int group, Isa::Floats& scale,
                       Isa::Floats& zero) {
  StripScales<1> scales;
  load_scales<kKind>(w, strip, group, scales);
  scale = scales.scale[0];
  zero = scales.zero[0];
}

// before + scale * unit * (sum - zero * bias)
template <int kParts>
LOWBIT_INLINE Isa::Floats scaled_sum(const Isa::Ints (&sums)[kParts], const SegmentUnit& part,
                                     const Isa::Floats& scale, const Isa::Floats& zero,
                                     const Isa::Floats& before) {
  Isa::Floats sum = Isa::to_float(sums[0]);
  if constexpr (kParts == 2) sum = Isa::fma(sum, Isa::set(kRadix), Isa::to_float(sums[1]));
  sum = Isa::fma(zero, Isa::set(-part.bias), sum);
  return Isa::fma(Isa::mul(scale, Isa::set(part.unit)), sum, before);
}

// Calls segment(cursor, index of the segment, columns, scales) for all segments of some strips.
template <int kKind, int kStrips, class F>
LOWBIT_INLINE void for_segments(const Weight& w, int strip, F segment) {
  StripCursor cursor = cursor_at<kKind>(w, strip);
  constexpr size_t kStripAhead = kAhead / kStrips;
  const uint8_t* last = cursor.codes + cursor.stride - kStripAhead;
  int index = 0;
  for (int g = 0; g < w.groups; g++) {
    StripScales<kStrips> scales;
    load_scales<kKind, kStrips>(w, strip, g, scales);
    const int group = padded(group_columns(w, g));
    for (int start = 0; start < group; start += kSegment, index++) {
      const int length = group - start < kSegment ? group - start : kSegment;
      // Near the end of a strip, the strip to ask for is not the next one but the one after these.
      cursor.ahead = kStripAhead + (cursor.codes < last ? 0 : (kStrips - 1) * cursor.stride);
      segment(cursor, index, length, scales);
      advance<kKind>(cursor, length);
    }
  }
}

template <int kKind, int kPlanes, int kTokens, int kStrips>
LOWBIT_LOOP void multiply_strips(const Weight& w, const Activations& a, int strip,
                                             float* out, size_t out_stride) {
  const Tables tables = load_tables<kKind>(w);
  const int8_t* x = a.bytes;
  Isa::Floats result[kStrips][kTokens];
  repeat<kStrips>([&](auto n) LOWBIT_INLINED {
    repeat<kTokens>([&](auto m) LOWBIT_INLINED { result[n][m] = Isa::set(0.0f); });
  });
  for_segments<kKind, kStrips>(w, strip, [&](const StripCursor& cursor, int index, int columns,
                                             const StripScales<kStrips>& scales) LOWBIT_INLINED {
    SumsOf<kKind, kPlanes, kTokens, kStrips> sums;
    segment_sums<kKind, kPlanes, kTokens, kStrips>(cursor, columns, x, tables, sums);
    x += static_cast<size_t>(columns) * kPlanes * kTokens;
    repeat<kTokens>([&](auto m) LOWBIT_INLINED {
      const size_t at = static_cast<size_t>(index) * kTokens + m;
      const SegmentUnit part = segment_unit<kKind, kPlanes>(w, a, at);
      repeat<kStrips>([&](auto n) LOWBIT_INLINED {
        result[n][m] =
            scaled_sum(sums.v[n][m], part, scales.scale[n], scales.zero[n], result[n][m]);
      });
    });
  });
  repeat<kStrips>([&](auto n) LOWBIT_INLINED {
    repeat<kTokens>([&](auto m) LOWBIT_INLINED {
      Isa::store(out + m * out_stride + n * kStrip, result[n][m]);
    });
  });
}

// How many strips are multiplied at once: as many as registers hold the sums of, but of the largest
// codes two, for memory is read faster in fewer places.
template <int kKind, int kPlanes, int kTokens> constexpr int strips_at_once() {
  constexpr int kFit = Isa::kSums / (kTokens * kPlanes);
  return kFit >= 4 && kKind != kInt8 ? 4 : kFit >= 2 ? 2 : 1;
}

template <int kKind, int kPlanes, int kTokens>
void multiply_range(const Weight& w, const Activations& a, int first, int last, float* out,
                    size_t out_stride) {
  constexpr int kStrips = strips_at_once<kKind, kPlanes, kTokens>();
  int strip = first;
  for (; strip + kStrips <= last; strip += kStrips)
    multiply_strips<kKind, kPlanes, kTokens, kStrips>(w, a, strip, out + strip * kStrip,
                                                      out_stride);
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
