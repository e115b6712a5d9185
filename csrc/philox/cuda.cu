// Random words of counters on a GPU: a thread takes a block of four words.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "philox/words.h"
#include "register.h"

namespace bacon_fast::random {
namespace {

constexpr int kThreads = 128;

__device__ int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

__global__ void __launch_bounds__(kThreads)
    words_kernel(Draw draw, const int64_t* slots, int64_t* words, int64_t num_slots, int64_t count, int64_t blocks) {
  const int64_t i = thread_index();
  if (i < num_slots * blocks) draw.write_block(slots, words, count, i / blocks, i % blocks);
}

__global__ void __launch_bounds__(kThreads) sort_keys_kernel(Draw draw, int64_t* keys, int64_t count) {
  const int64_t i = thread_index();
  if (i < count) keys[i] = draw.sort_key(i);
}

unsigned int grid_of(int64_t threads) {
  const int64_t grid = (threads + kThreads - 1) / kThreads;
  TORCH_CHECK_VALUE(grid <= INT32_MAX, "slots: too many words for one launch");
  return static_cast<unsigned int>(grid);
}

at::Tensor words(int64_t seed, const at::Tensor& step, int64_t stream, const at::Tensor& slots, int64_t count) {
  const c10::cuda::CUDAGuard guard(slots.device());
  const at::Tensor slots_c = slots.contiguous();
  at::Tensor out = empty_words(slots, count);
  const int64_t blocks = blocks_of(count), threads = slots.size(0) * blocks;
  if (threads == 0) return out;
  words_kernel<<<grid_of(threads), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      draw_of(seed, step, stream), slots_c.const_data_ptr<int64_t>(), out.mutable_data_ptr<int64_t>(), slots.size(0),
      count, blocks);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

at::Tensor sort_keys(int64_t seed, const at::Tensor& step, int64_t stream, int64_t count) {
  const c10::cuda::CUDAGuard guard(step.device());
  at::Tensor out = empty_keys(step, count);
  if (count == 0) return out;
  sort_keys_kernel<<<grid_of(count), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      draw_of(seed, step, stream), out.mutable_data_ptr<int64_t>(), count);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

BACON_FAST_IMPL(CUDA, m) {
  m.impl("philox", words);
  m.impl("philox_sort_keys", sort_keys);
}

}  // namespace bacon_fast::random
