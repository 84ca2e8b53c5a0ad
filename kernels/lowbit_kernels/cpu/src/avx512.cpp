#include "floats.h"

namespace lowbit {
const Kernels& avx512_kernels() {
  static const Kernels kernels = kernels_of_this_isa();
  return kernels;
}
}  // namespace lowbit
