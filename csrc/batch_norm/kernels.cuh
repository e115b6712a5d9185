// BatchNorm's kernels: block.h's blocks as those of a GPU.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include "batch_norm/block.h"

namespace bacon_fast::norm {

// One block has a multiprocessor's shared memory; with so many threads, each may have 128 registers.
constexpr int kThreads = 512;

struct DeviceBlock {
  static constexpr int kThreads = norm::kThreads;

  __device__ int thread() const { return threadIdx.x; }
  __device__ int split() const { return blockIdx.x; }
  __device__ int channel_block() const { return blockIdx.y; }
  __device__ void* memory() const {
    extern __shared__ __align__(kVectorBytes) char shared[];
    return shared;
  }
  __device__ void copy(void* to, const void* from) const { __pipeline_memcpy_async(to, from, kVectorBytes); }
  __device__ void commit() const { __pipeline_commit(); }
  __device__ void wait(int groups) const { __pipeline_wait_prior(groups); }
  __device__ void sync() const { __syncthreads(); }
  __device__ void grid_sync() const { cooperative_groups::this_grid().sync(); }
};

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Forward<S> arguments, int phases) {
  forward_block(DeviceBlock{}, plan, arguments, phases);
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Backward<S> arguments, int phases) {
  backward_block(DeviceBlock{}, plan, arguments, phases);
}

}  // namespace bacon_fast::norm
