// Augmentation on a GPU: one launch for all views of a step. Where a view's memory fits, a thread block makes one view in
// shared memory. Larger views have their memory in global memory, and as many blocks as the GPU runs at once make them
// all: what a block works on then stays in the cache as far as it can.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>

#include "augment/arguments.h"
#include "augment/rows.h"

namespace bacon_fast::augment {
namespace {

constexpr int64_t kScratchBytes = 4096;
static_assert(sizeof(Scratch) <= kScratchBytes);
constexpr int64_t kMostGlobalBytes = int64_t{1} << 30;  // of all blocks; one block may have more

// Enough threads that each has a few pixels, and three warps at least: one per channel's histogram.
constexpr int kMostThreads = 512;
int threads_for(int64_t pixels) { return pixels <= 512 ? 128 : pixels <= 4096 ? 256 : kMostThreads; }

// The memory of this thread block, in shared or in global memory.
template <bool kShared>
__device__ Memory own_memory(const Sizes& sizes, Pixel* workspace) {
  extern __shared__ Pixel shared[];
  return Memory(kShared ? shared : workspace + sizes.all() * blockIdx.x, sizes);
}

template <bool kShared, class Out>
__global__ void __launch_bounds__(kMostThreads, 2)
    views_kernel(Settings settings, Requests requests, Sizes sizes, const uint8_t* pool, int64_t pool_size,
                             const int64_t* step, const float* table, bool channels_last, Pixel* workspace, Out* out) {
  __shared__ Scratch scratch;
  make_rows(Block{scratch}, settings, requests, pool, pool_size, static_cast<uint32_t>(*step), table, channels_last,
            own_memory<kShared>(sizes, workspace), blockIdx.x, gridDim.x, out);
}

template <bool kShared>
__global__ void ops_kernel(const uint8_t* images, const int64_t* ops, const double* magnitudes, int64_t count,
                           int64_t chain, int height, int width, Sizes sizes, Pixel* workspace, uint8_t* out) {
  __shared__ Scratch scratch;
  apply_chains(Block{scratch}, images, ops, magnitudes, count, chain, height, width,
               own_memory<kShared>(sizes, workspace), blockIdx.x, gridDim.x, out);
}

int attribute(cudaDeviceAttr name) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, c10::cuda::current_device()));
  return value;
}

// How to launch a kernel for up to `rows` rows.
class Plan {
 public:
  Plan(const at::Tensor& like, const Sizes& sizes, int64_t pixels, int64_t rows) : threads(threads_for(pixels)) {
    const int64_t bytes = sizes.all() * static_cast<int64_t>(sizeof(Pixel));
    is_shared = bytes + kScratchBytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (is_shared) {
      shared_bytes = bytes;
      return;
    }
    const int64_t at_once = int64_t{attribute(cudaDevAttrMultiProcessorCount)} *
                            (attribute(cudaDevAttrMaxThreadsPerMultiProcessor) / threads);
    most_blocks = std::max<int64_t>(1, std::min({rows, at_once, kMostGlobalBytes / bytes}));
    workspace = at::empty({most_blocks * sizes.all()}, like.options().dtype(at::kInt));
  }

  int64_t blocks(int64_t rows) const { return is_shared ? rows : std::min(rows, most_blocks); }
  Pixel* global() const { return is_shared ? nullptr : static_cast<Pixel*>(workspace.data_ptr()); }

  // Allows shared memory beyond the 48 KB that every kernel may use without asking.
  template <class Kernel>
  void allow(Kernel kernel) const {
    const int bytes = static_cast<int>(shared_bytes);
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }

  int threads;
  bool is_shared;
  size_t shared_bytes = 0;

 private:
  int64_t most_blocks = 0;
  at::Tensor workspace;
};

template <class Out>
void launch_views(const at::Tensor& pool, at::TensorList indices, c10::IntArrayRef streams, c10::IntArrayRef strong,
                  c10::IntArrayRef first_slots, const at::Tensor& step, const at::Tensor& table,
                  const Settings& settings, bool channels_last, int64_t all_rows, Out* out) {
  const int64_t pixels = int64_t{settings.height} * settings.width;
  const Sizes sizes = sizes_of(settings);
  const Plan plan(pool, sizes, pixels, all_rows);
  const auto kernel = plan.is_shared ? views_kernel<true, Out> : views_kernel<false, Out>;
  plan.allow(kernel);
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
    kernel<<<plan.blocks(rows), plan.threads, plan.shared_bytes, c10::cuda::getCurrentCUDAStream()>>>(
        settings, requests, sizes, pool.const_data_ptr<uint8_t>(), pool.size(0), step.const_data_ptr<int64_t>(),
        table.const_data_ptr<float>(), channels_last, plan.global(), out);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    out += 3 * pixels * rows;
  }
}

at::Tensor augment_views(const at::Tensor& pool, at::TensorList indices, c10::IntArrayRef streams,
                         c10::IntArrayRef strong, c10::IntArrayRef first_slots, int64_t seed, const at::Tensor& step,
                         const at::Tensor& table, const at::Tensor& ranges, int64_t padding, bool hflip,
                         int64_t num_ops, bool cutout, int64_t height, int64_t width, bool resized_crop,
                         at::ScalarType dtype, bool channels_last) {
  const int64_t rows =
      check_views(pool, indices, streams, strong, first_slots, step, table, ranges, padding, num_ops, height, width);
  const c10::cuda::CUDAGuard guard(pool.device());
  const Settings settings =
      make_settings(pool, ranges, seed, padding, hflip, num_ops, cutout, height, width, resized_crop);
  at::Tensor out = empty_views(pool, rows, settings, dtype, channels_last);
  const auto launch = [&](auto* data) {
    launch_views(pool, indices, streams, strong, first_slots, step, table, settings, channels_last, rows, data);
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
  const Sizes sizes{pixels, pixels, 0};
  const Plan plan(images, sizes, pixels, images.size(0));
  const auto kernel = plan.is_shared ? ops_kernel<true> : ops_kernel<false>;
  plan.allow(kernel);
  kernel<<<plan.blocks(images.size(0)), plan.threads, plan.shared_bytes, c10::cuda::getCurrentCUDAStream()>>>(
      images.const_data_ptr<uint8_t>(), ops.const_data_ptr<int64_t>(), magnitudes.const_data_ptr<double>(),
      images.size(0), ops.size(1), static_cast<int>(images.size(1)), static_cast<int>(images.size(2)), sizes,
      plan.global(), out.mutable_data_ptr<uint8_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

TORCH_LIBRARY_IMPL(bacon_fast, CUDA, m) {
  m.impl("augment_views", augment_views);
  m.impl("augment_ops", augment_ops);
}

}  // namespace
}  // namespace bacon_fast::augment
