// Normalized vectors and per-row scalars of one call of a family operator.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "contrastive/arguments.h"
#include "contrastive/buffer.h"
#include "contrastive/kernels.h"
#include "contrastive/parallel.h"

namespace bacon_fast::contrastive {

// Columns of fewer numbers than this are always copied as units, even if they could be left where they are.
constexpr int64_t kCopyLimit = 1 << 20;
// Fewer tasks of rows than this are cut into chunks of columns, none smaller than this.
constexpr int64_t kFewTasks = 16;
constexpr int64_t kChunkColumns = 2048;
// Longer columns are copied: 1 / norm has to be a normal number.
constexpr double kLongest = 0x1p125;

template <class T>
class Workspace {
 public:
  // The gradient of the columns needs them as units, hence needs_units.
  Workspace(const Arguments& a, bool needs_units)
      : arguments(a),
        rows(a.rows.size(0)),
        columns(a.columns.size(0)),
        dim(a.rows.size(1)),
        num_own(a.own.defined() ? a.own.size(1) : 0),
        padded_rows(padded(rows, kVectorUnit)),
        padded_columns(padded(columns, kVectorUnit)),
        width(padded(dim, kFeatureUnit)) {
    family = {};
    family.rows = rows;
    family.columns = columns;
    family.dim = dim;
    family.num_codes = a.column_code.size(1);
    family.num_own = num_own;
    family.match_positive = a.match_positive;
    family.own_sign = a.form == Form::kProd ? -1 : 1;
    family.eps = T(a.eps);
    if (num_own > 0) {
      family.own = a.own.const_data_ptr<T>();
      family.own_scale = a.own_scale.const_data_ptr<T>();
    }
    const int64_t units = padded_rows / kVectorUnit;
    const int64_t wanted = units > 0 && units < kFewTasks ? kFewTasks / units : 1;
    family.chunk_columns = std::max(kChunkColumns, padded((columns + wanted - 1) / wanted, kChunkColumns));
    family.chunks = std::max<int64_t>(1, (columns + family.chunk_columns - 1) / family.chunk_columns);
    take_rows();
    take_columns(needs_units);
    family.direct = logits_are_small();
  }

  // Calls pass(chunk, begin, end) for units of rows and chunks of columns; a column costs `products` multiplications.
  template <class Pass>
  void for_chunks(int64_t products, Pass&& pass) const {
    const int64_t units = padded_rows / kVectorUnit;
    const int64_t cost = kVectorUnit * std::min(columns, family.chunk_columns) * products;
    at::parallel_for(0, units * family.chunks, grain(cost), [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t chunk = begin / units, stop = std::min(end, (chunk + 1) * units);
        pass(chunk, begin - chunk * units, stop - chunk * units);
        begin = stop;
      }
    });
  }

  const Arguments& arguments;
  const int64_t rows, columns, dim, num_own, padded_rows, padded_columns, width;
  Family<T> family;
  T *negative_scale, *negative_bias, *positive_scale, *positive_bias;  // [padded_rows], those of `family`

 private:
  void take_rows() {
    const Arguments& a = arguments;
    row_reals_ = Buffer<T>(padded_rows * (width + dim + 6));
    row_codes_ = Buffer<Code<T>>(2 * padded_rows);
    row_states_ = Buffer<unsigned char>(padded_rows);
    T* next = row_reals_.data();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    T* units = take(padded_rows * width);
    T* panels = take(padded_rows * dim);
    T* norms = take(padded_rows);
    T* scales = take(padded_rows);
    family.row_vectors = {
        a.rows.const_data_ptr<T>(), rows, dim, T(a.eps), units, panels, norms, scales, row_states_.data()};
    normalize(family.row_vectors, padded_rows);
    for (T** scalar : {&negative_scale, &negative_bias, &positive_scale, &positive_bias}) *scalar = take(padded_rows);
    family.negative_scale = negative_scale;
    family.negative_bias = negative_bias;
    family.positive_scale = positive_scale;
    family.positive_bias = positive_bias;
    Code<T>* row_code = row_codes_.data();
    Code<T>* self_column = row_code + padded_rows;
    family.row_code = row_code;
    family.self_column = self_column;
    for (int64_t r = 0; r < padded_rows; ++r) {
      const bool inside = r < rows;
      row_code[r] = inside ? a.row_code.const_data_ptr<int>()[r] : -1;
      self_column[r] = inside ? a.self_column.const_data_ptr<int>()[r] : -1;
      positive_scale[r] = inside ? family.own_sign * a.positive_scale.const_data_ptr<T>()[r] : 0;
      positive_bias[r] = 0;
      negative_scale[r] = inside ? a.negative_scale.const_data_ptr<T>()[r] : 0;
      negative_bias[r] = inside ? a.negative_bias.const_data_ptr<T>()[r] : 0;
    }
  }

  void take_columns(bool needs_units) {
    const Arguments& a = arguments;
    const T* raw = a.columns.const_data_ptr<T>();
    column_reals_ = Buffer<T>(3 * padded_columns);
    column_states_ = Buffer<unsigned char>(padded_columns);
    T* norms = column_reals_.data();
    T* scales = norms + padded_columns;
    T* factors = scales + padded_columns;
    family.column_code = a.column_code.const_data_ptr<int>();
    family.column_factor = factors;
    family.column_set = {
        raw, columns, dim, T(a.eps), nullptr, nullptr, norms, scales, column_states_.data()};
    const bool fits = dim == width && columns % kRowUnit == 0 && columns * dim >= kCopyLimit && !needs_units;
    if (fits) normalize(family.column_set, padded_columns);
    family.columns_raw =
        fits && std::all_of(norms, norms + columns, [](T norm) { return norm < kLongest; });
    if (family.columns_raw) {
      family.column_vectors = raw;
      family.column_stride = dim;
      std::copy_n(scales, columns, factors);
      return;
    }
    column_units_ = Buffer<T>(padded_columns * width);
    family.column_set.units = column_units_.data();
    normalize(family.column_set, padded_columns);
    family.column_vectors = column_units_.data();
    family.column_stride = width;
    for (int64_t c = 0; c < columns; ++c) {
      factors[c] = column_states_[c] & kNotFinite ? std::numeric_limits<T>::quiet_NaN() : T(1);
    }
  }

  void normalize(const Normalization<T>& set, int64_t count) const {
    const int64_t cost = kVectorUnit * dim * kNormalizeCost;
    at::parallel_for(0, count / kVectorUnit, grain(cost), [&](int64_t begin, int64_t end) {
      kernels<T>().normalize(set, begin * kVectorUnit, end * kVectorUnit);
    });
  }

  // Whether no |logit| exceeds kDirectLimit.
  bool logits_are_small() const {
    T bound = 0;
    for (int64_t r = 0; r < rows; ++r) {
      bound = std::max(bound, std::abs(negative_scale[r]) + std::abs(negative_bias[r]));
      bound = std::max(bound, std::abs(positive_scale[r]));
    }
    for (int64_t m = 0; m < rows * num_own; ++m) bound = std::max(bound, std::abs(family.own_scale[m]));
    return bound <= kDirectLimit;
  }

  Buffer<T> row_reals_, column_reals_, column_units_;
  Buffer<Code<T>> row_codes_;
  Buffer<unsigned char> row_states_, column_states_;
};

}  // namespace bacon_fast::contrastive
