// Vectors divided by their norms, in the two layouts the products want, and the gradient of that division.
#pragma once

#include "contrastive/gemm.h"

namespace bacon_fast::contrastive {
namespace {

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
    const T norm = std::sqrt(dot(raw, raw, dim));
    const T scale = 1 / (norm < set.eps ? set.eps : norm);
    unsigned char state = norm > set.eps ? kLong : kShort;
    if (unit && !scale_vector(raw, scale, dim, width, unit)) state |= kNotFinite;
    for (std::int64_t d = 0; panel && d < dim; ++d) panel[d * kPanel<T>] = raw[d] * scale;
    set.norm[i] = norm;
    set.scale[i] = scale;
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
