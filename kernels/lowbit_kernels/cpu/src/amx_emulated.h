// The tile instructions that amx.h names, in plain C++. Their order of sums and roundings is that
// of Intel's manual, but small numbers are not flushed to zero. A tile that is used as it is not
// configured ends the process.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define TILE_LOAD(tile, address, stride) lowbit::emulated::load(tile, address, stride)
#define TILE_STORE(tile, address, stride) lowbit::emulated::store(tile, address, stride)
#define TILE_ZERO(tile) lowbit::emulated::zero(tile)
#define TILE_BFLOATS(sum, a, b) lowbit::emulated::multiply_bfloats(sum, a, b)
#define TILE_BYTES(sum, a, b) lowbit::emulated::multiply_bytes(sum, a, b)
#define TILE_CONFIGURE(config) lowbit::emulated::configure(config)
#define TILE_RELEASE() lowbit::emulated::release()

namespace lowbit {
namespace emulated {

struct Tile {
  int rows, row_bytes;  // 0: not configured
  uint8_t bytes[16][64];

  template <class T> T at(int row, int index) const {
    T value;
    std::memcpy(&value, bytes[row] + index * sizeof(T), sizeof(T));
    return value;
  }
  template <class T> void put(int row, int index, T value) {
    std::memcpy(bytes[row] + index * sizeof(T), &value, sizeof(T));
  }
};

inline Tile* tiles() {
  thread_local Tile all[8] = {};
  return all;
}

inline void require(bool right) {
  if (!right) std::abort();
}

inline Tile& configured(int tile) {
  require(tiles()[tile].rows > 0);
  return tiles()[tile];
}

inline void release() { std::memset(tiles(), 0, 8 * sizeof(Tile)); }

// Byte 0: palette; bytes 16 ...: bytes of a row; bytes 48 ...: rows.
inline void configure(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  require(bytes[0] == 1);
  release();
  for (int i = 0; i < 8; i++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    require(row_bytes <= 64 && row_bytes % 4 == 0 && bytes[48 + i] <= 16);
    tiles()[i].rows = bytes[48 + i];
    tiles()[i].row_bytes = row_bytes;
  }
}

inline void zero(int tile) { std::memset(configured(tile).bytes, 0, sizeof(Tile::bytes)); }

inline void load(int tile, const void* address, size_t stride) {
  Tile& t = configured(tile);
  for (int r = 0; r < t.rows; r++)
    std::memcpy(t.bytes[r], static_cast<const char*>(address) + r * stride, t.row_bytes);
}

inline void store(int tile, void* address, size_t stride) {
  const Tile& t = configured(tile);
  for (int r = 0; r < t.rows; r++)
    std::memcpy(static_cast<char*>(address) + r * stride, t.bytes[r], t.row_bytes);
}

// The sizes that a product needs: C[m][n] += A[m][k] B[k][n] in units of four bytes.
inline void require_sizes(const Tile& c, const Tile& a, const Tile& b) {
  require(c.rows == a.rows && a.row_bytes == 4 * b.rows && c.row_bytes == b.row_bytes);
}

inline float widened(uint16_t bfloat) {
  const uint32_t bits = static_cast<uint32_t>(bfloat) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void multiply_bfloats(int sum, int first, int second) {
  Tile& c = configured(sum);
  const Tile &a = configured(first), &b = configured(second);
  require_sizes(c, a, b);
  for (int m = 0; m < c.rows; m++)
    for (int n = 0; n < c.row_bytes / 4; n++) {
      float even = 0, odd = 0;
      for (int k = 0; k < b.rows; k++) {
        even = std::fma(widened(a.at<uint16_t>(m, 2 * k)), widened(b.at<uint16_t>(k, 2 * n)), even);
        odd = std::fma(widened(a.at<uint16_t>(m, 2 * k + 1)), widened(b.at<uint16_t>(k, 2 * n + 1)),
                       odd);
      }
      c.put<float>(m, n, c.at<float>(m, n) + (even + odd));
    }
}

inline void multiply_bytes(int sum, int first, int second) {
  Tile& c = configured(sum);
  const Tile &a = configured(first), &b = configured(second);
  require_sizes(c, a, b);
  for (int m = 0; m < c.rows; m++)
    for (int n = 0; n < c.row_bytes / 4; n++) {
      int32_t total = c.at<int32_t>(m, n);
      for (int k = 0; k < b.rows; k++)
        for (int i = 0; i < 4; i++)
          total += a.at<int8_t>(m, 4 * k + i) * b.at<uint8_t>(k, 4 * n + i);
      c.put<int32_t>(m, n, total);
    }
}

}  // namespace emulated
}  // namespace lowbit
