// Softmax of one row of logits, in float or double, from logits of any floating-point type.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace bacon_fast {

// exp(x) for x <= 0 with a relative error of 2e-7; below -87 it stays at exp(-87), which is 0 beside the exp(0) of a row's
// largest logit. It has no branches, so the compiler can vectorize it.
inline float exp_not_positive(float x) {
  constexpr float kRound = 12582912.0f;  // adding 1.5 · 2^23 rounds to an integer, which sits in the low bits
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts; |r| <= ln(2) / 2
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Unsigned, and from the bits: a NaN, which p keeps, is no integer.
  return p * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
}

#if defined(__x86_64__)
#define BACON_FAST_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define BACON_FAST_CLONES
#endif

// Overwrites `values` with exp(value - largest) and returns their sum.
BACON_FAST_CLONES inline float exp_and_sum(float* values, int64_t count, float largest) {
  for (int64_t k = 0; k < count; ++k) values[k] = exp_not_positive(values[k] - largest);
  float sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += values[k];
  return sum;
}

inline double exp_and_sum(double* values, int64_t count, double largest) {
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += values[k] = std::exp(values[k] - largest);
  return sum;
}

template <class T>
struct Softmax {
  int64_t top = 0;  // index of the largest logit, the first one of equals
  T sum = 0;        // of exp(logit - largest)
  T lse = 0;        // log of the sum of exp(logit)

  // Overwrites `values`, logits, with exp(logit - largest).
  Softmax(T* values, int64_t count) {
    T largest = -std::numeric_limits<T>::infinity();
    for (int64_t k = 0; k < count; ++k) {
      if (values[k] > largest) largest = values[k], top = k;
    }
    sum = exp_and_sum(values, count, largest);
    lse = largest + std::log(sum);
  }
};

}  // namespace bacon_fast
