// The kernels for x86-64 machines with AVX2.
#if defined(__x86_64__)

// The standard headers come before the target: their inline functions must stay runnable everywhere.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "contrastive/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define BACON_FAST_VECTOR_BYTES 32
#include "contrastive/kernel_table.h"

namespace bacon_fast::contrastive {
extern const Kernels<float> kAvx2Float = kTable<float>;
extern const Kernels<double> kAvx2Double = kTable<double>;
}  // namespace bacon_fast::contrastive

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
