// The passes over rows x columns of the contrastive family, for one instruction set.
//
// Every sum is taken in an order that depends on the shapes alone, so the result is the same however the work is cut.
#pragma once

#include "contrastive/family.h"
#include "contrastive/units.h"

namespace bacon_fast::contrastive {
namespace {

// Columns done between two visits of a row: 16 KB of float similarities for a unit of rows.
constexpr std::int64_t kFamilyTile = 128;
// Units of rows done between two visits of those columns, which stay in the second-level cache.
constexpr std::int64_t kFamilyBlock = 4;

// Similarities before the columns' factors: out[c, r] of columns first+c and the rows of one unit.
template <class T>
void family_similarities(
    const Family<T>& f, std::int64_t row, std::int64_t first, std::int64_t count, T* out, std::int64_t stride) {
  for (std::int64_t r = 0; r < kVectorUnit; r += kPanel<T>) {
    const T* panel = f.row_vectors.panels + (row + r) * f.dim;
    for (std::int64_t c = 0; c < count; c += kTileRows) {
      multiply_tile<T, 2>(
          f.dim, f.column_vectors + (first + c) * f.column_stride, f.column_stride, 1, panel, kPanel<T>,
          out + c * stride + r, stride, false);
    }
  }
}

// The values of one vector of rows that comparing it with columns needs.
template <class T, int kCodes, bool kPositive>
struct RowLanes {
  using V = Vector<T>;
  using M = Mask<T>;

  RowLanes(const Family<T>& f, std::int64_t row)
      : family(f),
        negative_scale(load<V>(f.negative_scale + row)),
        negative_bias(load<V>(f.negative_bias + row)),
        positive_scale(load<V>(f.positive_scale + row)),
        positive_bias(load<V>(f.positive_bias + row)),
        code(load<M>(f.row_code + row)),
        self(load<M>(f.self_column + row)) {}

  // Which rows have the column as a positive, and which as a negative.
  BACON_FAST_INLINE void kinds(std::int64_t column, M& positive, M& negative) const {
    const std::int32_t* codes = family.column_code + column * family.num_codes;
    M match = code == Code<T>(codes[0]);
    if constexpr (kCodes == 0) {
      for (std::int64_t t = 1; t < family.num_codes; ++t) match |= code == Code<T>(codes[t]);
    }
    const M other = self != Code<T>(column);
    positive = kPositive ? other & match : M{};
    negative = other & ~match;
  }

  BACON_FAST_INLINE V logit(V similarity, M positive) const {
    const V logit = similarity * negative_scale + negative_bias;
    if constexpr (!kPositive) return logit;
    return positive ? similarity * positive_scale + positive_bias : logit;
  }

  const Family<T>& family;
  V negative_scale, negative_bias, positive_scale, positive_bias;
  M code, self;
};

// Raises the shifts of a vector of rows to the largest logits of the tile, and brings the sums down to them.
template <class T>
void raise_shifts(Vector<T> largest, T* shift, double* sum, Vector<T>& bias) {
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    if (largest[lane] > shift[lane]) {
      sum[lane] *= std::exp(double(shift[lane] - largest[lane]));
      shift[lane] = largest[lane];
    }
    if (shift[lane] != -std::numeric_limits<T>::infinity()) bias[lane] -= shift[lane];
  }
}

// Adds the exponentials of `count` columns to the sums of a vector of rows, which are at place `at`.
template <class T, int kCodes, bool kPositive, bool kDirect>
void family_sum_lanes(
    const Family<T>& f, std::int64_t row, std::int64_t at, std::int64_t first, std::int64_t count,
    const T* similarities) {
  using V = Vector<T>;
  using M = Mask<T>;
  RowLanes<T, kCodes, kPositive> lanes(f, row);
  const V zero{};
  M positive, negative;
  if constexpr (!kDirect) {
    V largest_negative = load<V>(f.negative_shift + at), largest_positive = load<V>(f.positive_shift + at);
    for (std::int64_t c = 0; c < count; ++c) {
      lanes.kinds(first + c, positive, negative);
      const V logit = lanes.logit(load<V>(similarities + c * kVectorUnit) * f.column_factor[first + c], positive);
      largest_negative = (negative & (logit > largest_negative)) ? logit : largest_negative;
      if constexpr (kPositive) largest_positive = (positive & (logit > largest_positive)) ? logit : largest_positive;
    }
    raise_shifts<T>(largest_negative, f.negative_shift + at, f.negative_sum + at, lanes.negative_bias);
    raise_shifts<T>(largest_positive, f.positive_shift + at, f.positive_sum + at, lanes.positive_bias);
  }
  V negative_sum{}, positive_sum{}, positive_similarity{};
  M positive_count{};
  for (std::int64_t c = 0; c < count; ++c) {
    lanes.kinds(first + c, positive, negative);
    const V similarity = load<V>(similarities + c * kVectorUnit) * f.column_factor[first + c];
    const V logit = lanes.logit(similarity, positive);
    const V value = kDirect ? bounded_exponential(logit) : exponential(logit);
    negative_sum += negative ? value : zero;
    if constexpr (kPositive) {
      positive_sum += positive ? value : zero;
      positive_similarity += positive ? similarity : zero;
      positive_count -= positive;
    }
  }
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    f.negative_sum[at + lane] += negative_sum[lane];
    if constexpr (kPositive) {
      f.positive_sum[at + lane] += positive_sum[lane];
      f.positive_similarity[at + lane] += positive_similarity[lane];
      f.positive_count[at + lane] += positive_count[lane];
    }
  }
}

// The variant of a function template for the kind of problem: number of codes, positives among the columns, shifts.
#define BACON_FAST_FAMILY_VARIANT(function, f)                                                                  \
  ((f).match_positive                                                                                           \
       ? (f).direct ? (f).num_codes == 1 ? function<T, 1, true, true> : function<T, 0, true, true>              \
                    : (f).num_codes == 1 ? function<T, 1, true, false> : function<T, 0, true, false>            \
       : (f).direct ? (f).num_codes == 1 ? function<T, 1, false, true> : function<T, 0, false, true>            \
                    : (f).num_codes == 1 ? function<T, 1, false, false> : function<T, 0, false, false>)

// Calls visit(first column, columns, row of the unit) for tiles of a chunk and units begin..end-1 of rows.
template <class T, class Visit>
void for_tiles(const Family<T>& f, std::int64_t chunk, std::int64_t begin, std::int64_t end, Visit&& visit) {
  const std::int64_t chunk_begin = chunk * f.chunk_columns;
  const std::int64_t left = f.columns - chunk_begin;
  const std::int64_t chunk_end = chunk_begin + (left < f.chunk_columns ? left : f.chunk_columns);
  for (std::int64_t block = begin; block < end; block += kFamilyBlock) {
    const std::int64_t block_end = block + kFamilyBlock < end ? block + kFamilyBlock : end;
    for (std::int64_t first = chunk_begin; first < chunk_end; first += kFamilyTile) {
      const std::int64_t count = chunk_end - first < kFamilyTile ? chunk_end - first : kFamilyTile;
      for (std::int64_t unit = block; unit < block_end; ++unit) visit(first, count, unit * kVectorUnit);
    }
  }
}

// Sums over the columns of a chunk, of units begin..end-1 of rows.
template <class T>
void family_sums(const Family<T>& f, std::int64_t chunk, std::int64_t begin, std::int64_t end) {
  const auto sum_lanes = BACON_FAST_FAMILY_VARIANT(family_sum_lanes, f);
  const std::int64_t start = chunk * padded(f.rows, kVectorUnit);
  for (std::int64_t at = start + begin * kVectorUnit; at < start + end * kVectorUnit; ++at) {
    f.negative_sum[at] = f.positive_sum[at] = f.positive_similarity[at] = 0;
    f.negative_shift[at] = f.positive_shift[at] = f.direct ? T(0) : -std::numeric_limits<T>::infinity();
    f.positive_count[at] = 0;
  }
  alignas(64) T tile[kFamilyTile * kVectorUnit];
  for_tiles(f, chunk, begin, end, [&](std::int64_t first, std::int64_t count, std::int64_t row) {
    family_similarities(f, row, first, padded(count, kRowUnit), tile, kVectorUnit);
    for (std::int64_t r = 0; r < kVectorUnit; r += kLanes<T>) {
      sum_lanes(f, row + r, start + row + r, first, count, tile + r);
    }
  });
}

// Logits of the own columns of rows begin..end-1.
template <class T>
void family_own_logits(const Family<T>& f, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const T* unit = f.row_vectors.units + r * padded(f.dim, kFeatureUnit);
    for (std::int64_t m = r * f.num_own; m < (r + 1) * f.num_own; ++m) {
      const Measured<T> own(f.own + m * f.dim, f.dim);
      f.own_logit[m] = f.own_scale[m] * dot(unit, own.data, f.dim) / (own.norm < f.eps ? f.eps : own.norm);
      // Units hide values that are not finite; here they must show.
      const bool finite = f.own_logit[m] - f.own_logit[m] == 0 && !(f.row_vectors.state[r] & kNotFinite);
      if (!finite) f.own_logit[m] = std::numeric_limits<T>::quiet_NaN();
    }
  }
}

// Turns the similarities of a vector of rows into d loss / d similarity; times the columns' factors if `factors`.
template <class T, int kCodes, bool kPositive, bool kDirect>
void family_weigh_lanes(
    const Family<T>& f, std::int64_t row, std::int64_t first, std::int64_t count, bool factors, T* similarities,
    std::int64_t stride) {
  using V = Vector<T>;
  using M = Mask<T>;
  const RowLanes<T, kCodes, kPositive> lanes(f, row);
  const V zero{}, push = load<V>(f.negative_push + row), pull = load<V>(f.positive_pull + row);
  const V mean = load<V>(f.positive_mean + row);
  // Not 0 · NaN in rows without gradient.
  const M alive = (push != zero) | (pull != zero) | (mean != zero);
  M positive, negative;
  for (std::int64_t c = 0; c < count; ++c) {
    lanes.kinds(first + c, positive, negative);
    const V similarity = load<V>(similarities + c * stride) * f.column_factor[first + c];
    const V logit = lanes.logit(similarity, positive);
    const V value = kDirect ? bounded_exponential(logit) : exponential(logit);
    V weight = (alive & negative) ? value * push : zero;
    if constexpr (kPositive) weight = (alive & positive) ? value * pull - mean : weight;
    if (factors) weight *= f.column_factor[first + c];
    store(similarities + c * stride, weight);
  }
}

// d loss / d similarity of a tile, 0 beyond the last column.
template <class T, class Weigh>
void family_weights(
    const Family<T>& f, Weigh weigh_lanes, std::int64_t row, std::int64_t first, std::int64_t count, bool factors,
    T* tile, std::int64_t stride) {
  family_similarities(f, row, first, padded(count, kRowUnit), tile, stride);
  for (std::int64_t r = 0; r < kVectorUnit; r += kLanes<T>) {
    weigh_lanes(f, row + r, first, count, factors, tile + r, stride);
  }
  for (std::int64_t c = count; c < padded(count, kRowUnit); ++c) {
    std::memset(tile + c * stride, 0, sizeof(T) * kVectorUnit);
  }
}

// Gradient of the row units from the columns of a chunk, of units begin..end-1 of rows; fills the table, if any.
template <class T>
void family_row_gradient(const Family<T>& f, std::int64_t chunk, std::int64_t begin, std::int64_t end) {
  const auto weigh_lanes = BACON_FAST_FAMILY_VARIANT(family_weigh_lanes, f);
  const std::int64_t rows = padded(f.rows, kVectorUnit), width = padded(f.dim, kFeatureUnit);
  T* grad_units = f.grad_units + chunk * rows * width;
  std::memset(grad_units + begin * kVectorUnit * width, 0, sizeof(T) * (end - begin) * kVectorUnit * width);
  alignas(64) T tile[kFamilyTile * kVectorUnit];
  for_tiles(f, chunk, begin, end, [&](std::int64_t first, std::int64_t count, std::int64_t row) {
    T* weights = f.table ? f.table + first * rows + row : tile;
    const std::int64_t stride = f.table ? rows : kVectorUnit;
    family_weights(f, weigh_lanes, row, first, count, f.columns_raw, weights, stride);
    for (std::int64_t r = 0; r < kVectorUnit; r += kTileRows) {
      combine_tile<T>(
          count, weights + r, 1, stride, f.column_vectors + first * f.column_stride, f.column_stride, width,
          grad_units + (row + r) * width, width);
    }
  });
}

// Adds the part of a row's own columns to its gradient, and stores the gradient of the own columns.
template <class T>
void family_own_gradient(const Family<T>& f, std::int64_t row, T* grad_unit) {
  const T* unit = f.row_vectors.units + row * padded(f.dim, kFeatureUnit);
  for (std::int64_t m = row * f.num_own; m < (row + 1) * f.num_own; ++m) {
    const bool absent = f.own_scale[m] != f.own_scale[m];
    if (absent || (f.own_pull[row] == 0 && f.own_mean[row] == 0)) {
      if (f.grad_own) std::memset(f.grad_own + m * f.dim, 0, sizeof(T) * f.dim);
      continue;
    }
    const Measured<T> own(f.own + m * f.dim, f.dim);
    const T scale = own.inverse(f.eps);
    const T similarity = dot(unit, own.data, f.dim) * scale;
    const T exponential = std::exp(f.own_sign * f.own_scale[m] * similarity + f.positive_bias[row]);
    const T weight = f.own_scale[m] * (f.own_pull[row] * exponential - f.own_mean[row]);
    for (std::int64_t d = 0; d < f.dim; ++d) grad_unit[d] += weight * scale * own.data[d];
    if (!f.grad_own) continue;
    const T along = own.norm > f.eps ? similarity : T(0);
    for (std::int64_t d = 0; d < f.dim; ++d) {
      f.grad_own[m * f.dim + d] = weight * scale * (unit[d] - along * scale * own.data[d]) * own.shrink;
    }
  }
}

// Gradient of rows begin..end-1 from the gradients of their units in every chunk, and of their own columns.
template <class T>
void family_finish_rows(const Family<T>& f, std::int64_t begin, std::int64_t end) {
  const std::int64_t rows = padded(f.rows, kVectorUnit), width = padded(f.dim, kFeatureUnit);
  Scratch<T> grad_unit(width);
  for (std::int64_t r = begin; r < end; ++r) {
    grad_unit.clear();
    for (std::int64_t chunk = 0; f.grad_rows && chunk < f.chunks; ++chunk) {
      const T* part = f.grad_units + (chunk * rows + r) * width;
      for (std::int64_t d = 0; d < width; ++d) grad_unit.data[d] += part[d];
    }
    family_own_gradient(f, r, grad_unit.data);
    if (f.grad_rows) normalize_backward(f.row_vectors, r, grad_unit.data, f.grad_rows + r * f.dim);
  }
}

// Gradient of columns begin·kVectorUnit .. end·kVectorUnit-1, from the table if there is one.
template <class T>
void family_column_gradient(const Family<T>& f, std::int64_t begin, std::int64_t end) {
  const auto weigh_lanes = BACON_FAST_FAMILY_VARIANT(family_weigh_lanes, f);
  const std::int64_t rows = padded(f.rows, kVectorUnit), width = padded(f.dim, kFeatureUnit);
  const std::int64_t stop = end * kVectorUnit < f.columns ? end * kVectorUnit : f.columns;
  alignas(64) T tile[kFamilyTile * kVectorUnit];
  Scratch<T> grad_units(kFamilyTile * width);
  for (std::int64_t first = begin * kVectorUnit; first < stop; first += kFamilyTile) {
    const std::int64_t count = stop - first < kFamilyTile ? stop - first : kFamilyTile;
    grad_units.clear();
    const auto combine = [&](const T* weights, std::int64_t stride, std::int64_t row, std::int64_t depth) {
      for (std::int64_t c = 0; c < count; c += kTileRows) {
        combine_tile<T>(
            depth, weights + c * stride, stride, 1, f.row_vectors.units + row * width, width, width,
            grad_units.data + c * width, width);
      }
    };
    if (f.table) {
      combine(f.table + first * rows, rows, 0, rows);
    } else {
      for (std::int64_t row = 0; row < rows; row += kVectorUnit) {
        family_weights(f, weigh_lanes, row, first, count, false, tile, kVectorUnit);
        combine(tile, kVectorUnit, row, kVectorUnit);
      }
    }
    for (std::int64_t c = 0; c < count; ++c) {
      normalize_backward(f.column_set, first + c, grad_units.data + c * width, f.grad_columns + (first + c) * f.dim);
    }
  }
}

#undef BACON_FAST_FAMILY_VARIANT

}  // namespace
}  // namespace bacon_fast::contrastive
