// From lists of tensors to the plans that the CPU and the CUDA op run. The checks serve both.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <optional>
#include <vector>

#include "sgd_ema/update.h"

namespace bacon_fast::optim {

// Whether equal offsets into two storages mean equal elements. Strides of dimensions of size 1 mean nothing.
inline bool same_order(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

struct Arguments {
  at::TensorList parameters, gradients, momenta, averages;
  c10::ArrayRef<double> weight_decays;
  at::TensorList copies, copied;
};

inline void check_arguments(const Arguments& all, const at::Tensor& rate, const std::optional<at::Tensor>& scale,
                            const std::optional<at::Tensor>& found_inf) {
  const size_t count = all.parameters.size();
  TORCH_CHECK_VALUE(all.gradients.size() == count && all.momenta.size() == count && all.averages.size() == count &&
                        all.weight_decays.size() == count,
                    "gradients, momenta, averages, weight_decays: expected one of each per parameter, ", count);
  TORCH_CHECK_VALUE(all.copies.size() == all.copied.size(), "copied: expected ", all.copies.size(),
                    " tensors, one per copy, found ", all.copied.size());
  const auto check_number = [&](const char* name, const at::Tensor& tensor) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, ": expected float32, found ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.numel() == 1, name, ": expected one number, found ", tensor.sizes());
    TORCH_CHECK_VALUE(tensor.device() == rate.device(), name, ": expected ", rate.device(), ", found ",
                      tensor.device());
  };
  check_number("rate", rate);
  if (scale) check_number("grad_scale", *scale);
  if (found_inf) check_number("found_inf", *found_inf);
  const auto check_pair = [&](const char* name, size_t i, const at::Tensor& tensor, const at::Tensor& like) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), name, "[", i, "]: expected ", like.scalar_type(),
                     ", found ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.sizes() == like.sizes() && tensor.device() == rate.device(), name, "[", i,
                      "]: expected ", like.sizes(), " on ", rate.device(), ", found ", tensor.sizes(), " on ",
                      tensor.device());
  };
  const auto check_order = [](const char* name, size_t i, const at::Tensor& tensor, const at::Tensor& like) {
    TORCH_CHECK_VALUE(same_order(tensor, like), name, "[", i, "]: expected strides ", like.strides(), ", found ",
                      tensor.strides());
  };
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& parameter = all.parameters[i];
    check_pair("parameters", i, parameter, parameter);
    TORCH_CHECK_VALUE(parameter.is_non_overlapping_and_dense(), "parameters[", i, "]: expected a dense tensor");
    if (parameter.numel() == 0) continue;
    if (all.averages[i].numel() > 0) {
      check_pair("averages", i, all.averages[i], parameter);
      check_order("averages", i, all.averages[i], parameter);
    }
    if (all.gradients[i].numel() == 0) continue;
    check_pair("gradients", i, all.gradients[i], parameter);
    check_pair("momenta", i, all.momenta[i], parameter);
    check_order("momenta", i, all.momenta[i], parameter);
  }
  for (size_t i = 0; i < all.copies.size(); ++i) {
    check_pair("copied", i, all.copied[i], all.copies[i]);
    TORCH_CHECK_VALUE(all.copies[i].is_non_overlapping_and_dense(), "copies[", i, "]: expected a dense tensor");
    check_order("copied", i, all.copied[i], all.copies[i]);
  }
}

// Entries of the parameters of one dtype. A gradient in another memory order is copied; `kept` owns the copy.
inline std::vector<Entry> entries_of(const Arguments& all, at::ScalarType dtype, std::vector<at::Tensor>& kept) {
  std::vector<Entry> entries;
  for (size_t i = 0; i < all.parameters.size(); ++i) {
    const at::Tensor &parameter = all.parameters[i], &average = all.averages[i];
    if (parameter.scalar_type() != dtype || parameter.numel() == 0) continue;
    Entry entry{parameter.data_ptr(), nullptr, nullptr, nullptr, parameter.numel(), all.weight_decays[i], false};
    if (average.numel() > 0) entry.average = average.data_ptr();
    if (at::Tensor gradient = all.gradients[i]; gradient.numel() > 0) {
      if (!same_order(gradient, parameter)) {
        gradient = at::empty_like(parameter).copy_(gradient);
        kept.push_back(gradient);
      }
      entry.gradient = gradient.const_data_ptr();
      entry.momentum = all.momenta[i].data_ptr();
    }
    if (entry.gradient != nullptr || entry.average != nullptr) entries.push_back(entry);
  }
  return entries;
}

inline void add_copies(const Arguments& all, std::vector<Entry>& entries) {
  for (size_t i = 0; i < all.copies.size(); ++i) {
    const at::Tensor& to = all.copies[i];
    const int64_t bytes = to.numel() * static_cast<int64_t>(to.element_size());
    if (bytes > 0) entries.push_back({all.copied[i].data_ptr(), nullptr, nullptr, to.data_ptr(), bytes, 0.0, true});
  }
}

// Calls run(plan) for up to kMaxEntries entries at a time.
template <class Run>
void for_each_plan(const std::vector<Entry>& entries, const Run& run) {
  for (size_t first = 0; first < entries.size(); first += kMaxEntries) {
    Plan plan;
    int64_t chunks = 0;
    for (size_t i = first; i < entries.size() && plan.count < kMaxEntries; ++i) {
      plan.first_chunk[plan.count] = static_cast<int32_t>(chunks);
      plan.entries[plan.count++] = entries[i];
      chunks += (entries[i].numel + kChunk - 1) / kChunk;
      TORCH_CHECK_VALUE(chunks <= INT32_MAX, "parameters: too many elements for one launch");
    }
    plan.first_chunk[plan.count] = static_cast<int32_t>(chunks);
    run(plan);
  }
}

// Calls run(Scalar{}, plan) for all work of a step, the dtypes of the parameters one after the other.
template <class Run>
void for_each_dtype(const Arguments& all, const Run& run) {
  bool copies_wait = true;
  const auto treat = [&](auto scalar, at::ScalarType dtype) {
    std::vector<at::Tensor> kept;
    std::vector<Entry> entries = entries_of(all, dtype, kept);
    if (copies_wait && !entries.empty()) {
      add_copies(all, entries);
      copies_wait = false;
    }
    for_each_plan(entries, [&](const Plan& plan) { run(scalar, plan); });
  };
  for (const at::Tensor& parameter : all.parameters) {
    const at::ScalarType dtype = parameter.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
                     "parameters: expected float32, float64, float16 or bfloat16, found ", dtype);
  }
  treat(float{}, at::kFloat);
  treat(double{}, at::kDouble);
  treat(at::Half{}, at::kHalf);
  treat(at::BFloat16{}, at::kBFloat16);
  if (copies_wait) {
    std::vector<Entry> entries;
    add_copies(all, entries);
    for_each_plan(entries, [&](const Plan& plan) { run(float{}, plan); });
  }
}

inline Settings settings_of(const at::Tensor& rate, const std::optional<at::Tensor>& scale,
                            const std::optional<at::Tensor>& found_inf, double momentum, double average_weight) {
  const auto pointer = [](const std::optional<at::Tensor>& tensor) {
    return tensor ? tensor->const_data_ptr<float>() : nullptr;
  };
  return {rate.const_data_ptr<float>(), pointer(scale), pointer(found_inf), momentum, average_weight};
}

}  // namespace bacon_fast::optim
