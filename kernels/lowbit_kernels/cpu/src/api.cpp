// The C interface: picks the instruction set, shares the work among threads, owns the scratch space.
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <vector>

#include "tasks.h"

namespace lowbit {
namespace {

enum Isa : int32_t {
  kPortableIsa = 0,
  kAvx2Isa = 1,
  kAvx512Isa = 2,
  kAvx512Bf16Isa = 3,
  kAmxIsa = 4
};

#if (defined(__x86_64__) || defined(__i386__)) && !defined(LOWBIT_NO_BF16)
// Whether the processor has tiles for bytes and bfloat16, and Linux gives them to this process: it
// asks for them, because a thread that has used them has more to save. Refused, as in some virtual
// machines, they are not offered.
bool has_amx() {
#if defined(LOWBIT_NO_AMX)
  return false;
#elif defined(LOWBIT_EMULATE_AMX)
  return true;
#elif defined(__linux__) && defined(__x86_64__)
  constexpr unsigned kBfloatTiles = 1u << 22, kTiles = 1u << 24, kByteTiles = 1u << 25;
  constexpr unsigned kNeeded = kBfloatTiles | kTiles | kByteTiles;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}
#endif

int best_isa() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#ifndef LOWBIT_NO_BF16  // by build.py, where the compiler knows no such instructions
    // Cooper Lake has no VBMI, and does without.
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"))
      return has_amx() ? kAmxIsa : kAvx512Bf16Isa;
#endif
    return kAvx512Isa;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2Isa;
#endif
  return kPortableIsa;
}

const Kernels& kernels_for(int isa) {
#if defined(__x86_64__) || defined(__i386__)
#ifndef LOWBIT_NO_AMX
  if (isa == kAmxIsa) return amx_kernels();
#endif
#ifndef LOWBIT_NO_BF16
  if (isa == kAvx512Bf16Isa) return avx512bf16_kernels();
#endif
  if (isa == kAvx512Isa) return avx512_kernels();
  if (isa == kAvx2Isa) return avx2_kernels();
#endif
  (void)isa;
  return portable_kernels();
}

thread_local Scratch shared_scratch;  // of the calling thread, read by all
thread_local Scratch own_scratch;
thread_local std::vector<Piece> pieces;  // only grows

int up_to(int size, int left) { return left < size ? left : size; }

// `lowbit_linear` by bfloat16 products; x and out begin at the first of up to kPairTokens tokens.
int multiply_bfloats(const Kernels& kernels, const Weight& w, const uint16_t* x, int64_t x_stride,
                     int tokens, const float* bias, char* out, int out_type,
                     [[maybe_unused]] int threads) {
  const int rows = (tokens + kTokenTile - 1) / kTokenTile * kTokenTile, all_strips = strips(w);
  const size_t blocks = (padded_columns(w) + kBlockColumns - 1) / kBlockColumns;
  char* scratch = shared_scratch.get(part_bytes(blocks * rows * kBlockColumns * sizeof(uint16_t)));
  if (!scratch) return kNoMemory;
  uint16_t* arranged = reinterpret_cast<uint16_t*>(scratch);
  bool failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int m = 0; m < rows; m++)
      kernels.arrange(w, m < tokens ? x + m * x_stride : nullptr, m, rows, arranged);
    const size_t sums_at = part_bytes(sizeof(uint16_t) * kBlockStrips * kPanelStride);
    const size_t total = sums_at + part_bytes(sizeof(float) * rows * kBlockRows);
    char* own = own_scratch.get(total);
    if (!own) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(dynamic, 1)
    for (int strip = 0; strip < all_strips; strip += kBlockStrips) {
      if (!own) continue;
      const int first = strip * kStrip, count = up_to(kBlockRows, w.rows - first);
      float* sums = reinterpret_cast<float*>(own + sums_at);
      kernels.multiply_pairs(w, arranged, tokens, rows, strip,
                             up_to(kBlockStrips, all_strips - strip),
                             reinterpret_cast<uint16_t*>(own), sums);
      for (int m = 0; m < tokens; m++)
        kernels.narrow(sums + m * kBlockRows, bias ? bias + first : nullptr, count, out_type,
                       out + (static_cast<size_t>(m) * w.rows + first) * type_bytes(out_type));
    }
  }
  return failed ? kNoMemory : kDone;
}

// Weight number `e` of those that lie one after the other from `first` on.
Weight expert(const Weight& first, int e) {
  Weight w = first;
  const size_t skipped = static_cast<size_t>(strips(w)) * e;
  w.codes += skipped * strip_bytes(w);
  if (w.high) w.high += skipped * padded_columns(w) * 2;
  w.scale = static_cast<const char*>(w.scale) + skipped * w.groups * kStrip * type_bytes(w.scale_type);
  if (w.zero) w.zero += skipped * w.groups * kStrip;
  return w;
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" {

// 1 is added whenever the layout of Weight or a signature changes; the Python side refuses others.
int32_t lowbit_abi() { return 2; }

// What this was compiled from, as a hash (build.py).
#ifndef LOWBIT_MARK
#define LOWBIT_MARK "unknown"
#endif
const char* lowbit_mark() { return LOWBIT_MARK; }

// 0 portable, 1 AVX2, 2 AVX-512 with VNNI, 3 that with BF16 and VBMI, 4 that with AMX. Each offers
// what those before it offer.
int32_t lowbit_best_isa() { return best_isa(); }

// out[M, N] = x[M, K] W^T + bias. Rows of x are `x_stride` elements apart, those of out N.
//
// planes: 2 multiplies by 16-bit integers, 1 by 8-bit ones, 0 by the float32 activations themselves;
// 3 multiplies bfloat16 activations by weights rounded to bfloat16.
// step: what one unit of the integers is, see Activations.
// Returns 0, 1 where memory ran out, or 2 where planes is 3 and either the instruction set is below 3
// or x is not bfloat16.
int32_t lowbit_linear(const Weight* weight, const void* x, int64_t x_stride, int32_t x_type,
                      int32_t tokens, const float* bias, void* out, int32_t out_type,
                      int32_t planes, float step, int32_t threads, int32_t isa) {
  const Weight& w = *weight;
  const Kernels& kernels = kernels_for(isa);
  if (planes == 3) {
    if (!kernels.multiply_pairs || x_type != kBFloat16) return kNotOffered;
    for (int start = 0; start < tokens; start += kPairTokens) {
      const size_t skipped = static_cast<size_t>(start) * w.rows * type_bytes(out_type);
      const int status =
          multiply_bfloats(kernels, w, static_cast<const uint16_t*>(x) + start * x_stride, x_stride,
                           up_to(kPairTokens, tokens - start), bias,
                           static_cast<char*>(out) + skipped, out_type, threads);
      if (status != kDone) return status;
    }
    return kDone;
  }
  const Call call = {static_cast<const char*>(x), x_stride, x_type, bias, static_cast<char*>(out),
                     out_type, planes, step, threads};
  for (int start = 0; start < tokens; start += kTokenBlock) {
    pieces.assign(1, {w, start, up_to(kTokenBlock, tokens - start), nullptr, nullptr, {}, {}, {}});
    const Status status = run(kernels, call, pieces, shared_scratch);
    if (status != kDone) return status;
  }
  return kDone;
}

// out[out_rows[i], N] = W_e x[tokens[i]] for i in offsets[e] ... offsets[e + 1] - 1 and each of
// `experts` weights, whose strips lie one weight after the other; `weight` is the first.
int32_t lowbit_experts(const Weight* weight, int32_t experts, const int32_t* offsets,
                       const int32_t* tokens, const int32_t* out_rows, const void* x,
                       int64_t x_stride, int32_t x_type, void* out, int32_t out_type,
                       int32_t planes, int32_t threads, int32_t isa) {
  if (planes != 1 && planes != 2) return kNotOffered;
  const Kernels& kernels = kernels_for(isa);
  const Call call = {static_cast<const char*>(x), x_stride, x_type, nullptr,
                     static_cast<char*>(out), out_type, planes, 0.0f, threads};
  pieces.clear();
  int waiting = 0;
  for (int e = 0; e < experts; e++)
    for (int i = offsets[e]; i < offsets[e + 1]; i += kTokenBlock) {
      const int count = up_to(kTokenBlock, offsets[e + 1] - i);
      if (waiting + count > kTokenBlock) {
        const Status status = run(kernels, call, pieces, shared_scratch);
        if (status != kDone) return status;
        pieces.clear();
        waiting = 0;
      }
      pieces.push_back({expert(*weight, e), 0, count, tokens + i, out_rows + i, {}, {}, {}});
      waiting += count;
    }
  return run(kernels, call, pieces, shared_scratch);
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

// out[count, K] = the rows `rows` of W, each 0 ... N - 1, rounded once to `out_type`. Returns 0, or 1
// where memory ran out.
int32_t lowbit_decode_rows(const Weight* weight, const int64_t* rows, int32_t count, void* out,
                           int32_t out_type, [[maybe_unused]] int32_t threads, int32_t isa) {
  const Weight& w = *weight;
  const Kernels& kernels = kernels_for(isa);
  const size_t row_bytes = static_cast<size_t>(w.columns) * type_bytes(out_type);
  const size_t panel_bytes = part_bytes(panel_floats(w) * sizeof(float));
  bool failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // Whole strips are decoded: they are in one piece of memory, and that is where the time goes.
    char* own = own_scratch.get(panel_bytes + kStrip * row_bytes);
    if (!own) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(static)
    for (int i = 0; i < count; i++) {
      if (!own) continue;
      const int strip = static_cast<int>(rows[i] / kStrip), row = static_cast<int>(rows[i] % kStrip);
      kernels.decode(w, strip, row + 1, reinterpret_cast<float*>(own), own + panel_bytes, out_type);
      std::memcpy(static_cast<char*>(out) + i * row_bytes, own + panel_bytes + row * row_bytes,
                  row_bytes);
    }
  }
  return failed ? kNoMemory : kDone;
}

}  // extern "C"
