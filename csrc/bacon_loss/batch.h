// BaCon's loss and gradient in one pass over the batch: data shared by its operator and its kernels.
#pragma once

#include "contrastive/layout.h"

namespace bacon_fast::contrastive {

// With s(r, j) the cosine of rows r and j, row j is a negative of row r if classes[r] is none of j's codes.
// Both are rows of the same batch at the same temperature, so one exponential serves r as anchor of j and j of r.
template <class T>
struct BaconBatch {
  std::int64_t rows;
  std::int64_t dim;
  std::int64_t num_codes;
  T scale;      // 1 / temperature of the negatives
  bool direct;  // exponentials need no shift, see kDirectLimit

  Normalization<T> features;
  const Code<T>* codes;    // [num_codes, padded rows], -1 where a row has fewer
  const Code<T>* classes;  // [padded rows]
  const bool* anchor;      // [padded rows]: the row has a term in the loss
  const T* centers;        // [num_classes, dim], not normalized

  // Similarities, as exponentials if direct, as logits if not: [padded rows, padded rows], or nullptr to compute twice.
  T* table;

  // bacon_sums writes: the sum over the row's negatives of exp(logit) is sums · exp(shifts).
  double* sums;
  T* shifts;
  // ... and for anchors: similarity to the center, and 1 / norm of the center.
  T* center_similarity;
  T* center_scale;

  // bacon_gradient reads: d loss / d similarity of a negative is push · exp(logit - push_shift), with a shift that is 0
  // if direct and else no less than the logit; d loss / d similarity of the center is pull. 0 for rows without.
  const T* push;
  const T* push_shift;
  const T* pull;
  T* grad;  // [rows, dim]
};

}  // namespace bacon_fast::contrastive
