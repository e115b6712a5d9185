// Augmentation on a GPU: one launch for all views of a step, one thread block a view, the image in shared memory.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include "augment/arguments.h"
#include "augment/block.h"
#include "register.h"

namespace bacon_fast::augment {
namespace {

constexpr int kMaxRequests = 16;  // in one launch; their description travels with the kernel's arguments

// Enough threads that each has a few pixels, and three warps at least: one per channel's histogram.
int threads_for(int64_t pixels) { return pixels <= 512 ? 128 : pixels <= 4096 ? 256 : 512; }

struct Requests {
  int count;
  int64_t begin[kMaxRequests + 1];  // first output row of each, and the end
  const int64_t* indices[kMaxRequests];
  uint32_t stream[kMaxRequests], first_slot[kMaxRequests];
  bool strong[kMaxRequests];
};

template <class Out>
__global__ void views_kernel(Settings settings, Requests requests, const uint8_t* pool, int64_t pool_size,
                             const int64_t* step, const float* table, bool channels_last, Out* out) {
  extern __shared__ Pixel images[];
  __shared__ Scratch scratch;
  const int64_t row = blockIdx.x, pixels = int64_t{settings.height} * settings.width;
  int r = 0;
  while (row >= requests.begin[r + 1]) ++r;
  const int64_t in_request = row - requests.begin[r], index = requests.indices[r][in_request];
  CUDA_KERNEL_ASSERT(index >= 0 && index < pool_size);
  const Counter counter{settings.seed, static_cast<uint32_t>(*step), requests.stream[r],
                        requests.first_slot[r] + static_cast<uint32_t>(in_request)};
  make_view(Block{scratch}, scratch, settings, counter, requests.strong[r], pool + 3 * pixels * index, images,
            images + pixels, table, channels_last, out + 3 * pixels * row);
}

__global__ void ops_kernel(const uint8_t* images, const int64_t* ops, const double* magnitudes, int64_t chain,
                           int height, int width, uint8_t* out) {
  extern __shared__ Pixel buffers[];
  __shared__ Scratch scratch;
  const int64_t i = blockIdx.x, pixels = int64_t{height} * width;
  apply_chain(Block{scratch}, scratch, ops + i * chain, magnitudes + i * chain, chain, images + 3 * pixels * i, buffers,
              buffers + pixels, height, width, out + 3 * pixels * i);
}

// Allows shared memory for two images, beyond the 48 KB that every kernel may use without asking.
template <class Kernel>
size_t reserve_images(Kernel kernel, int64_t pixels) {
  const size_t bytes = 2 * pixels * sizeof(Pixel);
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  return bytes;
}

template <class Out>
void launch_views(const at::Tensor& pool, at::TensorList indices, c10::IntArrayRef streams, c10::IntArrayRef strong,
                  c10::IntArrayRef first_slots, const at::Tensor& step, const at::Tensor& table,
                  const Settings& settings, bool channels_last, Out* out) {
  const int64_t pixels = int64_t{settings.height} * settings.width;
  const size_t shared = reserve_images(views_kernel<Out>, pixels);
  for (size_t first = 0; first < indices.size(); first += kMaxRequests) {
    Requests requests{};
    for (size_t r = first; r < indices.size() && requests.count < kMaxRequests; ++r) {
      const int k = requests.count++;
      requests.begin[k + 1] = requests.begin[k] + indices[r].numel();
      requests.indices[k] = indices[r].const_data_ptr<int64_t>();
      requests.stream[k] = static_cast<uint32_t>(streams[r]);
      requests.first_slot[k] = static_cast<uint32_t>(first_slots[r]);
      requests.strong[k] = strong[r] != 0;
    }
    const int64_t rows = requests.begin[requests.count];
    if (rows == 0) continue;
    views_kernel<<<rows, threads_for(pixels), shared, c10::cuda::getCurrentCUDAStream()>>>(
        settings, requests, pool.const_data_ptr<uint8_t>(), pool.size(0), step.const_data_ptr<int64_t>(),
        table.const_data_ptr<float>(), channels_last, out);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    out += 3 * pixels * rows;
  }
}

at::Tensor augment_views(const at::Tensor& pool, at::TensorList indices, c10::IntArrayRef streams,
                         c10::IntArrayRef strong, c10::IntArrayRef first_slots, int64_t seed, const at::Tensor& step,
                         const at::Tensor& table, const at::Tensor& ranges, int64_t padding, bool hflip,
                         int64_t num_ops, bool cutout, at::ScalarType dtype, bool channels_last) {
  const int64_t rows =
      check_views(pool, indices, streams, strong, first_slots, step, table, ranges, padding, num_ops);
  const c10::cuda::CUDAGuard guard(pool.device());
  const Settings settings = make_settings(pool, ranges, seed, padding, hflip, num_ops, cutout);
  at::Tensor out = empty_views(pool, rows, dtype, channels_last);
  const auto launch = [&](auto* data) {
    launch_views(pool, indices, streams, strong, first_slots, step, table, settings, channels_last, data);
  };
  switch (dtype) {
    case at::kFloat:
      launch(out.mutable_data_ptr<float>());
      break;
    case at::kBFloat16:
      launch(out.mutable_data_ptr<c10::BFloat16>());
      break;
    case at::kHalf:
      launch(out.mutable_data_ptr<c10::Half>());
      break;
    default:
      TORCH_CHECK_TYPE(false, "dtype: expected float32, bfloat16 or float16, found ", dtype);
  }
  return out;
}

at::Tensor augment_ops(const at::Tensor& images, const at::Tensor& ops, const at::Tensor& magnitudes) {
  check_ops(images, ops, magnitudes);
  const c10::cuda::CUDAGuard guard(images.device());
  at::Tensor out = at::empty(images.sizes(), images.options());
  if (images.size(0) == 0) return out;
  const int64_t pixels = images.size(1) * images.size(2);
  const size_t shared = reserve_images(ops_kernel, pixels);
  ops_kernel<<<images.size(0), threads_for(pixels), shared, c10::cuda::getCurrentCUDAStream()>>>(
      images.const_data_ptr<uint8_t>(), ops.const_data_ptr<int64_t>(), magnitudes.const_data_ptr<double>(),
      ops.size(1), static_cast<int>(images.size(1)), static_cast<int>(images.size(2)), out.mutable_data_ptr<uint8_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

BACON_FAST_IMPL(CUDA, m) {
  m.impl("augment_views", augment_views);
  m.impl("augment_ops", augment_ops);
}

}  // namespace
}  // namespace bacon_fast::augment
