// Integer products for more tokens than registers hold the sums of.
//
// Segment by segment, tokens are multiplied a few at a time with the codes of a strip or two, which
// stay in the first-level cache. With AVX-512, making bytes of them again for each few tokens takes
// units of the processor that the multiplications leave idle; elsewhere that is done once.
#pragma once
#include "product.h"

namespace lowbit {
namespace LOWBIT_ISA {

// One segment of all activations, and where its products are added: out [tokens][kStrips * 16].
struct BlockSegment {
  const Weight& w;
  const Activations& a;
  int index, columns;
  const int8_t* x;
  float* out;
};

template <int kKind, int kPlanes, int kTokens, int kStrips>
LOWBIT_LOOP void add_tile(const BlockSegment& segment, const StripCursor& cursor,
                          const Tables& tables, const StripScales<kStrips>& scales, int token) {
  const size_t row = static_cast<size_t>(segment.columns) * kPlanes;
  SumsOf<kKind, kPlanes, kTokens, kStrips> sums;
  segment_sums<kKind, kPlanes, kTokens, kStrips>(cursor, segment.columns, segment.x + token * row,
                                                 tables, sums);
  repeat<kTokens>([&](auto m) LOWBIT_INLINED {
    const size_t at = static_cast<size_t>(segment.index) * segment.a.tokens + token + m;
    const SegmentUnit part = segment_unit<kKind, kPlanes>(segment.w, segment.a, at);
    float* out = segment.out + (token + m) * kStrips * kStrip;
    repeat<kStrips>([&](auto n) LOWBIT_INLINED {
      Isa::store(out + n * kStrip,
                 scaled_sum(sums.v[n][m], part, scales.scale[n], scales.zero[n],
                            Isa::load_floats(out + n * kStrip)));
    });
  });
}

// add_tile for kLeast ... kTokens tokens, which is what more than kMaxTokens are divided into.
template <int kKind, int kPlanes, int kStrips> struct Tiles {
  using Tile = void (*)(const BlockSegment&, const StripCursor&, const Tables&,
                        const StripScales<kStrips>&, int);
  // A codebook's tables and second bytes take registers too.
  static constexpr int kTaken = kKind == kCodebook ? 4 : 0;
  static constexpr int kFit =
      (Isa::kBlockSums - kTaken) / parts<kKind, kPlanes>() / Isa::kTileStrips;
  // Of a strip that is left over there are fewer, for it may take longer.
  static constexpr int kMost = kStrips < Isa::kTileStrips ? 2 : 8;
  static constexpr int kTokens = kFit > kMost ? kMost : kFit > 1 ? kFit : 1;
  static constexpr int kLeast = (kTokens + 1) / 2;
  static_assert(kLeast <= kMaxTokens + 1, "fewer tokens than the least");
  template <int... kIndex>
  static Tile at(int tokens, std::integer_sequence<int, kIndex...>) {
    static constexpr Tile tiles[] = {add_tile<kKind, kPlanes, kLeast + kIndex, kStrips>...};
    return tiles[tokens - kLeast];
  }
  static Tile at(int tokens) {
    return at(tokens, std::make_integer_sequence<int, kTokens - kLeast + 1>{});
  }
};

// Bytes of an unpacked segment. Not a power of two: AMD's prediction of cache ways takes strips
// 4096 bytes apart for one, and the loop takes three times as long.
constexpr int kSegmentBytes = kSegment * kStrip + 64;

// One segment of some strips as bytes, [quads][64]; of a codebook also the low bytes.
template <int kKind, int kStrips> struct UnpackedSegment {
  static constexpr int kTables = kKind == kCodebook ? 2 : 1;
  alignas(64) uint8_t bytes[kTables][kStrips][kSegmentBytes];
};
template <int kKind> struct UnpackedSegment<kKind, 0> {};

template <int kKind, int kStrips>
inline StripCursor unpack(const StripCursor& cursor, int columns, const Tables& tables,
                          UnpackedSegment<kKind, kStrips>& out) {
  using Layout = Codes<kKind>;
  const size_t high_ahead = cursor.ahead / Layout::kBytes * Layout::kHigh;
  for (int n = 0; n < kStrips; n++) {
    const uint8_t* p = cursor.codes + n * cursor.stride;
    const uint8_t* h = cursor.high + n * cursor.high_stride;
    for (int i = 0; i < columns; i += Layout::kColumns) {
      for (int line = 0; line < Layout::kBytes; line += 64) Isa::prefetch(p + cursor.ahead + line);
      if (Layout::kHigh) Isa::prefetch(h + high_ahead);
      Layout::visit(p, h, tables.high, tables.low,
                    [&](int quad, const Isa::Bytes& w, const Isa::Bytes& w_low) {
                      const int at = i * kStrip + quad * 64;
                      Isa::store_bytes(out.bytes[0][n] + at, w);
                      if (kKind == kCodebook) Isa::store_bytes(out.bytes[1][n] + at, w_low);
                    });
      p += Layout::kBytes;
      h += Layout::kHigh;
    }
  }
  return {out.bytes[0][0], out.bytes[out.kTables - 1][0], kSegmentBytes, kSegmentBytes, 0};
}

template <int kKind, int kPlanes, int kStrips>
void multiply_block_strips(const Weight& w, const Activations& a, int strip, float* out,
                           size_t out_stride) {
  using Tiles = Tiles<Isa::kUnpacks ? unpacked(kKind) : kKind, kPlanes, kStrips>;
  alignas(64) float sums[kTokenBlock * kStrips * kStrip] = {};
  UnpackedSegment<kKind, Isa::kUnpacks ? kStrips : 0> unpacked;
  const Tables tables = load_tables<kKind>(w);
  // Tiles of as equal numbers of tokens as can be: the first `larger` have one more.
  const int tiles = (a.tokens + Tiles::kTokens - 1) / Tiles::kTokens;
  const int tokens = a.tokens / tiles, larger = a.tokens % tiles;
  const auto tile = Tiles::at(tokens), larger_tile = Tiles::at(larger ? tokens + 1 : tokens);
  BlockSegment all = {w, a, 0, 0, a.bytes, sums};
  for_segments<kKind, kStrips>(w, strip, [&](StripCursor cursor, int index, int columns,
                                             const StripScales<kStrips>& scales) {
    all.index = index;
    all.columns = columns;
    if constexpr (Isa::kUnpacks) cursor = unpack<kKind>(cursor, columns, tables, unpacked);
    int token = 0;
    for (int i = 0; i < tiles; i++) {
      (i < larger ? larger_tile : tile)(all, cursor, tables, scales, token);
      token += i < larger ? tokens + 1 : tokens;
      cursor.ahead = 0;  // the first tile has asked for all
    }
    all.x += static_cast<size_t>(columns) * kPlanes * a.tokens;
  });
  for (int m = 0; m < a.tokens; m++)
    std::memcpy(out + m * out_stride, sums + m * kStrips * kStrip,
                sizeof(float) * kStrips * kStrip);
}

template <int kKind, int kPlanes>
void multiply_block_range(const Weight& w, const Activations& a, int first, int last,
                          float* out, size_t out_stride) {
  int strip = first;
  constexpr int kStrips = Isa::kTileStrips;
  for (; strip + kStrips <= last; strip += kStrips)
    multiply_block_strips<kKind, kPlanes, kStrips>(w, a, strip, out + strip * kStrip, out_stride);
  for (; strip < last; strip++)
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
