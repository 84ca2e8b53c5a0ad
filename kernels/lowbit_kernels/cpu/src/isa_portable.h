// Loops over 16 lanes that a compiler turns into whatever vectors the machine has. Included by
// `isa.h`.
#pragma once
#include "scalar.h"

namespace lowbit {
namespace LOWBIT_ISA {

struct Isa {
  struct Bytes { uint8_t v[64]; };
  struct Ints { int32_t v[16]; };
  struct Floats { float v[16]; };
  static constexpr bool kWords = false;  // two planes of activations are words of 16 bits
  static constexpr bool kUnpacks = true;      // see block.h
  static constexpr bool kInRegisters = false;
  static constexpr int kSums = 1, kTileStrips = 1, kBlockSums = 4, kTokensAtOnce = 4;

  static Bytes load(const uint8_t* p) {
    Bytes r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  static void store_bytes(uint8_t* p, const Bytes& v) { std::memcpy(p, v.v, 64); }
  static void prefetch(const void*) {}
  static Bytes load_table(const uint8_t* p) {
    Bytes r;
    for (int i = 0; i < 64; i++) r.v[i] = p[i % 16];
    return r;
  }
  static Bytes lookup(const Bytes& t, const Bytes& index) {
    Bytes r;
    for (int i = 0; i < 64; i++) r.v[i] = t.v[index.v[i]];
    return r;
  }
  template <int kShift> static Bytes field(const Bytes& v, uint8_t mask) {
    Bytes r;
    for (int i = 0; i < 64; i++) {
      const int byte = v.v[i];
      const int moved = kShift >= 0 ? byte >> (kShift >= 0 ? kShift : 0)
                                    : byte << (kShift < 0 ? -kShift : 0);
      r.v[i] = static_cast<uint8_t>(moved & mask);
    }
    return r;
  }
  static Bytes either(const Bytes& a, const Bytes& b) {
    Bytes r;
    for (int i = 0; i < 64; i++) r.v[i] = a.v[i] | b.v[i];
    return r;
  }
  static Ints zero() { return Ints{}; }
  struct Four { int8_t v[4]; };
  static Four four(const int8_t* x) { return {{x[0], x[1], x[2], x[3]}}; }
  template <bool kNarrow> static Ints dot(Ints sum, const Bytes& w, const Four& x) {
    for (int r = 0; r < 16; r++)
      sum.v[r] += w.v[4 * r] * x.v[0] + w.v[4 * r + 1] * x.v[1] + w.v[4 * r + 2] * x.v[2] +
                  w.v[4 * r + 3] * x.v[3];
    return sum;
  }
  template <class F> static Floats each(F f) {
    Floats r;
    for (int i = 0; i < 16; i++) r.v[i] = f(i);
    return r;
  }
  template <int kByte> static Floats byte(const Bytes& v) {
    return each([&](int i) { return static_cast<float>(v.v[4 * i + kByte]); });
  }
  using Levels = Floats;
  static Levels load_levels(const float* p) { return load_floats(p); }
  template <int kByte> static Floats level(const Levels& levels, const Bytes& v) {
    return each([&](int i) { return levels.v[v.v[4 * i + kByte]]; });
  }
  static Floats to_float(const Ints& v) {
    return each([&](int i) { return static_cast<float>(v.v[i]); });
  }
  static Floats set(float v) { return each([=](int) { return v; }); }
  static Floats mul(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static Floats add(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static Floats load_floats(const float* p) {
    return each([=](int i) { return p[i]; });
  }
  static void store(float* p, const Floats& v) { std::memcpy(p, v.v, sizeof v.v); }
  static void store_half(uint16_t* p, const Floats& v) {
    for (int i = 0; i < 16; i++) p[i] = float_to_half(v.v[i]);
  }
  static void store_bfloat(uint16_t* p, const Floats& v) {
    for (int i = 0; i < 16; i++) p[i] = float_to_bfloat(v.v[i]);
  }
  static void transpose(Floats* v) {
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < i; j++) {
        const float t = v[i].v[j];
        v[i].v[j] = v[j].v[i];
        v[j].v[i] = t;
      }
  }
  static Floats load_bytes(const uint8_t* p) {
    return each([=](int i) { return static_cast<float>(p[i]); });
  }
  static Floats load_halves(const uint16_t* p) {
    return each([=](int i) { return half_to_float(p[i]); });
  }
  static Floats load_bfloats(const uint16_t* p) {
    return each([=](int i) { return bfloat_to_float(p[i]); });
  }
};

}  // namespace LOWBIT_ISA
}  // namespace lowbit
