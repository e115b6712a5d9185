// Memory bank and class centers on a CPU: each call touches only the rows of the batch and the K centers.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>

#include "memory_bank/apart.h"
#include "memory_bank/fixed_point.h"
#include "register.h"

namespace bacon_fast {
namespace {

void check_slots(const int64_t* slots, int64_t rows, int64_t num_slots) {
  for (int64_t r = 0; r < rows; ++r) {
    TORCH_CHECK_VALUE(slots[r] >= 0 && slots[r] < num_slots, "slots: expected values in 0..", num_slots - 1,
                      ", found ", slots[r], " in row ", r);
  }
}

// The class of a slot is an index into the sums, and comes from a buffer that a damaged checkpoint may have filled.
void check_classes(const int64_t* of_slot, const int64_t* slots, int64_t rows, int64_t num_classes) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t c = of_slot[slots[r]];
    TORCH_CHECK_VALUE(c >= -1 && c < num_classes, "selected_label: expected classes in -1..", num_classes - 1,
                      ", found ", c, " in slot ", slots[r]);
  }
}

void check_contiguous(std::initializer_list<std::pair<const char*, const at::Tensor*>> buffers) {
  for (const auto& [name, buffer] : buffers) {
    TORCH_CHECK_VALUE(buffer->is_contiguous(), name, ": expected a contiguous buffer");
  }
}

void bank_select(at::Tensor& selected_label, at::Tensor& class_counts, at::Tensor& class_sums, at::Tensor& class_sizes,
                 const at::Tensor& bank, const at::Tensor& written, const at::Tensor& slots, const at::Tensor& labels,
                 const at::Tensor& gate) {
  check_contiguous({{"selected_label", &selected_label}, {"class_counts", &class_counts}, {"class_sums", &class_sums},
                    {"class_sizes", &class_sizes}, {"bank", &bank}, {"written", &written}});
  const Tensors changed = {&selected_label, &class_counts, &class_sums, &class_sizes};
  const at::Tensor slots_c = apart(slots, changed), labels_c = apart(labels, changed), gate_c = gate.contiguous();
  const int64_t rows = slots.size(0), dim = bank.size(1), num_classes = class_counts.size(0);
  const int64_t* slot = slots_c.const_data_ptr<int64_t>();
  const int64_t* label = labels_c.const_data_ptr<int64_t>();
  const bool* is_gated = gate_c.const_data_ptr<bool>();
  check_slots(slot, rows, bank.size(0));
  check_classes(selected_label.const_data_ptr<int64_t>(), slot, rows, num_classes);
  for (int64_t r = 0; r < rows; ++r) {
    TORCH_CHECK_VALUE(!is_gated[r] || (label[r] >= 0 && label[r] < num_classes), "labels: expected classes in 0..",
                      num_classes - 1, ", found ", label[r], " in row ", r);
  }

  int64_t* of_slot = selected_label.mutable_data_ptr<int64_t>();
  int64_t* counts = class_counts.mutable_data_ptr<int64_t>();
  int64_t* sums = class_sums.mutable_data_ptr<int64_t>();
  int64_t* sizes = class_sizes.mutable_data_ptr<int64_t>();
  const float* features = bank.const_data_ptr<float>();
  const bool* is_written = written.const_data_ptr<bool>();
  for (int64_t r = 0; r < rows; ++r) {  // in order, so the last row of a slot wins
    if (!is_gated[r]) continue;
    const int64_t s = slot[r], from = of_slot[s], to = label[r];
    if (from == to) continue;
    of_slot[s] = to;
    if (from >= 0) --counts[from];
    ++counts[to];
    if (!is_written[s]) continue;
    if (from >= 0) --sizes[from];
    ++sizes[to];
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t value = to_fixed_point(features[s * dim + d]);
      if (from >= 0) sums[from * dim + d] -= value;
      sums[to * dim + d] += value;
    }
  }
}

bool all_finite(const float* row, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) {
    if (!std::isfinite(row[d])) return false;
  }
  return true;
}

void bank_write(at::Tensor& bank, at::Tensor& written, at::Tensor& class_sums, at::Tensor& class_sizes,
                at::Tensor& centers, at::Tensor& has_center, const at::Tensor& selected_label, const at::Tensor& slots,
                const at::Tensor& features, const at::Tensor& gate) {
  check_contiguous({{"bank", &bank}, {"written", &written}, {"class_sums", &class_sums}, {"class_sizes", &class_sizes},
                    {"centers", &centers}, {"has_center", &has_center}, {"selected_label", &selected_label}});
  const Tensors changed = {&bank, &written, &class_sums, &class_sizes, &centers, &has_center};
  const at::Tensor slots_c = apart(slots, changed), features_c = apart(features, changed);
  const at::Tensor gate_c = apart(gate, changed);
  const int64_t rows = slots.size(0), dim = bank.size(1), num_classes = class_sizes.size(0);
  const int64_t* slot = slots_c.const_data_ptr<int64_t>();
  const int64_t* of_slot = selected_label.const_data_ptr<int64_t>();
  check_slots(slot, rows, bank.size(0));
  check_classes(of_slot, slot, rows, num_classes);

  float* stored = bank.mutable_data_ptr<float>();
  bool* is_written = written.mutable_data_ptr<bool>();
  int64_t* sums = class_sums.mutable_data_ptr<int64_t>();
  int64_t* sizes = class_sizes.mutable_data_ptr<int64_t>();
  const float* incoming = features_c.const_data_ptr<float>();
  const bool* is_gated = gate_c.const_data_ptr<bool>();
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = incoming + r * dim;
    if (!is_gated[r] || !all_finite(row, dim)) continue;
    const int64_t s = slot[r], c = of_slot[s];
    float* old = stored + s * dim;
    if (c >= 0 && !is_written[s]) ++sizes[c];
    for (int64_t d = 0; d < dim; ++d) {
      const float value = clamp_feature(row[d]);
      if (c >= 0) sums[c * dim + d] += to_fixed_point(value) - (is_written[s] ? to_fixed_point(old[d]) : 0);
      old[d] = value;
    }
    is_written[s] = true;
  }

  float* mean = centers.mutable_data_ptr<float>();
  bool* has = has_center.mutable_data_ptr<bool>();
  for (int64_t c = 0; c < num_classes; ++c) {
    has[c] = sizes[c] > 0;
    for (int64_t d = 0; d < dim; ++d) mean[c * dim + d] = has[c] ? to_center(sums[c * dim + d], sizes[c]) : 0.0f;
  }
}

}  // namespace

BACON_FAST_IMPL(CPU, m) {
  m.impl("bank_select_", bank_select);
  m.impl("bank_write_", bank_write);
}

}  // namespace bacon_fast
