#include "floats.h"

namespace lowbit {
const Kernels& avx2_kernels() {
  static const Kernels kernels = kernels_of_this_isa();
  return kernels;
}
}  // namespace lowbit
