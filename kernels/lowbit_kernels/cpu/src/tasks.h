// Products by integers or float32 activations: what is computed when, and by which thread.
//
// Tokens are prepared first, once for all rows. A task is then a few strips for one piece: it
// multiplies, adds the bias and rounds, so that threads meet once at the end.
#pragma once
#include <vector>

#include "kernels.h"
#include "scratch.h"

namespace lowbit {

enum Status : int32_t { kDone = 0, kNoMemory = 1, kNotOffered = 2 };

inline size_t type_bytes(int type) { return type == kFloat32 ? 4 : 2; }

// What all pieces of a call share.
struct Call {
  const char* x;
  int64_t x_stride;  // elements
  int x_type;
  const float* bias;  // or null
  char* out;
  int out_type;
  int planes;
  float step;  // see Activations
  int threads;
};

// Up to kTokenBlock tokens that are multiplied by one weight. Their rows in x and in out are the
// numbers in `tokens` and `out_rows`, or from `first` on where those are null.
struct Piece {
  Weight weight;
  int first, count;
  const int32_t* tokens;
  const int32_t* out_rows;
  // Filled in by `place`.
  Activations a;
  float* widened;
  float* sums;
};

// Gives a piece its memory, from `memory` on, and returns the bytes; null only counts them.
inline size_t place(Piece& p, int planes, float step, char* memory) {
  const Weight& w = p.weight;
  const size_t tokens = p.count, columns = padded_columns(w);
  const size_t units = part_bytes(tokens * segments(w) * sizeof(float));
  size_t at = 0;
  const auto part = [&](size_t bytes) {
    char* start = memory ? memory + at : nullptr;
    at += bytes;
    if (memory) close_part(memory, at);
    return start;
  };
  p.widened = reinterpret_cast<float*>(part(part_bytes(tokens * columns * sizeof(float))));
  char* bytes = part(part_bytes(tokens * columns * (planes ? planes : 1)));
  char* unit = part(units);
  char* high = part(units);
  char* low = part(units);
  p.sums = reinterpret_cast<float*>(part(part_bytes(tokens * strips(w) * kStrip * sizeof(float))));
  p.a = {planes,
         p.count,
         step,
         reinterpret_cast<int8_t*>(bytes),
         reinterpret_cast<float*>(unit),
         reinterpret_cast<float*>(high),
         reinterpret_cast<float*>(low)};
  return at;
}

inline void prepare_token(const Kernels& kernels, const Call& call, const Piece& p, int m) {
  const int64_t row = p.tokens ? p.tokens[m] : p.first + m;
  float* widened = p.widened + static_cast<size_t>(m) * padded_columns(p.weight);
  kernels.widen(p.weight, call.x + row * call.x_stride * type_bytes(call.x_type), call.x_type,
                widened);
  if (call.planes) kernels.quantize(p.weight, widened, m, p.a);
}

// Rows of the strips first ... last - 1 of a piece's product. `panel`: memory where planes is 0.
inline void multiply_strips(const Kernels& kernels, const Call& call, const Piece& p, int first,
                            int last, float* panel) {
  const Weight& w = p.weight;
  const size_t stride = static_cast<size_t>(strips(w)) * kStrip;
  if (!call.planes)
    kernels.multiply_many(w, p.widened, p.count, first, last, panel, p.sums, stride);
  else if (p.count <= kMaxTokens)
    kernels.multiply(w, p.a, first, last, p.sums, stride);
  else
    kernels.multiply_block(w, p.a, first, last, p.sums, stride);
  const int row = first * kStrip, stop = last * kStrip < w.rows ? last * kStrip : w.rows;
  for (int m = 0; m < p.count; m++) {
    const size_t at = static_cast<size_t>(p.out_rows ? p.out_rows[m] : p.first + m) * w.rows + row;
    kernels.narrow(p.sums + m * stride + row, call.bias ? call.bias + row : nullptr, stop - row,
                   call.out_type, call.out + at * type_bytes(call.out_type));
  }
}

// All pieces, whose weights are of one size. Static: a thread's memory below belongs to this library,
// not to whichever was loaded first.
static Status run(const Kernels& kernels, const Call& call, std::vector<Piece>& pieces,
                  Scratch& shared) {
  if (pieces.empty()) return kDone;
  size_t total = 0;
  int tokens = 0;
  for (Piece& p : pieces) {
    total += place(p, call.planes, call.step, nullptr);
    tokens += p.count;
  }
  char* memory = shared.get(total);
  if (!memory) return kNoMemory;
  for (Piece& p : pieces) memory += place(p, call.planes, call.step, memory);
  // Preparing a few tokens takes less than waiting for each other.
  const bool alone = call.threads == 1 || tokens <= kMaxTokens;
  if (alone)
    for (const Piece& p : pieces)
      for (int m = 0; m < p.count; m++) prepare_token(kernels, call, p, m);
  // A few strips at a time, so that a thread that is held up leaves work to the others.
  const int all = strips(pieces[0].weight), share = all / (call.threads * 8) / 4 * 4;
  const int step = share > 4 ? share : 4, ranges = (all + step - 1) / step;
  const int count = static_cast<int>(pieces.size());
  const size_t panel_bytes = call.planes ? 0 : panel_floats(pieces[0].weight) * sizeof(float);
  bool failed = false;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  {
    static thread_local Scratch own;
    float* panel = panel_bytes ? reinterpret_cast<float*>(own.get(panel_bytes)) : nullptr;
    if (panel_bytes && !panel) {
#pragma omp atomic write
      failed = true;
    }
    if (!alone) {
      for (int i = 0; i < count; i++) {
#pragma omp for schedule(static) nowait
        for (int m = 0; m < pieces[i].count; m++) prepare_token(kernels, call, pieces[i], m);
      }
#pragma omp barrier
    }
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < count * ranges; task++) {
      const int first = task % ranges * step, last = first + step < all ? first + step : all;
      if (!panel_bytes || panel)
        multiply_strips(kernels, call, pieces[task / ranges], first, last, panel);
    }
  }
  return failed ? kNoMemory : kDone;
}

}  // namespace lowbit
