#include "contrastive/arguments.h"

#include <initializer_list>
#include <utility>

namespace bacon_fast::contrastive {

Arguments prepare(
    const at::Tensor& rows, const at::Tensor& columns, const std::optional<at::Tensor>& own,
    const at::Tensor& row_code, const at::Tensor& column_code, const at::Tensor& self_column,
    const at::Tensor& positive_scale, const std::optional<at::Tensor>& own_scale, const at::Tensor& negative_scale,
    const at::Tensor& negative_bias, const at::Tensor& negative_offset, const std::optional<at::Tensor>& group,
    int64_t num_groups, std::string_view form, std::string_view match, double floor, double eps) {
  const at::ScalarType type = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto reals = [&](const at::Tensor& tensor) { return tensor.to(type).contiguous(); };
  const auto codes = [&](const at::Tensor& tensor) { return tensor.to(at::kInt).contiguous(); };
  const int64_t num_rows = rows.size(0), num_columns = columns.size(0), num_own = own ? own->size(1) : 0;
  TORCH_CHECK_VALUE(form == "mean" || form == "sum" || form == "prod",
                    "form: expected \"mean\", \"sum\" or \"prod\", found \"", form, "\"");
  TORCH_CHECK_VALUE(match == "positive" || match == "ignore",
                    "match: expected \"positive\" or \"ignore\", found \"", match, "\"");
  TORCH_CHECK_VALUE(rows.dim() == 2 && columns.dim() == 2 && rows.size(1) == columns.size(1),
                    "columns: expected shape [C, ", rows.size(-1), "], found ", columns.sizes());
  TORCH_CHECK_VALUE(!own || (own->dim() == 3 && own->size(0) == num_rows && own->size(2) == rows.size(1)),
                    "own: expected shape [", num_rows, ", M, ", rows.size(1), "]");
  TORCH_CHECK_VALUE(!own || (own_scale && own_scale->numel() == num_rows * num_own),
                    "own_scale: expected shape [", num_rows, ", ", num_own, "]");
  TORCH_CHECK_VALUE(column_code.dim() == 2 && column_code.size(0) == num_columns && column_code.size(1) > 0,
                    "column_code: expected shape [", num_columns, ", T], found ", column_code.sizes());
  for (const auto& [name, tensor] : std::initializer_list<std::pair<const char*, const at::Tensor*>>{
           {"row_code", &row_code}, {"self_column", &self_column}, {"positive_scale", &positive_scale},
           {"negative_scale", &negative_scale}, {"negative_bias", &negative_bias},
           {"negative_offset", &negative_offset}}) {
    TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->size(0) == num_rows, name, ": expected shape [", num_rows,
                      "], found ", tensor->sizes());
  }
  Arguments a;
  a.rows = reals(rows);
  a.columns = reals(columns);
  if (num_own > 0) {
    a.own = reals(*own);
    a.own_scale = reals(*own_scale);
  }
  a.row_code = codes(row_code);
  a.column_code = codes(column_code);
  a.self_column = codes(self_column);
  a.positive_scale = reals(positive_scale);
  a.negative_scale = reals(negative_scale);
  a.negative_bias = reals(negative_bias);
  a.negative_offset = reals(negative_offset);
  if (group) {
    a.group = codes(*group);
    const int* of_row = a.group.const_data_ptr<int>();
    TORCH_CHECK_VALUE(a.group.numel() == num_rows, "group: expected shape [", num_rows, "], found ", group->sizes());
    for (int64_t r = 0; r < num_rows; ++r) {
      TORCH_CHECK_VALUE(of_row[r] >= 0 && of_row[r] < num_groups, "group: expected values in 0..", num_groups - 1,
                        ", found ", of_row[r], " in row ", r);
    }
  }
  a.num_groups = group ? num_groups : num_rows;
  a.form = form == "mean" ? Form::kMean : form == "sum" ? Form::kSum : Form::kProd;
  a.match_positive = match == "positive";
  a.floor = floor;
  a.eps = eps;
  a.type = type;
  return a;
}

}  // namespace bacon_fast::contrastive
