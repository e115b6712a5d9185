#include "contrastive/kernels.h"

#include <ATen/Version.h>

#include <string>

namespace bacon_fast::contrastive {

extern const Kernels<float> kGenericFloat;
extern const Kernels<double> kGenericDouble;

#if defined(__x86_64__)
extern const Kernels<float> kAvx2Float, kAvx512Float;
extern const Kernels<double> kAvx2Double, kAvx512Double;

template <class T>
const Kernels<T>& choose(const Kernels<T>& generic, const Kernels<T>& avx2, const Kernels<T>& avx512) {
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return avx512;
  if (capability == "AVX2") return avx2;
  return generic;
}

template <>
const Kernels<float>& kernels<float>() {
  static const Kernels<float>& chosen = choose(kGenericFloat, kAvx2Float, kAvx512Float);
  return chosen;
}

template <>
const Kernels<double>& kernels<double>() {
  static const Kernels<double>& chosen = choose(kGenericDouble, kAvx2Double, kAvx512Double);
  return chosen;
}
#else
template <>
const Kernels<float>& kernels<float>() {
  return kGenericFloat;
}

template <>
const Kernels<double>& kernels<double>() {
  return kGenericDouble;
}
#endif

}  // namespace bacon_fast::contrastive
