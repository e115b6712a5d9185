// Vectors of one instruction set (vector extensions of GCC and clang) and the exponential on them.
//
// Included by the kernels_*.cpp files only, each of which sets BACON_FAST_VECTOR_BYTES and the compiler's target first.
// Everything is in an unnamed namespace, so that no function compiled for one instruction set can replace another's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

namespace bacon_fast::contrastive {
namespace {

#define BACON_FAST_INLINE inline __attribute__((always_inline))

template <class T>
struct Simd;

template <>
struct Simd<float> {
  using Vector = float __attribute__((vector_size(BACON_FAST_VECTOR_BYTES)));
  using Mask = std::int32_t __attribute__((vector_size(BACON_FAST_VECTOR_BYTES)));
  using Bits = std::uint32_t __attribute__((vector_size(BACON_FAST_VECTOR_BYTES)));
};

template <>
struct Simd<double> {
  using Vector = double __attribute__((vector_size(BACON_FAST_VECTOR_BYTES)));
  using Mask = std::int64_t __attribute__((vector_size(BACON_FAST_VECTOR_BYTES)));
};

template <class T>
using Vector = typename Simd<T>::Vector;
template <class T>
using Mask = typename Simd<T>::Mask;  // comparisons give -1 in the lanes that hold, 0 elsewhere
template <class T>
constexpr int kLanes = BACON_FAST_VECTOR_BYTES / sizeof(T);

template <class V, class T>
BACON_FAST_INLINE V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class T>
BACON_FAST_INLINE void store(T* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

template <class T>
BACON_FAST_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};  // x - 0 is x, -0 included
}

template <class T>
BACON_FAST_INLINE Mask<T> lane_numbers() {
  Mask<T> lanes;
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i;
  return lanes;
}

template <class T>
using Lanes = std::make_integer_sequence<int, kLanes<T>>;

// Lane i of the result is lane i ^ half.
template <class T, int half, int... lanes>
BACON_FAST_INLINE Vector<T> exchange(Vector<T> v, std::integer_sequence<int, lanes...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, (lanes ^ half)...);
#else
  return __builtin_shuffle(v, Mask<T>{(lanes ^ half)...});
#endif
}

// Sum of the lanes by halves, the same order on every machine with this vector width.
template <class T, int half = kLanes<T> / 2>
BACON_FAST_INLINE T sum_lanes(Vector<T> v) {
  if constexpr (half == 0) {
    return v[0];
  } else {
    return sum_lanes<T, half / 2>(v + exchange<T, half>(v, Lanes<T>{}));
  }
}

template <class T, int half = kLanes<T> / 2>
BACON_FAST_INLINE T max_lanes(Vector<T> v) {
  if constexpr (half == 0) {
    return v[0];
  } else {
    const Vector<T> other = exchange<T, half>(v, Lanes<T>{});
    return max_lanes<T, half / 2>(v > other ? v : other);
  }
}

// exp, at most 2 ulp off; NaN stays NaN. For -87 <= x <= 88 only: `exponential` below has no lower bound.
//
// x = n·ln 2 + r with |r| <= ln 2 / 2, so exp(x) = 2^n · exp(r), and exp(r) = 1 + r + r²·q(r) with q of degree 4, fitted
// for the least largest relative error (3e-9). 1.5·2^23 + x is x rounded to an integer, which sits in the low bits.
BACON_FAST_INLINE Vector<float> bounded_exponential(Vector<float> x) {
  using V = Vector<float>;
  using Bits = Simd<float>::Bits;  // unsigned: what does not fit, of a NaN for one, falls off
  constexpr float kRound = 12582912.0f;
  const V shifted = x * 1.44269504f + kRound;
  const V n = shifted - kRound;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, the product with the first is exact
  V q = broadcast(0.001381459878757596f);
  q = q * r + 0.008368716575205326f;
  q = q * r + 0.04166838899254799f;
  q = q * r + 0.1666652113199234f;
  q = q * r + 0.4999999403953552f;
  const V power = (V)(((Bits)shifted << 23) + (127u << 23));
  return (q * (r * r) + (r + 1.0f)) * power;
}

// The same with results below float's normal range as 0.
BACON_FAST_INLINE Vector<float> exponential(Vector<float> x) {
  const Mask<float> underflow = x < -87.33654f;  // log of the smallest normal float
  const Vector<float> zero{};
  return underflow ? zero : bounded_exponential(underflow ? zero : x);
}

// float64 is the path of the tests, exact rather than fast.
BACON_FAST_INLINE Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

BACON_FAST_INLINE Vector<double> bounded_exponential(Vector<double> x) { return exponential(x); }

// Aligned memory of one task.
template <class T>
struct Scratch {
  explicit Scratch(std::int64_t count)
      : data(static_cast<T*>(::operator new(sizeof(T) * count, std::align_val_t(64)))), size(count) {}
  ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void clear() { std::memset(data, 0, sizeof(T) * size); }

  T* const data;
  const std::int64_t size;
};

template <class T>
BACON_FAST_INLINE T dot(const T* a, const T* b, std::int64_t size) {
  Vector<T> total{};
  std::int64_t i = 0;
  for (; i + kLanes<T> <= size; i += kLanes<T>) total += load<Vector<T>>(a + i) * load<Vector<T>>(b + i);
  T sum = sum_lanes<T>(total);
  for (; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace
}  // namespace bacon_fast::contrastive
