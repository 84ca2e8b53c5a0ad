// How the codes of each kind are read: vectors of packed codes, and the bytes of each quad in them.
#pragma once
#include <type_traits>
#include <utility>

#include "isa.h"

namespace lowbit {
namespace LOWBIT_ISA {

// f(0), ..., f(kCount - 1), with constants.
template <class F, int... kIndex>
LOWBIT_INLINE void with_each(F& f, std::integer_sequence<int, kIndex...>) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}
template <int kCount, class F> LOWBIT_INLINE void with_constants(F f) {
  with_each(f, std::make_integer_sequence<int, kCount>{});
}

// The same with constants only where they make arrays live in registers; code of plain C++ would
// become long, and no faster.
template <int kCount, class F> LOWBIT_INLINE void repeat(F f) {
  if constexpr (Isa::kInRegisters)
    with_constants<kCount>(f);
  else
    for (int i = 0; i < kCount; i++) f(i);
}

// One strip's packed codes of kColumns columns: kBytes of them, and kHigh bytes of high bits.
// `quad<i>` are the bytes of four columns, for a codebook indices.
template <int kKind> struct Packed;

template <> struct Packed<kInt8> {
  static constexpr int kColumns = 4, kBytes = 64, kHigh = 0;
  Isa::Bytes codes;
  void read(const uint8_t* p, const uint8_t*) { codes = Isa::load(p); }
  template <int kQuad> Isa::Bytes quad() const { return codes; }
};
template <> struct Packed<kInt4> {
  static constexpr int kColumns = 8, kBytes = 64, kHigh = 0;
  Isa::Bytes codes;
  void read(const uint8_t* p, const uint8_t*) { codes = Isa::load(p); }
  template <int kQuad> Isa::Bytes quad() const { return Isa::field<4 * kQuad>(codes, 15); }
};
template <> struct Packed<kCodebook> : Packed<kInt4> {};
template <> struct Packed<kInt2> {
  static constexpr int kColumns = 16, kBytes = 64, kHigh = 0;
  Isa::Bytes codes;
  void read(const uint8_t* p, const uint8_t*) { codes = Isa::load(p); }
  template <int kQuad> Isa::Bytes quad() const { return Isa::field<2 * kQuad>(codes, 3); }
};
template <> struct Packed<kInt3> {
  static constexpr int kColumns = 32, kBytes = 128, kHigh = 64;
  Isa::Bytes codes[2], high;
  void read(const uint8_t* p, const uint8_t* h) {
    codes[0] = Isa::load(p);
    codes[1] = Isa::load(p + 64);
    high = Isa::load(h);
  }
  template <int kQuad> Isa::Bytes quad() const {
    return Isa::either(Isa::field<2 * (kQuad % 4)>(codes[kQuad / 4], 3),
                       Isa::field<kQuad - 2>(high, 4));
  }
};

// What `unpack` writes: bytes below 16, and the high and low bytes of a codebook's values.
constexpr int kNarrowBytes = 32, kWideBytes = 33, kTwoBytes = 34;
template <> struct Packed<kNarrowBytes> : Packed<kInt8> {};
template <> struct Packed<kWideBytes> : Packed<kInt8> {};
template <> struct Packed<kTwoBytes> {
  static constexpr int kColumns = 4, kBytes = 64, kHigh = 64;
  Isa::Bytes codes, low;
  void read(const uint8_t* p, const uint8_t* low_bytes) {
    codes = Isa::load(p);
    low = Isa::load(low_bytes);
  }
  template <int kQuad> Isa::Bytes quad() const { return codes; }
};
constexpr int unpacked(int kind) {
  return kind == kCodebook ? kTwoBytes : kind == kInt8 ? kWideBytes : kNarrowBytes;
}
constexpr bool has_table(int kind) { return kind == kCodebook || kind == kTwoBytes; }

template <int kKind> struct Codes : Packed<kKind> {
  // visit(quad, bytes, low bytes) for each quad; the tables are a codebook's.
  template <class F>
  static void visit(const uint8_t* p, const uint8_t* high_bits, const Isa::Bytes& high,
                    const Isa::Bytes& low, F f) {
    Codes codes;
    codes.read(p, high_bits);
    with_constants<Codes::kColumns / 4>([&](auto quad) LOWBIT_INLINED {
      const Isa::Bytes v = codes.template quad<quad>();
      if constexpr (kKind == kCodebook)
        f(quad, Isa::lookup(high, v), Isa::lookup(low, v));
      else
        f(quad, v, v);
    });
  }
};

// load_typed of some strips at the same place, `stride` values apart.
template <int kStrips>
LOWBIT_INLINE void load_typed_strips(const void* p, size_t at, size_t stride, int type,
                                     Isa::Floats (&out)[kStrips]) {
  const uint16_t* halves = static_cast<const uint16_t*>(p) + at;
  if (type == kFloat16)
    repeat<kStrips>([&](auto n) LOWBIT_INLINED {
      out[n] = Isa::load_halves(halves + n * stride);
    });
  else if (type == kBFloat16)
    repeat<kStrips>([&](auto n) LOWBIT_INLINED {
      out[n] = Isa::load_bfloats(halves + n * stride);
    });
  else
    repeat<kStrips>([&](auto n) LOWBIT_INLINED {
      out[n] = Isa::load_floats(static_cast<const float*>(p) + at + n * stride);
    });
}

// The high and low bytes of a codebook's values, each plus 128. Other kinds have none.
struct Tables {
  Isa::Bytes high, low;
};
template <int kKind> inline Tables load_tables(const Weight& w) {
  Tables tables{};
  if (kKind == kCodebook) tables = {Isa::load_table(w.table), Isa::load_table(w.table + 16)};
  return tables;
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
