// The contrastive family (bacon_fast/reference/contrastive.py): the data that its operators and its kernels share.
#pragma once

#include "contrastive/layout.h"

namespace bacon_fast::contrastive {

// The forward saves these for the backward, one row of [kNumStats, rows] each.
enum Stat {
  kNegativeLog,     // n: log sum over the negatives of the row or of its group, 0 if there are none
  kNegativeWeight,  // d loss / d n; NaN where a vector is not finite
  kPositiveLog,     // log of the sum of exp(+-x) that divides the positives' exponentials
  kPositiveWeight,  // d loss / d x = weight · exp(+-x - log) - mean
  kPositiveMean,
  kNumStats
};

// In a tile of similarities the columns follow each other, and the rows, in units of kVectorUnit, lie side by side in
// vectors: a row's values are in registers, and the columns, which may be very many, are read as they are.
//
// Logits are linear in the similarity s of a row and a column: scale · s + bias.
template <class T>
struct Family {
  std::int64_t rows, columns, dim, num_codes, num_own;
  bool match_positive;  // matching columns are positives; else they are ignored
  bool direct;          // exponentials need no shift, see kDirectLimit

  Normalization<T> row_vectors;
  const Code<T>* row_code;     // [padded rows]
  const Code<T>* self_column;  // [padded rows], -1 for none
  const T* own;                // [rows, num_own, dim], not normalized
  const T* own_scale;          // [rows, num_own], NaN where the row has no such positive
  T own_sign;                  // -1 in the form "prod": logits enter the sums negated
  T eps;

  // Columns as units, or as given if nothing has to be padded or replaced: then the factors normalize them.
  const T* column_vectors;  // [padded columns, column_stride]
  std::int64_t column_stride;
  const T* column_factor;  // [columns] similarity = factor · row unit · column vector; NaN for what is not finite
  bool columns_raw;
  const std::int32_t* column_code;  // [columns, num_codes]

  // For each padded row: scales and biases that turn its similarities into logits; in the form "prod" the positives'
  // are negated. In the backward the biases contain minus the logarithm of the sum that divides the exponential.
  const T* negative_scale;
  const T* negative_bias;
  const T* positive_scale;
  const T* positive_bias;

  // Columns are taken in chunks, and their results added in order: there may be fewer units of rows than threads.
  std::int64_t chunk_columns;
  std::int64_t chunks;

  // Forward, for each chunk and padded row: sums of exp(logit - shift) over negatives and over matching columns, shifts
  // (0 if direct), sum of the matching columns' similarities, and their number.
  double* negative_sum;
  double* positive_sum;
  T* negative_shift;
  T* positive_shift;
  double* positive_similarity;
  std::int64_t* positive_count;
  T* own_logit;  // [rows, num_own], NaN if not finite

  // Backward: d loss / d similarity is negative_push · exp(logit) of a negative, positive_pull · exp(logit) -
  // positive_mean of a positive. All three are 0 for a row without gradient.
  const T* negative_push;
  const T* positive_pull;
  const T* positive_mean;
  const T* own_pull;  // the same before the scale of the similarity, for own columns
  const T* own_mean;
  T* table;       // d loss / d similarity [padded columns, padded rows], or nullptr to compute it twice
  T* grad_units;  // [chunks, padded rows, padded dim], d loss / d row units
  T* grad_rows;   // [rows, dim], or nullptr as the two below
  T* grad_columns;  // [columns, dim]
  T* grad_own;      // [rows, num_own, dim]
  Normalization<T> column_set;  // for the gradient of the columns
};

}  // namespace bacon_fast::contrastive
