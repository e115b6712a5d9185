// The passes over rows x columns of the contrastive family, for one instruction set.
//
// Every row's sums and every row's and column's gradient are added in an order that depends on the shapes alone, so the
// result is the same whatever ranges the passes are called with.
#pragma once

#include "contrastive/family.h"
#include "contrastive/units.h"

namespace bacon_fast::contrastive {
namespace {

// Columns done between two visits of a row, and rows between two visits of those columns: 8 KB of float similarities,
// and columns that stay in the second-level cache.
constexpr std::int64_t kFamilyTile = 256;
constexpr std::int64_t kFamilyBlock = 64;
// Columns whose gradient is summed together.
constexpr std::int64_t kGradientTile = 128;

// Calls visit(j, positive, negative) for the vectors of columns first+j, ... of one row: the masks of its
// positives and of its negatives.
template <class T, int kCodes, bool kPositive, class Visit>
BACON_FAST_INLINE void for_columns(
    const Family<T>& f, std::int64_t row, std::int64_t first, std::int64_t count, Visit&& visit) {
  using M = Mask<T>;
  const std::int64_t stride = padded(f.columns, kColumnUnit);
  const std::int64_t inside = f.columns - first < count ? f.columns - first : count;  // the rest is padding
  const Code<T> code = f.row_code[row];
  const Code<T> self = f.self_column[row];
  const M lanes = lane_numbers<T>();
  const auto masks = [&](std::int64_t j, M usable) __attribute__((always_inline)) {
    const Code<T>* codes = f.column_codes + first + j;
    M match = load<M>(codes) == code;
    if constexpr (kCodes == 0) {
      for (std::int64_t t = 1; t < f.num_codes; ++t) match |= load<M>(codes + t * stride) == code;
    }
    usable &= lanes != Code<T>(self - first - j);
    visit(j, kPositive ? usable & match : M{}, usable & ~match);
  };
  std::int64_t j = 0;
  for (; j + kLanes<T> <= inside; j += kLanes<T>) masks(j, ~M{});
  if (j < inside) masks(j, lanes < Code<T>(inside - j));
}

// Adds the exponentials of one row's similarities to its sums.
template <class T, int kCodes, bool kPositive, bool kDirect>
void family_sum_row(
    const Family<T>& f, std::int64_t row, std::int64_t first, std::int64_t count, const T* similarities) {
  using V = Vector<T>;
  using M = Mask<T>;
  const V zero{};
  const T negative_scale = f.negative_scale[row], positive_scale = f.positive_scale[row];
  T negative_bias = f.negative_bias[row], positive_bias = f.positive_bias[row];
  const auto logits = [&](std::int64_t j, M positive) __attribute__((always_inline)) {
    const V similarity = load<V>(similarities + j);
    const V logit = similarity * negative_scale + negative_bias;
    if constexpr (!kPositive) return logit;
    return positive ? similarity * positive_scale + positive_bias : logit;
  };
  if constexpr (!kDirect) {
    // The largest logits so far, and what was summed relative to smaller ones brought down to them.
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    V largest_negative = broadcast(f.negative_shift[row]), largest_positive = broadcast(f.positive_shift[row]);
    for_columns<T, kCodes, kPositive>(f, row, first, count, [&](std::int64_t j, M positive, M negative)
                                          __attribute__((always_inline)) {
      const V logit = logits(j, positive);
      largest_negative = (negative & (logit > largest_negative)) ? logit : largest_negative;
      if constexpr (kPositive) largest_positive = (positive & (logit > largest_positive)) ? logit : largest_positive;
    });
    const auto rescale = [&](T largest, T& shift, double& sum, T& bias) {
      if (largest == kNone) return;
      sum *= std::exp(double(shift - largest));
      shift = largest;
      bias -= largest;
    };
    rescale(max_lanes<T>(largest_negative), f.negative_shift[row], f.negative_sum[row], negative_bias);
    if constexpr (kPositive) {
      rescale(max_lanes<T>(largest_positive), f.positive_shift[row], f.positive_sum[row], positive_bias);
    }
  }
  V negative_sum{}, positive_sum{}, positive_similarity{};
  M positive_count{};
  for_columns<T, kCodes, kPositive>(f, row, first, count, [&](std::int64_t j, M positive, M negative)
                                        __attribute__((always_inline)) {
    const V value = kDirect ? bounded_exponential(logits(j, positive)) : exponential(logits(j, positive));
    negative_sum += negative ? value : zero;
    if constexpr (kPositive) {
      positive_sum += positive ? value : zero;
      positive_similarity += positive ? load<V>(similarities + j) : zero;
      positive_count -= positive;
    }
  });
  f.negative_sum[row] += sum_lanes<T>(negative_sum);
  if constexpr (kPositive) {
    f.positive_sum[row] += sum_lanes<T>(positive_sum);
    f.positive_similarity[row] += sum_lanes<T>(positive_similarity);
    for (int lane = 0; lane < kLanes<T>; ++lane) f.positive_count[row] += positive_count[lane];
  }
}

// Similarities of kRowUnit rows with columns first..first+count-1.
template <class T>
void family_similarities(
    const Family<T>& f, std::int64_t row, std::int64_t first, std::int64_t count, T* out, std::int64_t stride) {
  const std::int64_t width = padded(f.dim, kFeatureUnit);
  for (std::int64_t i = 0; i < kRowUnit; i += kTileRows) {
    similarity_tile<T>(
        f.dim, f.row_vectors.units + (row + i) * width, width, f.column_vectors.panels + first * f.dim,
        count / kPanel<T>, out + i * stride, stride);
  }
}

// Logits of a row's own columns; true if all that it has are finite.
template <class T>
bool family_own_logits(const Family<T>& f, std::int64_t row) {
  const T* unit = f.row_vectors.units + row * padded(f.dim, kFeatureUnit);
  bool all_finite = true;
  for (std::int64_t m = row * f.num_own; m < (row + 1) * f.num_own; ++m) {
    const T* own = f.own + m * f.dim;
    const T norm = std::sqrt(dot(own, own, f.dim));
    f.own_logit[m] = f.own_scale[m] * dot(unit, own, f.dim) / (norm < f.eps ? f.eps : norm);
    const bool finite = f.own_logit[m] - f.own_logit[m] == 0;
    all_finite &= finite || f.own_scale[m] != f.own_scale[m];
  }
  return all_finite;
}

// Sums of rows begin·kRowUnit .. end·kRowUnit-1.
template <class T>
void family_sums(const Family<T>& f, std::int64_t begin, std::int64_t end) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  const bool usual = f.num_codes == 1;
  const auto sum_row = f.match_positive
      ? f.direct ? usual ? family_sum_row<T, 1, true, true> : family_sum_row<T, 0, true, true>
                 : usual ? family_sum_row<T, 1, true, false> : family_sum_row<T, 0, true, false>
      : f.direct ? usual ? family_sum_row<T, 1, false, true> : family_sum_row<T, 0, false, true>
                 : usual ? family_sum_row<T, 1, false, false> : family_sum_row<T, 0, false, false>;
  alignas(64) T tile[kRowUnit * kFamilyTile];
  const std::int64_t columns = padded(f.columns, kColumnUnit);
  for (std::int64_t block = begin * kRowUnit; block < end * kRowUnit; block += kFamilyBlock) {
    const std::int64_t block_end = block + kFamilyBlock < end * kRowUnit ? block + kFamilyBlock : end * kRowUnit;
    for (std::int64_t r = block; r < block_end; ++r) {
      f.negative_sum[r] = f.positive_sum[r] = f.positive_similarity[r] = 0;
      f.negative_shift[r] = f.positive_shift[r] = f.direct ? T(0) : kNone;
      f.positive_count[r] = 0;
    }
    for (std::int64_t first = 0; first < columns; first += kFamilyTile) {
      const std::int64_t count = columns - first < kFamilyTile ? columns - first : kFamilyTile;
      for (std::int64_t row = block; row < block_end; row += kRowUnit) {
        family_similarities(f, row, first, count, tile, kFamilyTile);
        for (std::int64_t r = row; r < row + kRowUnit && r < f.rows; ++r) {
          sum_row(f, r, first, count, tile + (r - row) * kFamilyTile);
        }
      }
    }
    for (std::int64_t r = block; r < block_end && r < f.rows; ++r) {
      // Units hide what is not finite; here it must show.
      const bool finite = family_own_logits(f, r) && !(f.row_vectors.state[r] & kNotFinite);
      if (!finite) f.negative_sum[r] = f.positive_sum[r] = std::numeric_limits<double>::quiet_NaN();
    }
  }
}

// Turns one row's similarities into d loss / d similarity.
template <class T, int kCodes, bool kPositive, bool kDirect>
void family_weights_row(
    const Family<T>& f, std::int64_t row, std::int64_t first, std::int64_t count, T* similarities) {
  using V = Vector<T>;
  using M = Mask<T>;
  const V zero{};
  const T negative_push = f.negative_push[row], positive_pull = f.positive_pull[row], mean = f.positive_mean[row];
  const T negative_scale = f.negative_scale[row], negative_bias = f.negative_bias[row];
  const T positive_scale = f.positive_scale[row], positive_bias = f.positive_bias[row];
  if (negative_push == 0 && positive_pull == 0 && mean == 0) {
    std::memset(similarities, 0, sizeof(T) * count);
    return;
  }
  std::int64_t done = 0;
  for_columns<T, kCodes, kPositive>(f, row, first, count, [&](std::int64_t j, M positive, M negative)
                                        __attribute__((always_inline)) {
    const V similarity = load<V>(similarities + j);
    V logit = similarity * negative_scale + negative_bias;
    if constexpr (kPositive) logit = positive ? similarity * positive_scale + positive_bias : logit;
    const V value = kDirect ? bounded_exponential(logit) : exponential(logit);
    V weight = negative ? value * negative_push : zero;
    if constexpr (kPositive) weight = positive ? value * positive_pull - mean : weight;
    store(similarities + j, weight);
    done = j + kLanes<T>;
  });
  std::memset(similarities + done, 0, sizeof(T) * (count - done));
}

template <class T>
auto family_weights(const Family<T>& f) {
  const bool usual = f.num_codes == 1;
  return f.match_positive
      ? f.direct ? usual ? family_weights_row<T, 1, true, true> : family_weights_row<T, 0, true, true>
                 : usual ? family_weights_row<T, 1, true, false> : family_weights_row<T, 0, true, false>
      : f.direct ? usual ? family_weights_row<T, 1, false, true> : family_weights_row<T, 0, false, true>
                 : usual ? family_weights_row<T, 1, false, false> : family_weights_row<T, 0, false, false>;
}

// Adds what a row's own columns give to its gradient, and stores the gradient of the own columns.
template <class T>
void family_own_gradient(const Family<T>& f, std::int64_t row, T* grad_unit) {
  const T* unit = f.row_vectors.units + row * padded(f.dim, kFeatureUnit);
  for (std::int64_t m = row * f.num_own; m < (row + 1) * f.num_own; ++m) {
    const bool absent = f.own_scale[m] != f.own_scale[m];
    if (absent || (f.own_pull[row] == 0 && f.own_mean[row] == 0)) {
      if (f.grad_own) std::memset(f.grad_own + m * f.dim, 0, sizeof(T) * f.dim);
      continue;
    }
    const T* own = f.own + m * f.dim;
    const T norm = std::sqrt(dot(own, own, f.dim));
    const T scale = 1 / (norm < f.eps ? f.eps : norm);
    const T similarity = dot(unit, own, f.dim) * scale;
    const T exponential = std::exp(f.own_sign * f.own_scale[m] * similarity + f.positive_bias[row]);
    const T weight = f.own_scale[m] * (f.own_pull[row] * exponential - f.own_mean[row]);
    for (std::int64_t d = 0; d < f.dim; ++d) grad_unit[d] += weight * scale * own[d];
    if (!f.grad_own) continue;
    const T along = norm > f.eps ? similarity : T(0);
    for (std::int64_t d = 0; d < f.dim; ++d) {
      f.grad_own[m * f.dim + d] = weight * scale * (unit[d] - along * scale * own[d]);
    }
  }
}

// Gradient of rows begin·kRowUnit .. end·kRowUnit-1 as anchors, and of their own columns. Fills the table, if any.
template <class T>
void family_row_gradient(const Family<T>& f, std::int64_t begin, std::int64_t end) {
  const auto weights_row = family_weights(f);
  const std::int64_t columns = padded(f.columns, kColumnUnit), width = padded(f.dim, kFeatureUnit);
  alignas(64) T tile[kRowUnit * kFamilyTile];
  Scratch<T> grad_units(kFamilyBlock * width);
  for (std::int64_t block = begin * kRowUnit; block < end * kRowUnit; block += kFamilyBlock) {
    const std::int64_t block_end = block + kFamilyBlock < end * kRowUnit ? block + kFamilyBlock : end * kRowUnit;
    grad_units.clear();
    for (std::int64_t first = 0; first < columns && f.grad_rows; first += kFamilyTile) {
      const std::int64_t count = columns - first < kFamilyTile ? columns - first : kFamilyTile;
      for (std::int64_t row = block; row < block_end; row += kRowUnit) {
        T* weights = f.table ? f.table + row * columns + first : tile;
        const std::int64_t stride = f.table ? columns : kFamilyTile;
        family_similarities(f, row, first, count, weights, stride);
        for (std::int64_t r = 0; r < kRowUnit; ++r) weights_row(f, row + r, first, count, weights + r * stride);
        for (std::int64_t i = 0; i < kRowUnit; i += kTileRows) {
          combine_tile<T>(
              count, weights + i * stride, stride, 1, f.column_vectors.units + first * width, width,
              grad_units.data + (row - block + i) * width, width);
        }
      }
    }
    for (std::int64_t r = block; r < block_end && r < f.rows; ++r) {
      T* grad_unit = grad_units.data + (r - block) * width;
      family_own_gradient(f, r, grad_unit);
      if (f.grad_rows) normalize_backward(f.row_vectors, r, grad_unit, f.grad_rows + r * f.dim);
    }
  }
}

// Gradient of columns begin·kColumnUnit .. end·kColumnUnit-1, from the table if there is one.
template <class T>
void family_column_gradient(const Family<T>& f, std::int64_t begin, std::int64_t end) {
  const auto weights_row = family_weights(f);
  const std::int64_t rows = padded(f.rows, kRowUnit), columns = padded(f.columns, kColumnUnit);
  const std::int64_t width = padded(f.dim, kFeatureUnit);
  Scratch<T> tile(kFamilyBlock * kGradientTile);
  Scratch<T> grad_units(kGradientTile * width);
  for (std::int64_t first = begin * kColumnUnit; first < end * kColumnUnit; first += kGradientTile) {
    const std::int64_t left = end * kColumnUnit - first, count = left < kGradientTile ? left : kGradientTile;
    grad_units.clear();
    for (std::int64_t block = 0; block < rows; block += kFamilyBlock) {
      const std::int64_t depth = rows - block < kFamilyBlock ? rows - block : kFamilyBlock;
      T* weights = f.table ? f.table + block * columns + first : tile.data;
      const std::int64_t stride = f.table ? columns : kGradientTile;
      for (std::int64_t row = 0; row < depth && !f.table; row += kRowUnit) {
        family_similarities(f, block + row, first, count, weights + row * stride, stride);
        for (std::int64_t r = row; r < row + kRowUnit; ++r) {
          weights_row(f, block + r, first, count, weights + r * stride);
        }
      }
      for (std::int64_t column = 0; column < count; column += kTileRows) {
        combine_tile<T>(
            depth, weights + column, 1, stride, f.row_vectors.units + block * width, width,
            grad_units.data + column * width, width);
      }
    }
    for (std::int64_t c = first; c < first + count && c < f.columns; ++c) {
      normalize_backward(f.column_vectors, c, grad_units.data + (c - first) * width, f.grad_columns + c * f.dim);
    }
  }
}

}  // namespace
}  // namespace bacon_fast::contrastive
