// What a step adds to the run's records, on a GPU: one launch each.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "records/values.h"
#include "register.h"

namespace bacon_fast::records {
namespace {

constexpr int kThreads = 128;

// One block, a thread a value: the addresses are the kernel's argument, so nothing is copied to the device.
__global__ void add_values_kernel(const __grid_constant__ Values values, float* sums, float* finite) {
  const int i = threadIdx.x;
  if (i < values.count) {
    sums[i] += values.at(i);
  } else if (i == values.count) {
    sums[i] += 1;
  }
  if (i == 0 && isfinite(sums[0])) *finite += 1;
}

__global__ void __launch_bounds__(kThreads) count_pairs_kernel(const Pairs pairs, int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row < rows) atomicAdd(reinterpret_cast<unsigned long long*>(pairs.counts + pairs.cell_of(row)), 1ULL);
}

void add_values(at::Tensor& sums, at::Tensor& finite, at::TensorList tensors) {
  const c10::cuda::CUDAGuard guard(sums.device());
  const Values values = values_of(tensors, sums, finite);
  add_values_kernel<<<1, kMaxValues + 1, 0, c10::cuda::getCurrentCUDAStream()>>>(
      values, sums.mutable_data_ptr<float>(), finite.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void count_pairs(at::Tensor& counts, const at::Tensor& pseudo_labels, const at::Tensor& true_labels, int64_t classes) {
  const c10::cuda::CUDAGuard guard(counts.device());
  const at::Tensor pseudo = pseudo_labels.contiguous(), truth = true_labels.contiguous();
  const Pairs pairs = pairs_of(counts, pseudo, truth, classes);
  const int64_t rows = truth.numel();
  if (rows == 0) return;
  const int64_t grid = (rows + kThreads - 1) / kThreads;
  count_pairs_kernel<<<static_cast<unsigned int>(grid), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(pairs, rows);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

BACON_FAST_IMPL(CUDA, m) {
  m.impl("add_values_", add_values);
  m.impl("count_pairs_", count_pairs);
}

}  // namespace bacon_fast::records
