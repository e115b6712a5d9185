// The Team (pixel_ops.h) of a GPU: the threads of a block, at least three warps of them.
// tests/data/block_simulation.cpp runs it on a CPU, with real threads, under a race detector.
#pragma once

#include "augment/pixel_ops.h"

namespace bacon_fast::augment {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Block {
  Scratch& scratch;

  template <class F>
  __device__ void for_each(int n, const F& f) const {
    for (int i = threadIdx.x; i < n; i += blockDim.x) f(i);
    __syncthreads();
  }

  template <class F>
  __device__ void for_pixels(int height, int width, const F& f) const {
    const int pixels = height > 0 && width > 0 ? height * width : 0;  // the inside of a 1x1 image is -1 x -1
    for (int i = threadIdx.x; i < pixels; i += blockDim.x) f(i / width, i % width);
    __syncthreads();
  }

  template <class F>
  __device__ unsigned sum(int n, const F& f) const {
    if (threadIdx.x == 0) scratch.total = 0;
    __syncthreads();
    unsigned total = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) total += f(i);
    total = __reduce_add_sync(kAllLanes, total);
    if (threadIdx.x % kWarp == 0) atomicAdd(&scratch.total, total);
    __syncthreads();
    return scratch.total;
  }

  __device__ void increment(int* p) const { atomicAdd(p, 1); }

  __device__ void find_levels(Scratch& s) const {
    if (threadIdx.x < 3) {
      s.low[threadIdx.x] = kLevels;
      s.high[threadIdx.x] = -1;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 3 * kLevels; i += blockDim.x) {  // a warp sees 32 neighboring levels of a channel
      const unsigned used = __ballot_sync(kAllLanes, s.histogram[i] > 0);
      if (i % kWarp == 0 && used != 0) {
        atomicMin(&s.low[i / kLevels], i % kLevels + __ffs(used) - 1);
        atomicMax(&s.high[i / kLevels], i % kLevels + kWarp - 1 - __clz(used));
      }
    }
    __syncthreads();
  }

  __device__ void accumulate(Scratch& s) const {
    const int channel = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (channel < 3) {
      constexpr int kPerLane = kLevels / kWarp;
      int* histogram = s.histogram + channel * kLevels + lane * kPerLane;
      int own = 0;
      for (int i = 0; i < kPerLane; ++i) own += histogram[i];
      int upto = own;
      for (int step = 1; step < kWarp; step *= 2) {
        const int before = __shfl_up_sync(kAllLanes, upto, step);
        if (lane >= step) upto += before;
      }
      int below = upto - own;
      for (int i = 0; i < kPerLane; ++i) {
        const int count = histogram[i];
        histogram[i] = below;
        below += count;
      }
    }
    __syncthreads();
  }
};

}  // namespace bacon_fast::augment
