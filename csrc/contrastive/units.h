// Vectors divided by their norms, in the two layouts the products want, and the gradient of that division.
#pragma once

#include "contrastive/gemm.h"

namespace bacon_fast::contrastive {
namespace {

// What a vector is multiplied with where the sum of its squares would overflow: a power of two, so exact.
template <class T>
constexpr T kShrink = std::numeric_limits<T>::max_exponent == 128 ? T(0x1p-80) : T(0x1p-640);

// A vector with the norm that it is divided by: the vector given or, where its norm overflows, a shrunk copy.
template <class T>
class Measured {
 public:
  Measured(const T* raw, std::int64_t dim) : data(raw), norm(std::sqrt(dot(raw, raw, dim))) {
    if (norm <= std::numeric_limits<T>::max()) return;
    for (std::int64_t d = 0; d < dim; ++d) {
      if (raw[d] - raw[d] != 0) return;  // a NaN or an infinity stays as it is
    }
    copy_ = static_cast<T*>(::operator new(sizeof(T) * dim));
    for (std::int64_t d = 0; d < dim; ++d) copy_[d] = raw[d] * kShrink<T>;
    data = copy_;
    shrink = kShrink<T>;
    norm = std::sqrt(dot(data, data, dim));
  }
  ~Measured() { ::operator delete(copy_); }
  Measured(const Measured&) = delete;
  Measured& operator=(const Measured&) = delete;

  // What makes the unit of `data`; times shrink, of the vector given.
  T inverse(T eps) const { return 1 / (norm < eps ? eps : norm); }

  const T* data;
  T norm, shrink = 1;

 private:
  T* copy_ = nullptr;
};

// unit = raw · scale, with zeros in place of what is not finite and from `dim` to `width`.
// Returns whether all was finite.
template <class T>
BACON_FAST_INLINE bool scale_vector(const T* raw, T scale, std::int64_t dim, std::int64_t width, T* unit) {
  using V = Vector<T>;
  using M = Mask<T>;
  M broken{};
  const V zero{};
  std::int64_t d = 0;
  for (; d + kLanes<T> <= dim; d += kLanes<T>) {
    const V value = load<V>(raw + d) * scale;
    const M finite = value - value == zero;
    broken |= ~finite;
    store(unit + d, finite ? value : zero);
  }
  bool all_finite = true;
  for (; d < width; ++d) {
    const T value = d < dim ? raw[d] * scale : T(0);
    const bool finite = value - value == 0;
    all_finite &= finite;
    unit[d] = finite ? value : T(0);
  }
  for (int lane = 0; lane < kLanes<T>; ++lane) all_finite &= broken[lane] == 0;
  return all_finite;
}

// Normalizes vectors begin..end-1 of `from` [count, dim]; those past count (padding) become zeros.
//   units [padded count, padded dim]  read by `combine_tile` and as the left side of `similarity_tile`. What is not
//                                     finite is 0 here: a weight of 0 times NaN would be NaN.
//   panels                            the right side of `similarity_tile`, [panel, dim, column], NaN kept.
// Either may be nullptr; without units no vector is marked as not finite.
template <class T>
void normalize_range(const Normalization<T>& set, std::int64_t begin, std::int64_t end) {
  const std::int64_t dim = set.dim, width = padded(dim, kFeatureUnit);
  for (std::int64_t i = begin; i < end; ++i) {
    T* unit = set.units ? set.units + i * width : nullptr;
    T* panel = set.panels ? set.panels + i / kPanel<T> * kPanel<T> * dim + i % kPanel<T> : nullptr;
    if (i >= set.count) {
      for (std::int64_t d = 0; unit && d < width; ++d) unit[d] = 0;
      for (std::int64_t d = 0; panel && d < dim; ++d) panel[d * kPanel<T>] = 0;
      set.norm[i] = set.scale[i] = 0;
      set.state[i] = kShort;
      continue;
    }
    const T* raw = set.from + i * dim;
    const Measured<T> vector(raw, dim);
    const T scale = vector.inverse(set.eps);
    unsigned char state = vector.norm > set.eps ? kLong : kShort;
    if (unit && !scale_vector(vector.data, scale, dim, width, unit)) state |= kNotFinite;
    for (std::int64_t d = 0; panel && d < dim; ++d) panel[d * kPanel<T>] = vector.data[d] * scale;
    set.norm[i] = vector.norm / vector.shrink;
    set.scale[i] = scale * vector.shrink;
    set.state[i] = state;
  }
}

// Gradient with respect to vector i from the one with respect to its unit vector.
template <class T>
void normalize_backward(const Normalization<T>& set, std::int64_t i, const T* grad_unit, T* grad) {
  using V = Vector<T>;
  const T* unit = set.units + i * padded(set.dim, kFeatureUnit);
  if (set.state[i] & kNotFinite) {
    // A vector that no gradient reaches was not used, and must not turn its own gradient into 0 · NaN.
    bool used = false;
    for (std::int64_t d = 0; d < set.dim; ++d) used |= grad_unit[d] != 0;
    for (std::int64_t d = 0; d < set.dim; ++d) grad[d] = used ? std::numeric_limits<T>::quiet_NaN() : T(0);
    return;
  }
  // A vector shorter than eps is divided by the constant eps.
  const T along = set.state[i] & kLong ? dot(grad_unit, unit, set.dim) : T(0);
  const T scale = set.scale[i];
  std::int64_t d = 0;
  for (; d + kLanes<T> <= set.dim; d += kLanes<T>) {
    store(grad + d, (load<V>(grad_unit + d) - along * load<V>(unit + d)) * scale);
  }
  for (; d < set.dim; ++d) grad[d] = (grad_unit[d] - along * unit[d]) * scale;
}

}  // namespace
}  // namespace bacon_fast::contrastive
