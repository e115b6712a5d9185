// Sizes and arrays that the operators (which allocate) and the kernels of each instruction set (which compute) share.
#pragma once

#include <cstdint>

namespace bacon_fast::contrastive {

// Padding with zeros to multiples of these spares the inner loops their edge cases.
constexpr std::int64_t kRowUnit = 8;      // vectors that lie one after the other, as left side of a product
constexpr std::int64_t kVectorUnit = 32;  // vectors that lie side by side, as right side
constexpr std::int64_t kFeatureUnit = 16;

constexpr std::int64_t padded(std::int64_t size, std::int64_t unit) { return (size + unit - 1) / unit * unit; }

// If every |logit| is below this bound, exponentials are summed as they are, without first finding the largest logit:
// none overflows, and divided by the sum of as many as fit into memory, none leaves float's normal range.
constexpr double kDirectLimit = 30;

// A table of rows x columns of up to this many elements is kept, not computed again: 8 MB of float stay in the cache.
constexpr std::int64_t kTableLimit = 1 << 21;

// Integers as wide as T: one comparison of codes masks one vector of T.
template <class T>
struct LaneInteger;
template <>
struct LaneInteger<float> {
  using Type = std::int32_t;
};
template <>
struct LaneInteger<double> {
  using Type = std::int64_t;
};
template <class T>
using Code = typename LaneInteger<T>::Type;

enum VectorState : unsigned char {
  kShort = 0,      // norm at most eps: the scale is a constant
  kLong = 1,       // divided by its norm
  kNotFinite = 2,  // has a NaN or an infinity
};

// Vectors to normalize and where the result goes; see units.h.
template <class T>
struct Normalization {
  const T* from;
  std::int64_t count;
  std::int64_t dim;
  T eps;
  T* units;
  T* panels;
  T* norm;
  T* scale;  // unit = scale · vector
  unsigned char* state;
};

}  // namespace bacon_fast::contrastive
