// The contrastive family on a CPU: forward and backward operators. The passes over rows x columns are in
// family_kernels.h; this file has the work that is done once a row.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "contrastive/workspace.h"
#include "register.h"

namespace bacon_fast {
namespace {

using namespace contrastive;

constexpr double kNegativeInfinity = -std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kRowGrain = 256;  // rows that are worth a thread where work is done once a row

// log(exp(a) + exp(b)); NaN if one of them is, unlike with std::max.
double log_add(double a, double b) {
  if (a == b) return a + std::log(2.0);
  return (a > b ? a : b) + std::log1p(std::exp(-std::abs(a - b)));
}

// From the rows' sums to their losses and to the statistics for the backward.
template <class T>
class Forward {
 public:
  Forward(const Arguments& a, T* row_loss, T* stats)
      : work_(a, false),
        row_loss_(row_loss),
        stats_(stats),
        sums_(3 * work_.family.chunks * work_.padded_rows),
        shifts_(2 * work_.family.chunks * work_.padded_rows),
        counts_(work_.family.chunks * work_.padded_rows),
        own_logits_(work_.rows * work_.num_own),
        totals_(work_.rows) {
    Family<T>& f = work_.family;
    const int64_t size = f.chunks * work_.padded_rows;
    f.negative_sum = sums_.data();
    f.positive_sum = f.negative_sum + size;
    f.positive_similarity = f.positive_sum + size;
    f.positive_count = counts_.data();
    f.negative_shift = shifts_.data();
    f.positive_shift = f.negative_shift + size;
    f.own_logit = own_logits_.data();
  }

  void run() {
    const Family<T>& f = work_.family;
    work_.for_chunks(work_.dim + kExponentialCost, [&](int64_t chunk, int64_t begin, int64_t end) {
      kernels<T>().family_sums(f, chunk, begin, end);
    });
    at::parallel_for(0, work_.rows, kRowGrain, [&](int64_t begin, int64_t end) {
      kernels<T>().family_own_logits(f, begin, end);
      for (int64_t r = begin; r < end; ++r) totals_[r] = total(r);
    });
    reduce_groups();
    at::parallel_for(0, work_.rows, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) finish(r);
    });
  }

 private:
  // Of one row over all columns; the logarithms are of sums of exponentials.
  struct Total {
    double log_negative, log_positive, positive_logit;
    int64_t num_positives;
    bool broken;
  };

  double log_sum(int64_t r, const double* sums, const T* shifts) const {
    double largest = kNegativeInfinity, sum = 0;
    for (int64_t c = 0; c < work_.family.chunks; ++c) {
      largest = std::max(largest, double(shifts[c * work_.padded_rows + r]));
    }
    // All shifts are infinite if there was nothing to sum, or nothing but NaN.
    if (largest == kNegativeInfinity) largest = 0;
    for (int64_t c = 0; c < work_.family.chunks; ++c) {
      const int64_t at = c * work_.padded_rows + r;
      if (sums[at] != 0) sum += std::isinf(shifts[at]) ? sums[at] : sums[at] * std::exp(shifts[at] - largest);
    }
    return std::log(sum) + largest;
  }

  Total total(int64_t r) const {
    const Family<T>& f = work_.family;
    Total t = {log_sum(r, f.negative_sum, f.negative_shift), log_sum(r, f.positive_sum, f.positive_shift), 0, 0, false};
    for (int64_t c = 0; c < f.chunks; ++c) {
      const int64_t at = c * work_.padded_rows + r;
      t.num_positives += f.positive_count[at];
      t.positive_logit += double(f.own_sign) * double(work_.positive_scale[r]) * f.positive_similarity[at];
    }
    for (int64_t m = r * work_.num_own; m < (r + 1) * work_.num_own; ++m) {
      if (std::isnan(f.own_scale[m])) continue;  // the row has no such positive
      ++t.num_positives;
      t.positive_logit += f.own_logit[m];
      t.log_positive = log_add(t.log_positive, f.own_sign * f.own_logit[m]);
    }
    t.broken = (f.row_vectors.state[r] & kNotFinite) || std::isnan(t.log_negative) || std::isnan(t.log_positive);
    return t;
  }

  // log sum over the negatives of each group: of rows that are finite, in the order of the rows.
  void reduce_groups() {
    const Arguments& a = work_.arguments;
    group_log_.assign(a.num_groups, kNegativeInfinity);
    group_broken_.assign(a.num_groups, 0);
    const int* group = a.group.defined() ? a.group.const_data_ptr<int>() : nullptr;
    std::vector<double> largest(a.num_groups, kNegativeInfinity), sum(a.num_groups, 0.0);
    for (int64_t r = 0; r < work_.rows; ++r) {
      const int64_t g = group ? group[r] : r;
      group_broken_[g] |= totals_[r].broken;
      if (!totals_[r].broken) largest[g] = std::max(largest[g], totals_[r].log_negative);
    }
    for (int64_t r = 0; r < work_.rows; ++r) {
      const int64_t g = group ? group[r] : r;
      if (totals_[r].broken || totals_[r].log_negative == kNegativeInfinity) continue;
      sum[g] += std::exp(totals_[r].log_negative - largest[g]);
    }
    for (int64_t g = 0; g < a.num_groups; ++g) {
      if (sum[g] > 0) group_log_[g] = std::log(sum[g]) + largest[g];
    }
  }

  void finish(int64_t r) {
    const Arguments& a = work_.arguments;
    const Family<T>& f = work_.family;
    const int64_t g = a.group.defined() ? a.group.const_data_ptr<int>()[r] : r;
    const double sign = f.own_sign;

    const int64_t count = totals_[r].num_positives;
    const double positive = totals_[r].log_positive;
    const double log_sum = group_log_[g];
    double negative = log_sum == kNegativeInfinity ? log_sum : log_sum + a.negative_offset.const_data_ptr<T>()[r];
    const double of_group = negative;
    if (a.floor > 0) negative = log_add(negative, std::log(a.floor));
    // d negative / d log_sum
    const double share = of_group == kNegativeInfinity ? 0 : std::exp(of_group - negative);

    double loss = 0, negative_weight = 0, positive_weight = 0, mean = 0;
    if (count > 0 ? group_broken_[g] : f.row_vectors.state[r] & kNotFinite) {
      loss = negative_weight = kNaN;
    } else if (count > 0 && a.form == Form::kMean) {
      const double all = log_add(positive, negative);
      loss = all - totals_[r].positive_logit / double(count);
      negative_weight = std::exp(negative - all) * share;
      positive_weight = std::exp(positive - all);
      mean = 1 / double(count);
    } else if (count > 0) {
      // prod: positive is log sum of exp(-x), and d/dx of the loss is -rho exp(-x - positive) too.
      const double margin = negative - sign * positive;
      const double small = std::exp(-std::abs(margin));
      const double rho = (margin > 0 ? 1 : small) / (1 + small);
      loss = std::max(margin, 0.0) + std::log1p(small);
      negative_weight = rho * share;
      positive_weight = -rho;
    }
    row_loss_[r] = T(loss);
    stat(kNegativeLog, r) = T(log_sum == kNegativeInfinity ? 0 : log_sum);
    stat(kNegativeWeight, r) = T(negative_weight);
    stat(kPositiveLog, r) = T(count > 0 ? positive : 0);
    stat(kPositiveWeight, r) = T(positive_weight);
    stat(kPositiveMean, r) = T(mean);
  }

  T& stat(Stat which, int64_t r) { return stats_[which * work_.rows + r]; }

  Workspace<T> work_;
  T* row_loss_;
  T* stats_;
  Buffer<double> sums_;
  Buffer<T> shifts_;
  Buffer<int64_t> counts_;
  Buffer<T> own_logits_;
  Buffer<Total> totals_;
  std::vector<double> group_log_;
  std::vector<char> group_broken_;
};

// From the rows' upstream gradients to the gradients of rows, columns and own columns; a null pointer skips one.
template <class T>
class Backward {
 public:
  Backward(const Arguments& a, const T* grad_row_loss, const T* stats, T* grad_rows, T* grad_columns, T* grad_own)
      : work_(a, grad_columns != nullptr),
        grad_row_loss_(grad_row_loss),
        stats_(stats),
        scalars_(5 * work_.padded_rows) {
    Family<T>& f = work_.family;
    f.grad_rows = grad_rows;
    f.grad_columns = grad_columns;
    f.grad_own = grad_own;
    weigh();
  }

  void run() {
    Family<T>& f = work_.family;
    const int64_t products = 2 * work_.dim + kExponentialCost;
    Buffer<T> table;
    if (f.grad_rows && f.grad_columns && work_.padded_rows * work_.padded_columns <= kTableLimit) {
      table = Buffer<T>(work_.padded_rows * work_.padded_columns);
      f.table = table.data();
    }
    Buffer<T> grad_units;
    if (f.grad_rows) {
      grad_units = Buffer<T>(f.chunks * work_.padded_rows * work_.width);
      f.grad_units = grad_units.data();
      work_.for_chunks(products, [&](int64_t chunk, int64_t begin, int64_t end) {
        kernels<T>().family_row_gradient(f, chunk, begin, end);
      });
    }
    if (f.grad_rows || f.grad_own) {
      at::parallel_for(0, work_.rows, kRowGrain, [&](int64_t begin, int64_t end) {
        kernels<T>().family_finish_rows(f, begin, end);
      });
      mark_broken_rows();
    }
    if (f.grad_columns) {
      const int64_t cost = kVectorUnit * work_.padded_rows * products;
      at::parallel_for(0, work_.padded_columns / kVectorUnit, grain(cost), [&](int64_t begin, int64_t end) {
        kernels<T>().family_column_gradient(f, begin, end);
      });
    }
  }

 private:
  T stat(Stat which, int64_t r) const { return stats_[which * work_.rows + r]; }

  // A row that is not finite, or shares its negatives' sum with one, has gradient NaN and gives none to others.
  bool broken(int64_t r) const { return grad_row_loss_[r] != 0 && std::isnan(stat(kNegativeWeight, r)); }

  // The factors of each row's exponentials in the kernels.
  void weigh() {
    const Arguments& a = work_.arguments;
    const int* group = a.group.defined() ? a.group.const_data_ptr<int>() : nullptr;
    std::vector<double> push(a.num_groups, 0.0);
    for (int64_t r = 0; r < work_.rows; ++r) {
      // Not 0 · NaN for a row without upstream gradient.
      if (grad_row_loss_[r] == 0 || broken(r)) continue;
      push[group ? group[r] : r] += double(grad_row_loss_[r]) * double(stat(kNegativeWeight, r));
    }
    T* next = scalars_.data();
    T* columns[5];
    for (T*& column : columns) column = std::exchange(next, next + work_.padded_rows);
    auto [negative_push, positive_pull, positive_mean, own_pull, own_mean] = columns;
    std::fill_n(scalars_.data(), scalars_.size(), T(0));
    for (int64_t r = 0; r < work_.rows; ++r) {
      negative_push[r] = T(push[group ? group[r] : r] * double(work_.negative_scale[r]));
      work_.negative_bias[r] -= stat(kNegativeLog, r);
      if (grad_row_loss_[r] == 0 || broken(r)) continue;
      const T scale = work_.family.own_sign * work_.positive_scale[r];
      own_pull[r] = grad_row_loss_[r] * stat(kPositiveWeight, r);
      own_mean[r] = grad_row_loss_[r] * stat(kPositiveMean, r);
      positive_pull[r] = scale * own_pull[r];
      positive_mean[r] = scale * own_mean[r];
      work_.positive_bias[r] = -stat(kPositiveLog, r);
    }
    Family<T>& f = work_.family;
    f.negative_push = negative_push;
    f.positive_pull = positive_pull;
    f.positive_mean = positive_mean;
    f.own_pull = own_pull;
    f.own_mean = own_mean;
  }

  void mark_broken_rows() {
    const Family<T>& f = work_.family;
    const auto mark = [](T* from, int64_t count) { std::fill_n(from, count, std::numeric_limits<T>::quiet_NaN()); };
    for (int64_t r = 0; r < work_.rows; ++r) {
      if (!broken(r)) continue;
      if (f.grad_rows) mark(f.grad_rows + r * work_.dim, work_.dim);
      if (f.grad_own) mark(f.grad_own + r * work_.num_own * work_.dim, work_.num_own * work_.dim);
    }
  }

  Workspace<T> work_;
  const T* grad_row_loss_;
  const T* stats_;
  Buffer<T> scalars_;
};

std::tuple<at::Tensor, at::Tensor> contrastive_forward(
    const at::Tensor& rows, const at::Tensor& columns, const std::optional<at::Tensor>& own,
    const at::Tensor& row_code, const at::Tensor& column_code, const at::Tensor& self_column,
    const at::Tensor& positive_scale, const std::optional<at::Tensor>& own_scale, const at::Tensor& negative_scale,
    const at::Tensor& negative_bias, const at::Tensor& negative_offset, const std::optional<at::Tensor>& group,
    int64_t num_groups, std::string_view form, std::string_view match, double floor, double eps) {
  const Arguments arguments = prepare(
      rows, columns, own, row_code, column_code, self_column, positive_scale, own_scale, negative_scale, negative_bias,
      negative_offset, group, num_groups, form, match, floor, eps);
  const auto options = rows.options().dtype(arguments.type);
  at::Tensor row_loss = at::empty({rows.size(0)}, options);
  at::Tensor stats = at::empty({kNumStats, rows.size(0)}, options);
  AT_DISPATCH_FLOATING_TYPES(arguments.type, "contrastive_cpp", [&] {
    Forward<scalar_t>(arguments, row_loss.mutable_data_ptr<scalar_t>(), stats.mutable_data_ptr<scalar_t>()).run();
  });
  return {row_loss, stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> contrastive_backward(
    const at::Tensor& grad_row_loss, const at::Tensor& stats, const at::Tensor& rows, const at::Tensor& columns,
    const std::optional<at::Tensor>& own, const at::Tensor& row_code, const at::Tensor& column_code,
    const at::Tensor& self_column, const at::Tensor& positive_scale, const std::optional<at::Tensor>& own_scale,
    const at::Tensor& negative_scale, const at::Tensor& negative_bias, const at::Tensor& negative_offset,
    const std::optional<at::Tensor>& group, int64_t num_groups, std::string_view form, std::string_view match,
    double floor, double eps, bool needs_rows, bool needs_columns, bool needs_own) {
  const Arguments arguments = prepare(
      rows, columns, own, row_code, column_code, self_column, positive_scale, own_scale, negative_scale, negative_bias,
      negative_offset, group, num_groups, form, match, floor, eps);
  const at::Tensor upstream = grad_row_loss.to(arguments.type).contiguous(), saved = stats.contiguous();
  const auto gradient = [&](const at::Tensor& of, bool needed) {
    const auto options = rows.options().dtype(arguments.type);
    return needed && of.defined() ? at::empty(of.sizes(), options) : at::empty({0}, options);
  };
  const at::Tensor grad_rows = gradient(rows, needs_rows), grad_columns = gradient(columns, needs_columns);
  const at::Tensor grad_own = gradient(own.value_or(at::Tensor()), needs_own);
  AT_DISPATCH_FLOATING_TYPES(arguments.type, "contrastive_backward_cpp", [&] {
    const auto pointer = [](const at::Tensor& tensor, bool needed) {
      return needed ? tensor.mutable_data_ptr<scalar_t>() : nullptr;
    };
    Backward<scalar_t>(
        arguments, upstream.const_data_ptr<scalar_t>(), saved.const_data_ptr<scalar_t>(),
        pointer(grad_rows, needs_rows), pointer(grad_columns, needs_columns), pointer(grad_own, needs_own && own))
        .run();
  });
  return {
      grad_rows.to(rows.scalar_type()), grad_columns.to(columns.scalar_type()),
      grad_own.to(own ? own->scalar_type() : rows.scalar_type())};
}

BACON_FAST_IMPL(CPU, m) {
  m.impl("contrastive_cpp", &contrastive_forward);
  m.impl("contrastive_backward_cpp", &contrastive_backward);
}

}  // namespace
}  // namespace bacon_fast
