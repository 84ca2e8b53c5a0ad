// Adds products by tiles of AMX to what AVX-512 with BF16 offers.
#define LOWBIT_ISA amx
#include "amx_bytes.h"
#include "bf16.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kTilePairs = 16;                          // pairs of columns of a tile
constexpr long kPairRow = kBlockColumns * sizeof(uint16_t);  // bytes from token to token
constexpr long kSumRow = kBlockRows * sizeof(float);
constexpr long kTileRow = 64;

// Tokens are padded to whole tiles.
struct BfloatTiles {
  // Tiles 0 ... 3 are sums, the others tokens and weights.
  struct Registers {
    TileRegisters tiles;
    Registers() {
      TileConfig config;
      config.set(0, 8, 16, 64);
      tiles.configure(config);
    }
  };

  // Adds products of two tiles of tokens and two strips.
  static void two_by_two(const uint16_t* panel, const uint16_t* x, int pairs, float* sums) {
    const uint16_t* second = panel + kPanelStride;
    const uint16_t* below = x + kTokenTile * kBlockColumns;
    float* sums_below = sums + kTokenTile * kBlockRows;
    TILE_LOAD(0, sums, kSumRow);
    TILE_LOAD(1, sums + kStrip, kSumRow);
    TILE_LOAD(2, sums_below, kSumRow);
    TILE_LOAD(3, sums_below + kStrip, kSumRow);
    for (int k = 0; k < pairs; k += kTilePairs) {
      TILE_LOAD(4, x + 2 * k, kPairRow);
      TILE_LOAD(6, panel + k * 2 * kStrip, kTileRow);
      TILE_BFLOATS(0, 4, 6);
      TILE_LOAD(7, second + k * 2 * kStrip, kTileRow);
      TILE_BFLOATS(1, 4, 7);
      TILE_LOAD(5, below + 2 * k, kPairRow);
      TILE_BFLOATS(2, 5, 6);
      TILE_BFLOATS(3, 5, 7);
    }
    TILE_STORE(0, sums, kSumRow);
    TILE_STORE(1, sums + kStrip, kSumRow);
    TILE_STORE(2, sums_below, kSumRow);
    TILE_STORE(3, sums_below + kStrip, kSumRow);
  }

  // The same of one tile of tokens and four strips.
  static void one_by_four(const uint16_t* panel, const uint16_t* x, int pairs, float* sums) {
    TILE_LOAD(0, sums, kSumRow);
    TILE_LOAD(1, sums + kStrip, kSumRow);
    TILE_LOAD(2, sums + 2 * kStrip, kSumRow);
    TILE_LOAD(3, sums + 3 * kStrip, kSumRow);
    for (int k = 0; k < pairs; k += kTilePairs) {
      const uint16_t* w = panel + k * 2 * kStrip;
      TILE_LOAD(4, x + 2 * k, kPairRow);
      TILE_LOAD(5, w, kTileRow);
      TILE_BFLOATS(0, 4, 5);
      TILE_LOAD(6, w + kPanelStride, kTileRow);
      TILE_BFLOATS(1, 4, 6);
      TILE_LOAD(7, w + 2 * kPanelStride, kTileRow);
      TILE_BFLOATS(2, 4, 7);
      TILE_LOAD(5, w + 3 * kPanelStride, kTileRow);
      TILE_BFLOATS(3, 4, 5);
    }
    TILE_STORE(0, sums, kSumRow);
    TILE_STORE(1, sums + kStrip, kSumRow);
    TILE_STORE(2, sums + 2 * kStrip, kSumRow);
    TILE_STORE(3, sums + 3 * kStrip, kSumRow);
  }

  // Strips beyond `count` give sums that nobody reads.
  static void block(const uint16_t* panel, const uint16_t* x, int tokens, int columns, int count,
                    float* sums) {
    settle_memory();
    for (; tokens > kTokenTile; tokens -= 2 * kTokenTile) {
      for (int n = 0; n < count; n += 2)
        two_by_two(panel + n * kPanelStride, x, columns / 2, sums + n * kStrip);
      x += 2 * kTokenTile * kBlockColumns;
      sums += 2 * kTokenTile * kBlockRows;
    }
    if (tokens > 0) one_by_four(panel, x, columns / 2, sums);
  }
};

}  // namespace
}  // namespace LOWBIT_ISA

const Kernels& amx_kernels() {
  using namespace LOWBIT_ISA;
  static const Kernels kernels = [] {
    Kernels all = avx512bf16_kernels();
    all.quantize = quantize_for_tiles;
    all.multiply_block = multiply_tiles;
    all.multiply_pairs = multiply_pairs<BfloatTiles>;
    return all;
  }();
  return kernels;
}

}  // namespace lowbit
