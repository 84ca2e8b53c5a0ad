// The few vector operations that the kernels are written in, for each instruction set.
//
// A file that includes this is compiled with the flags of one instruction set and sees one `Isa`:
// Bytes are 64 bytes, Ints and Floats 16 lanes.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "weight.h"

// A name per file and set of flags: two functions of one name would be linked as one of them.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#ifndef LOWBIT_ISA  // avx512bf16.cpp and amx.cpp name themselves
#define LOWBIT_ISA avx512
#endif
#include "isa_avx512.h"
#elif defined(__AVX2__)
#define LOWBIT_ISA avx2
#include "isa_avx2.h"
#else
#define LOWBIT_ISA portable
#include "isa_portable.h"
#endif
#include "scalar.h"

// For the innermost loops: inlined into their callers, GCC keeps their sums in memory.
#if defined(__GNUC__)
#define LOWBIT_LOOP __attribute__((noinline))
#else
#define LOWBIT_LOOP
#endif
// For what these are made of, lambdas too. (Plain C++, which has no registers for sums, would
// become four times as long.)
#if defined(__GNUC__) && defined(__AVX2__)
#define LOWBIT_INLINED __attribute__((always_inline))
#else
#define LOWBIT_INLINED
#endif
#define LOWBIT_INLINE inline LOWBIT_INLINED

namespace lowbit {
namespace LOWBIT_ISA {

inline Isa::Floats load_typed(const void* p, size_t index, int type) {
  if (type == kFloat16) return Isa::load_halves(static_cast<const uint16_t*>(p) + index);
  if (type == kBFloat16) return Isa::load_bfloats(static_cast<const uint16_t*>(p) + index);
  return Isa::load_floats(static_cast<const float*>(p) + index);
}

inline void store_typed(void* p, size_t index, int type, const Isa::Floats& v) {
  if (type == kFloat16)
    Isa::store_half(static_cast<uint16_t*>(p) + index, v);
  else if (type == kBFloat16)
    Isa::store_bfloat(static_cast<uint16_t*>(p) + index, v);
  else
    Isa::store(static_cast<float*>(p) + index, v);
}
// The first `count` lanes, at most 16.
inline void store_some(void* p, size_t index, int type, const Isa::Floats& v, int count) {
  if (count == 16) return store_typed(p, index, type, v);
  float lanes[16];
  Isa::store(lanes, v);
  for (int i = 0; i < count; i++) {
    if (type == kFloat16)
      static_cast<uint16_t*>(p)[index + i] = float_to_half(lanes[i]);
    else if (type == kBFloat16)
      static_cast<uint16_t*>(p)[index + i] = float_to_bfloat(lanes[i]);
    else
      static_cast<float*>(p)[index + i] = lanes[i];
  }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
