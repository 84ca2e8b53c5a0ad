// The C interface: picks the instruction set, shares the work among threads, owns the scratch space.
#include <cstdlib>
#include <initializer_list>

#include "kernels.h"
#include "scratch.h"

namespace lowbit {
namespace {

enum Isa : int32_t { kPortableIsa = 0, kAvx2Isa = 1, kAvx512Isa = 2 };

int best_isa() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return kAvx512Isa;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2Isa;
#endif
  return kPortableIsa;
}

const Kernels& kernels_for(int isa) {
#if defined(__x86_64__) || defined(__i386__)
  if (isa == kAvx512Isa) return avx512_kernels();
  if (isa == kAvx2Isa) return avx2_kernels();
#endif
  (void)isa;
  return portable_kernels();
}

thread_local Scratch shared_scratch;  // of the calling thread, read by all
thread_local Scratch own_scratch;

size_t type_bytes(int type) { return type == kFloat32 ? 4 : 2; }

// Where the parts of the shared scratch begin.
struct Plan {
  size_t widened, bytes, unit, sum_high, sum_low, out, total;
};

Plan plan(const Weight& w, int tokens, int planes) {
  const size_t columns = padded_columns(w), parts = segments(w);
  const size_t sums = part_bytes(tokens * parts * sizeof(float));
  Plan p;
  p.widened = 0;
  p.bytes = p.widened + part_bytes(tokens * columns * sizeof(float));
  p.unit = p.bytes + part_bytes(tokens * columns * planes);
  p.sum_high = p.unit + sums;
  p.sum_low = p.sum_high + sums;
  p.out = p.sum_low + sums;
  p.total = p.out + part_bytes(tokens * static_cast<size_t>(strips(w)) * kStrip * sizeof(float));
  return p;
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" {

// 1 is added whenever the layout of Weight or a signature changes; the Python side refuses others.
int32_t lowbit_abi() { return 1; }

// What this was compiled from, as a hash (build.py).
#ifndef LOWBIT_MARK
#define LOWBIT_MARK "unknown"
#endif
const char* lowbit_mark() { return LOWBIT_MARK; }

// 0 portable, 1 AVX2, 2 AVX-512 with VNNI.
int32_t lowbit_best_isa() { return best_isa(); }

// out[M, N] = x[M, K] W^T + bias. Rows of x are `x_stride` elements apart, those of out N.
//
// planes: 2 multiplies by 16-bit integers, 1 by 8-bit ones, 0 by the float32 activations themselves.
// Returns 0, or 1 where memory ran out.
int32_t lowbit_linear(const Weight* weight, const void* x, int64_t x_stride, int32_t x_type,
                      int32_t tokens, const float* bias, void* out, int32_t out_type,
                      int32_t planes, int32_t threads, int32_t isa) {
  const Weight& w = *weight;
  const Kernels& kernels = kernels_for(isa);
  const int all_strips = strips(w), columns = padded_columns(w);
  const size_t out_stride = static_cast<size_t>(all_strips) * kStrip;
  bool failed = false;
  for (int start = 0; start < tokens; start += kTokenBlock) {
    const int count = tokens - start < kTokenBlock ? tokens - start : kTokenBlock;
    const Plan at = plan(w, count, planes ? planes : 1);
    char* scratch = shared_scratch.get(at.total);
    if (!scratch) return 1;
    for (size_t end : {at.bytes, at.unit, at.sum_high, at.sum_low, at.out, at.total})
      close_part(scratch, end);
    float* widened = reinterpret_cast<float*>(scratch + at.widened);
    const Activations a = {planes,
                           count,
                           reinterpret_cast<int8_t*>(scratch + at.bytes),
                           reinterpret_cast<float*>(scratch + at.unit),
                           reinterpret_cast<float*>(scratch + at.sum_high),
                           reinterpret_cast<float*>(scratch + at.sum_low)};
    float* sums = reinterpret_cast<float*>(scratch + at.out);
    const char* first = static_cast<const char*>(x) + start * x_stride * type_bytes(x_type);
    // A few strips at a time, so that a thread that is held up leaves work to the others.
    const int step = all_strips / (threads * 8) > 4 ? all_strips / (threads * 8) / 4 * 4 : 4;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
      for (int m = 0; m < count; m++) {
        float* row = widened + static_cast<size_t>(m) * columns;
        kernels.widen(w, first + m * x_stride * type_bytes(x_type), x_type, row);
        if (planes) kernels.quantize(w, row, m, a);
      }
      float* panel = nullptr;
      if (!planes) panel = reinterpret_cast<float*>(own_scratch.get(panel_floats(w) * 4));
      if (!planes && !panel) {
#pragma omp atomic write
        failed = true;
      }
#pragma omp for schedule(dynamic, 1)
      for (int strip = 0; strip < all_strips; strip += step) {
        const int last = strip + step < all_strips ? strip + step : all_strips;
        if (!planes) {
          if (panel) kernels.multiply_many(w, widened, count, strip, last, panel, sums, out_stride);
          continue;
        }
        (count <= kMaxTokens ? kernels.multiply : kernels.multiply_block)(w, a, strip, last, sums,
                                                                          out_stride);
      }
#pragma omp for schedule(static)
      for (int m = 0; m < count; m++)
        kernels.narrow(sums + m * out_stride, bias, w.rows, out_type,
                       static_cast<char*>(out) +
                           static_cast<size_t>(start + m) * w.rows * type_bytes(out_type));
    }
    if (failed) return 1;
  }
  return 0;
}

// out[N, K] = W, rounded once to `out_type`. Returns 0, or 1 where memory ran out.
int32_t lowbit_decode(const Weight* weight, void* out, int32_t out_type,
                      [[maybe_unused]] int32_t threads, int32_t isa) {
  const Weight& w = *weight;
  const Kernels& kernels = kernels_for(isa);
  bool failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const size_t strip_size = kStrip * w.columns * type_bytes(out_type);
    float* panel = reinterpret_cast<float*>(own_scratch.get(panel_floats(w) * sizeof(float)));
    if (!panel) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(static)
    for (int strip = 0; strip < strips(w); strip++) {
      const int left = w.rows - strip * kStrip;
      if (panel)
        kernels.decode(w, strip, left < kStrip ? left : kStrip, panel,
                       static_cast<char*>(out) + strip * strip_size, out_type);
    }
  }
  return failed ? 1 : 0;
}

}  // extern "C"
