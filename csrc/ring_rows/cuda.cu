// A step's part of a ring, on a GPU.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "register.h"
#include "ring_rows/columns.h"

namespace bacon_fast {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) ring_rows_kernel(const Ring ring, int64_t* out, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < ring.rows * count) out[i] = ring.at(i / count, i % count);
}

at::Tensor ring_rows(const at::Tensor& values, const at::Tensor& step, int64_t stride, int64_t first, int64_t count) {
  const c10::cuda::CUDAGuard guard(values.device());
  const Ring ring = ring_of(values, step, stride, first);
  at::Tensor out = at::empty({ring.rows, count}, values.options());
  const int64_t grid = (ring.rows * count + kThreads - 1) / kThreads;
  if (grid == 0) return out;
  ring_rows_kernel<<<static_cast<unsigned int>(grid), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      ring, out.mutable_data_ptr<int64_t>(), count);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

BACON_FAST_IMPL(CUDA, m) { m.impl("ring_rows", ring_rows); }

}  // namespace bacon_fast
