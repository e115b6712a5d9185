// What the CPU and the CUDA ops share: the values of a step by their addresses, and the cell of a pair of classes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>

#include "philox.h"  // BACON_FAST_HOST_DEVICE

namespace bacon_fast::records {

constexpr int kMaxValues = 64;  // of a launch: their addresses travel with the kernel's arguments

struct Values {
  const void* data[kMaxValues];
  at::ScalarType type[kMaxValues];
  int count;

  BACON_FAST_HOST_DEVICE float at(int i) const {
    switch (type[i]) {
      case at::kFloat: return *static_cast<const float*>(data[i]);
      case at::kDouble: return static_cast<float>(*static_cast<const double*>(data[i]));
      case at::kLong: return static_cast<float>(*static_cast<const int64_t*>(data[i]));
      case at::kBool: return static_cast<float>(*static_cast<const bool*>(data[i]));
      case at::kHalf: return static_cast<float>(*static_cast<const at::Half*>(data[i]));
      default: return static_cast<float>(*static_cast<const at::BFloat16*>(data[i]));
    }
  }
};

inline Values values_of(at::TensorList tensors, const at::Tensor& sums, const at::Tensor& finite) {
  Values values;
  TORCH_CHECK_VALUE(tensors.size() <= kMaxValues, "values: expected at most ", kMaxValues, ", found ", tensors.size());
  values.count = static_cast<int>(tensors.size());
  TORCH_CHECK_VALUE(sums.scalar_type() == at::kFloat && sums.is_contiguous() && sums.numel() == values.count + 1,
                    "sums: expected contiguous float32 [", values.count + 1, "], found ", sums.scalar_type(), " ",
                    sums.sizes());
  TORCH_CHECK_VALUE(finite.scalar_type() == at::kFloat && finite.numel() == 1, "finite: expected one float32, found ",
                    finite.scalar_type(), " ", finite.sizes());
  for (int i = 0; i < values.count; ++i) {
    const at::Tensor& value = tensors[i];
    const at::ScalarType type = value.scalar_type();
    TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kLong || type == at::kBool ||
                         type == at::kHalf || type == at::kBFloat16,
                     "values[", i, "]: expected a float, int64 or bool, found ", type);
    TORCH_CHECK_VALUE(value.numel() == 1 && value.device() == sums.device(), "values[", i, "]: expected one number on ",
                      sums.device(), ", found ", value.sizes(), " on ", value.device());
    values.data[i] = value.const_data_ptr();
    values.type[i] = type;
  }
  return values;
}

struct Pairs {
  int64_t* counts;
  const int64_t *pseudo_labels, *true_labels;
  int64_t cells, classes;

  // The cell of a row: the last one where the true label is unknown, or a label is no class.
  BACON_FAST_HOST_DEVICE int64_t cell_of(int64_t row) const {
    const int64_t truth = true_labels[row], pseudo = pseudo_labels[row];
    if (truth < 0 || truth >= classes || pseudo >= classes) return cells - 1;
    return truth * (classes + 1) + (pseudo < 0 ? classes : pseudo);
  }
};

inline Pairs pairs_of(const at::Tensor& pairs, const at::Tensor& pseudo_labels, const at::Tensor& true_labels,
                      int64_t classes) {
  TORCH_CHECK_VALUE(pairs.is_contiguous() && pairs.numel() == classes * (classes + 1) + 1, "pairs: expected ",
                    classes * (classes + 1) + 1, " contiguous cells, found ", pairs.sizes());
  TORCH_CHECK_VALUE(pseudo_labels.sizes() == true_labels.sizes(), "true_labels: expected ", pseudo_labels.sizes(),
                    ", found ", true_labels.sizes());
  return {pairs.mutable_data_ptr<int64_t>(), pseudo_labels.const_data_ptr<int64_t>(),
          true_labels.const_data_ptr<int64_t>(), pairs.numel(), classes};
}

}  // namespace bacon_fast::records
