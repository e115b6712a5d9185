// Loops over panels: `rows` vectors of `length` numbers, one after the other. A vector holds the channels of one pixel,
// or of several pixels in a row if there are few channels; per-channel values are then repeated.
//
// S is the type in memory, and Wide<S> the type of the arithmetic. The loops are templates; for float and bfloat16
// there are overloads that run in the widest instruction set of the processor.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#define BACON_FAST_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define BACON_FAST_CLONES
#endif
#define BACON_FAST_INLINE inline __attribute__((always_inline))

namespace bacon_fast::norm {

using c10::BFloat16;

template <class S>
using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S>
BACON_FAST_INLINE Wide<S> widen(S value) {
  if constexpr (std::is_same_v<S, BFloat16>) {  // the upper half of a float
    return __builtin_bit_cast(float, static_cast<uint32_t>(value.x) << 16);
  } else {
    return static_cast<Wide<S>>(value);
  }
}

// Rounded to the nearest, ties to even.
template <class S>
BACON_FAST_INLINE S narrow(Wide<S> value) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return BFloat16((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded, BFloat16::from_bits());  // NaN stays NaN
  } else {
    return static_cast<S>(value);
  }
}

// LeakyReLU(z) with z = scale * (s - mean) + bias. The mean stays apart: scale * mean would cancel in a narrow channel.
template <class T>
struct Affine {
  const T *mean, *scale, *bias;
  T slope;
};

// total = a + b.
template <class S>
BACON_FAST_INLINE void add(const S* a, const S* b, int64_t count, S* total) {
  for (int64_t k = 0; k < count; ++k) total[k] = narrow<S>(widen(a[k]) + widen(b[k]));
}

// sum += s.
template <class S>
BACON_FAST_INLINE void accumulate(const S* __restrict s, int64_t rows, int64_t length, Wide<S>* __restrict sum) {
  for (int64_t r = 0; r < rows; ++r, s += length) {
    for (int64_t k = 0; k < length; ++k) sum[k] += widen(s[k]);
  }
}

// sum += s - pivot, square += (s - pivot)^2.
template <class S>
BACON_FAST_INLINE void moments(
    const S* __restrict s, const Wide<S>* __restrict pivot, int64_t rows, int64_t length, Wide<S>* __restrict sum,
    Wide<S>* __restrict square) {
  for (int64_t r = 0; r < rows; ++r, s += length) {
    for (int64_t k = 0; k < length; ++k) {
      const Wide<S> d = widen(s[k]) - pivot[k];
      sum[k] += d;
      square[k] += d * d;
    }
  }
}

template <class S>
BACON_FAST_INLINE void activate(
    const S* __restrict s, Affine<Wide<S>> affine, int64_t rows, int64_t length, S* __restrict y) {
  for (int64_t r = 0; r < rows; ++r, s += length, y += length) {
    for (int64_t k = 0; k < length; ++k) {
      const Wide<S> z = affine.scale[k] * (widen(s[k]) - affine.mean[k]) + affine.bias[k];
      y[k] = narrow<S>(z > 0 ? z : affine.slope * z);
    }
  }
}

// With g = grad * (z > 0 ? 1 : slope): sum += g, product += g * (s - mean).
template <class S>
BACON_FAST_INLINE void products(
    const S* __restrict grad, const S* __restrict s, Affine<Wide<S>> affine, int64_t rows, int64_t length,
    Wide<S>* __restrict sum, Wide<S>* __restrict product) {
  for (int64_t r = 0; r < rows; ++r, grad += length, s += length) {
    for (int64_t k = 0; k < length; ++k) {
      const Wide<S> d = widen(s[k]) - affine.mean[k], upstream = widen(grad[k]);
      const Wide<S> g = affine.scale[k] * d + affine.bias[k] > 0 ? upstream : affine.slope * upstream;
      sum[k] += g;
      product[k] += g * d;
    }
  }
}

// out = scale * g - offset - tilt * (s - mean), plus `more` where it is given.
template <class S>
BACON_FAST_INLINE void gradient(
    const S* __restrict grad, const S* __restrict s, const S* __restrict more, Affine<Wide<S>> affine,
    const Wide<S>* __restrict offset, const Wide<S>* __restrict tilt, int64_t rows, int64_t length, S* __restrict out) {
  const auto value = [&](int64_t k) {
    const Wide<S> d = widen(s[k]) - affine.mean[k], upstream = widen(grad[k]);
    const Wide<S> g = affine.scale[k] * d + affine.bias[k] > 0 ? upstream : affine.slope * upstream;
    return affine.scale[k] * g - offset[k] - tilt[k] * d;
  };
  if (more == nullptr) {
    for (int64_t r = 0; r < rows; ++r, grad += length, s += length, out += length) {
      for (int64_t k = 0; k < length; ++k) out[k] = narrow<S>(value(k));
    }
  } else {
    for (int64_t r = 0; r < rows; ++r, grad += length, s += length, more += length, out += length) {
      for (int64_t k = 0; k < length; ++k) out[k] = narrow<S>(value(k) + widen(more[k]));
    }
  }
}

#define BACON_FAST_FOR_TYPE(S)                                                                                         \
  BACON_FAST_CLONES inline void add(const S* a, const S* b, int64_t count, S* total) { add<S>(a, b, count, total); }   \
  BACON_FAST_CLONES inline void accumulate(const S* s, int64_t rows, int64_t length, float* sum) {                     \
    accumulate<S>(s, rows, length, sum);                                                                               \
  }                                                                                                                    \
  BACON_FAST_CLONES inline void moments(                                                                               \
      const S* s, const float* pivot, int64_t rows, int64_t length, float* sum, float* square) {                       \
    moments<S>(s, pivot, rows, length, sum, square);                                                                   \
  }                                                                                                                    \
  BACON_FAST_CLONES inline void activate(const S* s, Affine<float> affine, int64_t rows, int64_t length, S* y) {       \
    activate<S>(s, affine, rows, length, y);                                                                           \
  }                                                                                                                    \
  BACON_FAST_CLONES inline void products(                                                                              \
      const S* grad, const S* s, Affine<float> affine, int64_t rows, int64_t length, float* sum, float* product) {     \
    products<S>(grad, s, affine, rows, length, sum, product);                                                          \
  }                                                                                                                    \
  BACON_FAST_CLONES inline void gradient(                                                                              \
      const S* grad, const S* s, const S* more, Affine<float> affine, const float* offset, const float* tilt,          \
      int64_t rows, int64_t length, S* out) {                                                                          \
    gradient<S>(grad, s, more, affine, offset, tilt, rows, length, out);                                               \
  }

BACON_FAST_FOR_TYPE(float)
BACON_FAST_FOR_TYPE(BFloat16)
#undef BACON_FAST_FOR_TYPE

}  // namespace bacon_fast::norm
