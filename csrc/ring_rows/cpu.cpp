// A step's part of a ring, on a CPU.
#include <torch/library.h>

#include "register.h"
#include "ring_rows/columns.h"

namespace bacon_fast {
namespace {

at::Tensor ring_rows(const at::Tensor& values, const at::Tensor& step, int64_t stride, int64_t first, int64_t count) {
  const Ring ring = ring_of(values, step, stride, first);
  at::Tensor out = at::empty({ring.rows, count}, values.options());
  int64_t* to = out.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row < ring.rows; ++row) {
    for (int64_t i = 0; i < count; ++i) *to++ = ring.at(row, i);
  }
  return out;
}

}  // namespace

BACON_FAST_IMPL(CPU, m) { m.impl("ring_rows", ring_rows); }

}  // namespace bacon_fast
