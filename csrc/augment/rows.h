// All rows that one thread block of a GPU makes, with the same memory for each.
// tests/data/block_simulation.cpp runs it on a CPU, with real threads, under a race detector.
#pragma once

#include "augment/block.h"
#include "augment/view.h"

namespace bacon_fast::augment {

constexpr int kMaxRequests = 16;  // in one launch; their description travels with the kernel's arguments

struct Requests {
  int count;
  int64_t begin[kMaxRequests + 1];  // first output row of each, and the end
  const int64_t* indices[kMaxRequests];
  uint32_t stream[kMaxRequests], first_slot[kMaxRequests];
  bool strong[kMaxRequests];
};

// Views of rows first, first + stride, ...
template <class Out>
__device__ inline void make_rows(const Block& block, const Settings& settings, const Requests& requests,
                                 const uint8_t* pool, int64_t pool_size, uint32_t step, const float* table,
                                 bool channels_last, const Memory& memory, int64_t first, int64_t stride, Out* out) {
  const int64_t source_pixels = int64_t{settings.source_height} * settings.source_width;
  const int64_t pixels = int64_t{settings.height} * settings.width;
  for (int64_t row = first; row < requests.begin[requests.count]; row += stride) {
    int r = 0;
    while (row >= requests.begin[r + 1]) ++r;
    const int64_t in_request = row - requests.begin[r], index = requests.indices[r][in_request];
    CUDA_KERNEL_ASSERT(index >= 0 && index < pool_size);
    const Counter counter{settings.seed, step, requests.stream[r],
                          requests.first_slot[r] + static_cast<uint32_t>(in_request)};
    make_view(block, block.scratch, settings, counter, requests.strong[r], pool + 3 * source_pixels * index, memory,
              table, channels_last, out + 3 * pixels * row);
  }
}

// Chains of operations of images first, first + stride, ...
__device__ inline void apply_chains(const Block& block, const uint8_t* images, const int64_t* ops,
                                    const double* magnitudes, int64_t count, int64_t length, int height, int width,
                                    const Memory& memory, int64_t first, int64_t stride, uint8_t* out) {
  const int64_t pixels = int64_t{height} * width;
  for (int64_t i = first; i < count; i += stride) {
    apply_chain(block, block.scratch, ops + i * length, magnitudes + i * length, length, images + 3 * pixels * i,
                memory, height, width, out + 3 * pixels * i);
  }
}

}  // namespace bacon_fast::augment
