// The arguments of the family's operators, checked and made uniform.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace bacon_fast::contrastive {

enum class Form { kMean, kSum, kProd };

// Contiguous tensors, reals in the accumulator's type, codes as int32; own and group undefined if absent.
struct Arguments {
  at::Tensor rows, columns, own, row_code, column_code, self_column, positive_scale, own_scale, negative_scale,
      negative_bias, negative_offset, group;
  int64_t num_groups;
  Form form;
  bool match_positive;
  double floor, eps;
  at::ScalarType type;
};

// Raises ValueError if shapes, codes of groups or words do not fit.
Arguments prepare(
    const at::Tensor& rows, const at::Tensor& columns, const std::optional<at::Tensor>& own,
    const at::Tensor& row_code, const at::Tensor& column_code, const at::Tensor& self_column,
    const at::Tensor& positive_scale, const std::optional<at::Tensor>& own_scale, const at::Tensor& negative_scale,
    const at::Tensor& negative_bias, const at::Tensor& negative_offset, const std::optional<at::Tensor>& group,
    int64_t num_groups, std::string_view form, std::string_view match, double floor, double eps);

}  // namespace bacon_fast::contrastive
