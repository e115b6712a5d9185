// The contrastive family (bacon_fast/reference/contrastive.py): the data that its operators and its kernels share.
#pragma once

#include "contrastive/layout.h"

namespace bacon_fast::contrastive {

// What the forward leaves to the backward, one row of [kNumStats, rows] each.
enum Stat {
  kNegativeLog,     // n: log sum over the negatives of the row or of its group, 0 if there are none
  kNegativeWeight,  // d loss / d n; NaN where a vector is not finite
  kPositiveLog,     // log of the sum of exp(+-x) that divides the positives' exponentials
  kPositiveWeight,  // d loss / d x = weight · exp(+-x - log) - mean
  kPositiveMean,
  kNumStats
};

// Logits are linear in the similarity s of a row and a column: scale · s + bias.
template <class T>
struct Family {
  std::int64_t rows, columns, dim, num_codes, num_own;
  bool match_positive;  // matching columns are positives; else they are ignored
  bool direct;          // exponentials need no shift, see kDirectLimit

  Normalization<T> row_vectors;     // no panels
  Normalization<T> column_vectors;  // units only in the backward
  const Code<T>* row_code;          // [padded rows]
  const Code<T>* column_codes;      // [num_codes, padded columns]
  const Code<T>* self_column;       // [padded rows], -1 for none
  const T* own;                     // [rows, num_own, dim], not normalized
  const T* own_scale;               // [rows, num_own], NaN where the row has no such positive
  T own_sign;                       // -1 in the form "prod": logits enter the sums negated
  T eps;

  // Of each padded row: what makes its similarities to logits, those of positives negated in the form "prod". In the
  // backward the biases contain minus the logarithm of the sum that the exponential is divided by.
  const T* negative_scale;
  const T* negative_bias;
  const T* positive_scale;
  const T* positive_bias;

  // Forward, of each padded row: sums of exp(logit - shift) over its negatives and its matching columns; the shifts are
  // 0 if direct.
  double* negative_sum;
  double* positive_sum;
  T* negative_shift;
  T* positive_shift;
  double* positive_similarity;  // sum of the matching columns' similarities
  std::int64_t* positive_count;
  T* own_logit;  // [rows, num_own]

  // Backward: d loss / d similarity is negative_push · exp(logit) of a negative, positive_pull · exp(logit) -
  // positive_mean of a positive. All three are 0 for a row without gradient.
  const T* negative_push;
  const T* positive_pull;
  const T* positive_mean;
  const T* own_pull;  // the same before the scale of the similarity, for own columns
  const T* own_mean;
  T* table;             // d loss / d similarity [padded rows, padded columns], or nullptr to compute it twice
  T* grad_rows;         // [rows, dim]
  T* grad_columns;      // [columns, dim]
  T* grad_own;          // [rows, num_own, dim] or nullptr
};

}  // namespace bacon_fast::contrastive
