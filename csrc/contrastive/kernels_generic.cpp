// The kernels for any machine, vectors of 16 bytes: SSE2 on x86-64, NEON on arm64.
#define BACON_FAST_VECTOR_BYTES 16
#include "contrastive/kernel_table.h"

namespace bacon_fast::contrastive {
extern const Kernels<float> kGenericFloat = kTable<float>;
extern const Kernels<double> kGenericDouble = kTable<double>;
}  // namespace bacon_fast::contrastive
