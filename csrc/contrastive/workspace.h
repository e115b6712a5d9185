// Normalized vectors and per-row scalars of one call of a family operator.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "contrastive/arguments.h"
#include "contrastive/buffer.h"
#include "contrastive/kernels.h"

namespace bacon_fast::contrastive {

// Tasks of fewer multiplications than this are not worth waking a thread.
constexpr int64_t kGrain = 1 << 17;

inline int64_t grain(int64_t cost) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost)); }

template <class T>
class Workspace {
 public:
  // The backward needs the columns in both layouts, hence with_column_units.
  Workspace(const Arguments& a, bool with_column_units)
      : arguments(a),
        rows(a.rows.size(0)),
        columns(a.columns.size(0)),
        dim(a.rows.size(1)),
        num_own(a.own.defined() ? a.own.size(1) : 0),
        padded_rows(padded(rows, kColumnUnit)),
        padded_columns(padded(columns, kColumnUnit)) {
    const int64_t width = padded(dim, kFeatureUnit), num_codes = a.column_code.size(1);
    const int64_t column_width = with_column_units ? width : 0;
    reals_ = Buffer<T>(padded_rows * (width + 6) + padded_columns * (column_width + dim + 2));
    codes_ = Buffer<Code<T>>(2 * padded_rows + num_codes * padded_columns);
    states_ = Buffer<unsigned char>(padded_rows + padded_columns);
    T* next = reals_.data();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    T* row_units = take(padded_rows * width);
    T* column_units = with_column_units ? take(padded_columns * width) : nullptr;
    T* panels = take(padded_columns * dim);
    family = {};
    family.rows = rows;
    family.columns = columns;
    family.dim = dim;
    family.num_codes = num_codes;
    family.num_own = num_own;
    family.match_positive = a.match_positive;
    family.eps = T(a.eps);
    family.own_sign = a.form == Form::kProd ? -1 : 1;
    family.row_vectors = {a.rows.const_data_ptr<T>(), rows, dim, T(a.eps), false, row_units, nullptr,
                          take(padded_rows), take(padded_rows), states_.data()};
    family.column_vectors = {a.columns.const_data_ptr<T>(), columns, dim, T(a.eps), a.columns_normalized, column_units,
                             panels, take(padded_columns), take(padded_columns), states_.data() + padded_rows};
    if (num_own > 0) {
      family.own = a.own.const_data_ptr<T>();
      family.own_scale = a.own_scale.const_data_ptr<T>();
    }
    for (T** scalar : {&negative_scale, &negative_bias, &positive_scale, &positive_bias}) *scalar = take(padded_rows);
    family.negative_scale = negative_scale;
    family.negative_bias = negative_bias;
    family.positive_scale = positive_scale;
    family.positive_bias = positive_bias;

    Code<T>* row_code = codes_.data();
    Code<T>* self_column = row_code + padded_rows;
    Code<T>* column_codes = self_column + padded_rows;
    const int* from_row = a.row_code.const_data_ptr<int>();
    const int* from_self = a.self_column.const_data_ptr<int>();
    const int* from_column = a.column_code.const_data_ptr<int>();
    const T* from_positive = a.positive_scale.const_data_ptr<T>();
    const T* from_negative = a.negative_scale.const_data_ptr<T>();
    const T* from_bias = a.negative_bias.const_data_ptr<T>();
    for (int64_t r = 0; r < padded_rows; ++r) {
      const bool inside = r < rows;
      row_code[r] = inside ? from_row[r] : -1;
      self_column[r] = inside ? from_self[r] : -1;
      positive_scale[r] = inside ? family.own_sign * from_positive[r] : 0;
      positive_bias[r] = 0;
      negative_scale[r] = inside ? from_negative[r] : 0;
      negative_bias[r] = inside ? from_bias[r] : 0;
    }
    for (int64_t t = 0; t < num_codes; ++t) {
      Code<T>* codes = column_codes + t * padded_columns;
      for (int64_t c = 0; c < padded_columns; ++c) codes[c] = c < columns ? from_column[c * num_codes + t] : -1;
    }
    family.row_code = row_code;
    family.column_codes = column_codes;
    family.self_column = self_column;

    const auto normalize = [](const Normalization<T>& set, int64_t count, int64_t dim) {
      at::parallel_for(0, count / kColumnUnit, grain(kColumnUnit * dim), [&](int64_t begin, int64_t end) {
        kernels<T>().normalize(set, begin * kColumnUnit, end * kColumnUnit);
      });
    };
    normalize(family.row_vectors, padded_rows, dim);
    normalize(family.column_vectors, padded_columns, dim);
    family.direct = logits_are_small();
  }

  // Calls pass(begin, end) for units of rows or of columns.
  template <class Pass>
  void for_rows(int64_t products, Pass&& pass) const {
    at::parallel_for(0, padded_rows / kRowUnit, grain(kRowUnit * padded_columns * products), pass);
  }
  template <class Pass>
  void for_columns(int64_t products, Pass&& pass) const {
    at::parallel_for(0, padded_columns / kColumnUnit, grain(kColumnUnit * padded_rows * products), pass);
  }

  const Arguments& arguments;
  const int64_t rows, columns, dim, num_own, padded_rows, padded_columns;
  Family<T> family;
  T *negative_scale, *negative_bias, *positive_scale, *positive_bias;  // [padded_rows], those of `family`

 private:
  // Whether no |logit| exceeds kDirectLimit, with similarities up to the largest norm of a column.
  bool logits_are_small() const {
    T largest = 1;
    for (int64_t c = 0; c < columns && arguments.columns_normalized; ++c) {
      largest = std::max(largest, family.column_vectors.norm[c]);
    }
    T bound = 0;
    for (int64_t r = 0; r < rows; ++r) {
      bound = std::max(bound, std::abs(negative_scale[r]) * largest + std::abs(negative_bias[r]));
      bound = std::max(bound, std::abs(positive_scale[r]) * largest);
    }
    for (int64_t m = 0; m < rows * num_own; ++m) bound = std::max(bound, std::abs(family.own_scale[m]));
    return bound <= kDirectLimit;
  }

  Buffer<T> reals_;
  Buffer<Code<T>> codes_;
  Buffer<unsigned char> states_;
};

}  // namespace bacon_fast::contrastive
