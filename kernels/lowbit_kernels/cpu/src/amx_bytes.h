// Integer products by tiles of AMX: what block.h does by VNNI, bit for bit.
//
// Codes of one segment as bytes, [quads][16 rows][4], are B tiles as they lie; the activations of
// 16 tokens are an A tile. With two planes a token's segment is [high bytes][low bytes] here, so
// that each plane is a tile; for up to kMaxTokens tokens, which the kernels of AVX-512 multiply, it
// stays as weight.h has it.
//
// With one plane, 16 rows, 16 tokens and 128 columns take 512 VPDPBUSD, or two products of tiles.
#pragma once
#include "amx.h"
#include "product.h"

namespace lowbit {
namespace LOWBIT_ISA {

constexpr int kTileInts = 16 * 16;
constexpr int kTileAhead = 2048;  // bytes that a strip's codes are asked for in advance

// The sizes of the tiles for `tokens` tokens and `columns` columns at once. Tiles 0 ... 3 are sums;
// tile 4, with two planes also tile 5, holds tokens, and the rest weights.
inline TileConfig byte_tiles(int planes, int tokens, int columns) {
  TileConfig config;
  config.set(0, 4, tokens, 64);
  config.set(4, 4 + planes, tokens, columns);
  config.set(4 + planes, 8, columns / 4, 64);
  return config;
}

// Bytes of a segment of a strip. Not a power of two, as kPanelStride.
constexpr int kSegmentBytes = kSegment * kStrip + 64;

// One segment of kBlockStrips strips as bytes; of a codebook also the low bytes.
template <int kKind> struct SegmentCodes {
  static constexpr int kTables = kKind == kCodebook ? 2 : 1;
  alignas(64) uint8_t bytes[kTables][kBlockStrips][kSegmentBytes];
};

template <int kKind>
LOWBIT_LOOP void unpack(const uint8_t* codes, const uint8_t* high, int columns,
                        const uint8_t* table, uint8_t* bytes, uint8_t* low_bytes) {
  using Layout = Codes<kKind>;
  Isa::Bytes table_high = {}, table_low = {};
  if (kKind == kCodebook) {
    table_high = Isa::load_table(table);
    table_low = Isa::load_table(table + 16);
  }
  for (int i = 0; i < columns; i += Layout::kColumns) {
    Isa::prefetch(codes + kTileAhead);
    Layout::visit(codes, high, table_high, table_low,
                  [&](int quad, const Isa::Bytes& w, const Isa::Bytes& w_low) {
                    Isa::store_bytes(bytes + quad * 64, w);
                    if (kKind == kCodebook) Isa::store_bytes(low_bytes + quad * 64, w_low);
                  });
    codes += Layout::kBytes;
    high += Layout::kHigh;
    bytes += Layout::kColumns * kStrip;
    low_bytes += Layout::kColumns * kStrip;
  }
}

// Sums of one segment of four strips, [strip][16 tokens][16 rows].
inline void one_plane(const uint8_t* w, int columns, int step, const int8_t* x, int32_t* sums) {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int k = 0; k < columns; k += step) {
    TILE_LOAD(4, x + k, columns);
    TILE_LOAD(5, w + k * kStrip, 64);
    TILE_BYTES(0, 4, 5);
    TILE_LOAD(6, w + kSegmentBytes + k * kStrip, 64);
    TILE_BYTES(1, 4, 6);
    TILE_LOAD(7, w + 2 * kSegmentBytes + k * kStrip, 64);
    TILE_BYTES(2, 4, 7);
    TILE_LOAD(5, w + 3 * kSegmentBytes + k * kStrip, 64);
    TILE_BYTES(3, 4, 5);
  }
  TILE_STORE(0, sums, 64);
  TILE_STORE(1, sums + kTileInts, 64);
  TILE_STORE(2, sums + 2 * kTileInts, 64);
  TILE_STORE(3, sums + 3 * kTileInts, 64);
}

// Sums of one segment of two strips, [strip][plane][16 tokens][16 rows]; kTables: 2 for a codebook.
template <int kTables>
inline void two_planes(const uint8_t* w, const uint8_t* w_low, int columns, int step,
                       const int8_t* x, int32_t* sums) {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int k = 0; k < columns; k += step) {
    TILE_LOAD(4, x + k, 2 * columns);
    TILE_LOAD(6, w + k * kStrip, 64);
    TILE_BYTES(0, 4, 6);
    TILE_LOAD(5, x + columns + k, 2 * columns);
    TILE_BYTES(1, 5, 6);
    TILE_LOAD(7, w + kSegmentBytes + k * kStrip, 64);
    TILE_BYTES(2, 4, 7);
    TILE_BYTES(3, 5, 7);
    if (kTables == 2) {
      TILE_LOAD(6, w_low + k * kStrip, 64);
      TILE_BYTES(1, 4, 6);
      TILE_LOAD(7, w_low + kSegmentBytes + k * kStrip, 64);
      TILE_BYTES(3, 4, 7);
    }
  }
  TILE_STORE(0, sums, 64);
  TILE_STORE(1, sums + kTileInts, 64);
  TILE_STORE(2, sums + 2 * kTileInts, 64);
  TILE_STORE(3, sums + 3 * kTileInts, 64);
}

struct BlockScale {
  Isa::Floats scale[kBlockStrips], zero[kBlockStrips];
};

// Adds one segment's products of `count` tokens, whose bytes begin at x, to out
// [tokens][kBlockRows].
template <int kKind, int kPlanes>
void add_segment(const SegmentCodes<kKind>& codes, int columns, int step, const int8_t* x,
                 const SegmentUnit* units, int count, const BlockScale& scales, float* out) {
  constexpr int kStrips = 4 / kPlanes;  // whose sums fill four tiles
  constexpr int kTables = SegmentCodes<kKind>::kTables;
  alignas(64) int32_t sums[4 * kTileInts];
  settle_memory();
  for (int first = 0; first < kBlockStrips; first += kStrips) {
    if (kPlanes == 1)
      one_plane(codes.bytes[0][first], columns, step, x, sums);
    else
      two_planes<kTables>(codes.bytes[0][first], codes.bytes[kTables - 1][first], columns, step, x,
                          sums);
    for (int n = 0; n < kStrips; n++) {
      const Isa::Floats scale = scales.scale[first + n], zero = scales.zero[first + n];
      for (int m = 0; m < count; m++) {
        Isa::Ints sum[kPlanes];
        for (int p = 0; p < kPlanes; p++)
          sum[p] = _mm512_load_si512(sums + (n * kPlanes + p) * kTileInts + m * 16);
        float* at = out + m * kBlockRows + (first + n) * kStrip;
        Isa::store(at, scaled_sum<kPlanes>(sum, units[m], scale, zero, Isa::load_floats(at)));
      }
    }
  }
}

// A weight's next segment, and what is known of it.
struct SegmentAt {
  int index, group, columns;
  const int8_t* x;
};

// Calls visit(segment) for all segments of a weight.
template <class F> inline void for_each_segment(const Weight& w, const Activations& a, F visit) {
  SegmentAt at = {0, 0, 0, a.bytes};
  for (; at.group < w.groups; at.group++) {
    const int group = padded(group_columns(w, at.group));
    for (int start = 0; start < group; start += kSegment) {
      at.columns = group - start < kSegment ? group - start : kSegment;
      visit(at);
      at.index++;
      at.x += static_cast<size_t>(at.columns) * a.planes * a.tokens;
    }
  }
}

// Up to kTokenBlock tokens and `count` strips, at most kBlockStrips, into out.
template <int kKind, int kPlanes>
void multiply_tiles_block(const Weight& w, const Activations& a, int strip, int count, float* out,
                          size_t out_stride) {
  using Layout = Codes<kKind>;
  constexpr int kLast = SegmentCodes<kKind>::kTables - 1;
  const size_t stride = strip_bytes(w);
  const size_t high_stride = Layout::kHigh ? static_cast<size_t>(padded_columns(w)) * 2 : 0;
  const uint8_t* codes = w.codes + strip * stride;
  const uint8_t* high = Layout::kHigh ? w.high + strip * high_stride : w.codes;
  SegmentCodes<kKind> segment;
  if (count < kBlockStrips) std::memset(&segment, 0, sizeof(segment));
  alignas(64) float sums[kTokenBlock * kBlockRows] = {};
  BlockScale scales = {};
  TileRegisters tiles;
  int tile_tokens = 0, step = 0;  // of the tiles
  for_each_segment(w, a, [&](const SegmentAt& at) {
    for (int n = 0; n < count; n++) {
      load_scale<kKind>(w, strip + n, at.group, scales.scale[n], scales.zero[n]);
      unpack<kKind>(codes + n * stride, high + n * high_stride, at.columns, w.table,
                    segment.bytes[0][n], segment.bytes[kLast][n]);
    }
    codes += static_cast<size_t>(at.columns) / Layout::kColumns * Layout::kBytes;
    high += static_cast<size_t>(at.columns) / Layout::kColumns * Layout::kHigh;
    for (int m = 0; m < a.tokens; m += kTokenTile) {
      const int tokens = a.tokens - m < kTokenTile ? a.tokens - m : kTokenTile;
      const int columns = at.columns % 64 ? 32 : 64;
      if (tokens != tile_tokens || columns != step) {
        tiles.configure(byte_tiles(kPlanes, tokens, columns));
        tile_tokens = tokens;
        step = columns;
      }
      SegmentUnit units[kTokenTile];
      for (int i = 0; i < tokens; i++)
        units[i] = segment_unit<kKind, kPlanes>(
            w, a, static_cast<size_t>(at.index) * a.tokens + m + i);
      add_segment<kKind, kPlanes>(segment, at.columns, step,
                                  at.x + static_cast<size_t>(m) * at.columns * kPlanes, units,
                                  tokens, scales, sums + m * kBlockRows);
    }
  });
  for (int m = 0; m < a.tokens; m++)
    std::memcpy(out + m * out_stride, sums + m * kBlockRows, sizeof(float) * count * kStrip);
}

template <int kKind>
void multiply_tiles_kind(const Weight& w, const Activations& a, int first, int last, float* out,
                         size_t out_stride) {
  const auto multiply =
      a.planes == 2 ? multiply_tiles_block<kKind, 2> : multiply_tiles_block<kKind, 1>;
  for (int strip = first; strip < last; strip += kBlockStrips)
    multiply(w, a, strip, last - strip < kBlockStrips ? last - strip : kBlockStrips,
             out + strip * kStrip, out_stride);
}

// Kernels::multiply_block.
inline void multiply_tiles(const Weight& w, const Activations& a, int first, int last, float* out,
                           size_t out_stride) {
  switch (w.kind) {
    case kInt2: return multiply_tiles_kind<kInt2>(w, a, first, last, out, out_stride);
    case kInt3: return multiply_tiles_kind<kInt3>(w, a, first, last, out, out_stride);
    case kInt4: return multiply_tiles_kind<kInt4>(w, a, first, last, out, out_stride);
    case kInt8: return multiply_tiles_kind<kInt8>(w, a, first, last, out, out_stride);
    default: return multiply_tiles_kind<kCodebook>(w, a, first, last, out, out_stride);
  }
}

// One token's segments from [quads][planes][4] to [planes][quads][4].
inline void separate_planes(const Weight& w, int token, const Activations& a) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for_each_segment(w, a, [&](const SegmentAt& at) {
    const int columns = at.columns;
    int8_t* row = a.bytes + (at.x - a.bytes) + static_cast<size_t>(token) * columns * 2;
    int8_t mixed[2 * kSegment];
    std::memcpy(mixed, row, 2 * columns);
    int k = 0;
    for (; k + 64 <= columns; k += 64) {
      const __m512i first = _mm512_loadu_si512(mixed + 2 * k);
      const __m512i second = _mm512_loadu_si512(mixed + 2 * k + 64);
      _mm512_storeu_si512(row + k, _mm512_permutex2var_epi32(first, even, second));
      _mm512_storeu_si512(row + columns + k, _mm512_permutex2var_epi32(first, odd, second));
    }
    for (; k < columns; k += 4) {
      std::memcpy(row + k, mixed + 2 * k, 4);
      std::memcpy(row + columns + k, mixed + 2 * k + 4, 4);
    }
  });
}

// Kernels::quantize.
inline void quantize_for_tiles(const Weight& w, const float* x, int token, const Activations& a) {
  avx512_kernels().quantize(w, x, token, a);
  if (a.planes == 2 && a.tokens > kMaxTokens) separate_planes(w, token, a);
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
