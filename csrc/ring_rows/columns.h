// Which columns of a ring a step reads: one definition for host and device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "philox.h"  // BACON_FAST_HOST_DEVICE

namespace bacon_fast {

struct Ring {
  const int64_t *values, *step;  // [rows, length]
  int64_t rows, length, stride, first;

  // Row `row` at the step's place number `i`. The step is read where this runs, never by a GPU's host.
  BACON_FAST_HOST_DEVICE int64_t at(int64_t row, int64_t i) const {
    return values[row * length + (*step * stride + first + i) % length];
  }
};

inline Ring ring_of(const at::Tensor& ring, const at::Tensor& step, int64_t stride, int64_t first) {
  TORCH_CHECK_VALUE(ring.dim() == 2 && ring.is_contiguous() && ring.size(1) > 0,
                    "ring: expected a contiguous [R, L] with L > 0, found ", ring.sizes());
  TORCH_CHECK_TYPE(step.scalar_type() == at::kLong && step.dim() == 0, "step: expected a 0-d int64 tensor, found ",
                   step.scalar_type(), " ", step.sizes());
  return {ring.const_data_ptr<int64_t>(), step.const_data_ptr<int64_t>(), ring.size(0), ring.size(1), stride, first};
}

}  // namespace bacon_fast
