// What a step adds to the run's records, on a CPU.
#include <torch/library.h>

#include "records/values.h"
#include "register.h"

namespace bacon_fast::records {
namespace {

void add_values(at::Tensor& sums, at::Tensor& finite, at::TensorList tensors) {
  const Values values = values_of(tensors, sums, finite);
  float* sum = sums.mutable_data_ptr<float>();
  for (int i = 0; i < values.count; ++i) sum[i] += values.at(i);
  sum[values.count] += 1;
  if (std::isfinite(sum[0])) *finite.mutable_data_ptr<float>() += 1;
}

void count_pairs(at::Tensor& counts, const at::Tensor& pseudo_labels, const at::Tensor& true_labels, int64_t classes) {
  const at::Tensor pseudo = pseudo_labels.contiguous(), truth = true_labels.contiguous();
  const Pairs pairs = pairs_of(counts, pseudo, truth, classes);
  for (int64_t row = 0; row < truth.numel(); ++row) ++pairs.counts[pairs.cell_of(row)];
}

}  // namespace

BACON_FAST_IMPL(CPU, m) {
  m.impl("add_values_", add_values);
  m.impl("count_pairs_", count_pairs);
}

}  // namespace bacon_fast::records
