// The tile instructions of AMX: eight tiles of up to 16 rows of 64 bytes.
//
//     TDPBF16PS   C[16 tokens][16 rows] float32 += A[16 tokens][32 columns] B[16 pairs][16 rows][2]
//     TDPBSUD     C[16 tokens][16 rows] int32 += A[16 tokens][64 columns] B[16 quads][16 rows][4]
//                 with A signed and B unsigned
//
// Tiles are numbers in the instructions, so these are macros. With LOWBIT_EMULATE_AMX they are
// plain C++, so that what is built of them is tested on any processor with AVX512_BF16.
#pragma once
#include <immintrin.h>

#include <cstdint>

#ifdef LOWBIT_EMULATE_AMX
#include "amx_emulated.h"
#else
#define TILE_LOAD(tile, address, stride) _tile_loadd(tile, address, stride)
#define TILE_STORE(tile, address, stride) _tile_stored(tile, address, stride)
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_BFLOATS(sum, a, b) _tile_dpbf16ps(sum, a, b)
#define TILE_BYTES(sum, a, b) _tile_dpbsud(sum, a, b)
#define TILE_CONFIGURE(config) _tile_loadconfig(config)
#define TILE_RELEASE() _tile_release()
#endif

namespace lowbit {

// The operand of LDTILECFG: the sizes of the tiles.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Tiles first ... last - 1.
  void set(int first, int last, int tile_rows, int bytes) {
    for (int tile = first; tile < last; tile++) {
      rows[tile] = static_cast<uint8_t>(tile_rows);
      row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
  }
};

// Compilers take the instructions to read and write registers only: memory is written before them.
inline void settle_memory() { asm volatile("" ::: "memory"); }

// Tiles of this thread, while it lives. Threads belong to others too, and one with tiles in use has
// 8 KiB more to save at every switch.
class TileRegisters {
 public:
  TileRegisters() = default;
  ~TileRegisters() { TILE_RELEASE(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  void configure(const TileConfig& config) {
    settle_memory();
    TILE_CONFIGURE(&config);
  }
};

}  // namespace lowbit
