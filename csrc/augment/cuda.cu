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
#include "register.h"

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

// kResized: the settings' resized_crop, known to the compiler, since views without it then need fewer registers.
template <bool kShared, bool kResized, class Out>
__global__ void __launch_bounds__(kMostThreads, kResized ? 1 : 2)  // as many blocks as fit without spilling
    views_kernel(Settings settings, Requests requests, Sizes sizes, const uint8_t* pool, int64_t pool_size,
                             const int64_t* step, const float* table, bool channels_last, Pixel* workspace, Out* out) {
  __shared__ Scratch scratch;
  settings.resized_crop = kResized;
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

// How to launch a kernel whose blocks need memory of these sizes.
class Plan {
 public:
  Plan(const Sizes& sizes, int64_t pixels) : threads(threads_for(pixels)), words_(sizes.all()) {
    const int64_t bytes = words_ * static_cast<int64_t>(sizeof(Pixel));
    is_shared = bytes + kScratchBytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    shared_bytes = is_shared ? static_cast<int>(bytes) : 0;
  }

  // For up to `rows` rows: allows shared memory beyond the 48 KB that every kernel may use without asking, or takes
  // global memory beside `like` for the blocks that the GPU runs at once.
  template <class Kernel>
  void prepare(Kernel kernel, int64_t rows, const at::Tensor& like) {
    most_blocks_ = rows;
    if (is_shared) {
      C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
      return;
    }
    int per_processor = 0;
    C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0));
    const int64_t at_once = int64_t{per_processor} * attribute(cudaDevAttrMultiProcessorCount);
    const int64_t bytes = words_ * static_cast<int64_t>(sizeof(Pixel));
    most_blocks_ = std::max<int64_t>(1, std::min({rows, at_once, kMostGlobalBytes / bytes}));
    global_ = at::empty({most_blocks_ * words_}, like.options().dtype(at::kInt));
  }

  int threads, shared_bytes;
  bool is_shared;

  int64_t blocks(int64_t rows) const { return std::min(rows, most_blocks_); }
  Pixel* workspace() const { return is_shared ? nullptr : static_cast<Pixel*>(global_.data_ptr()); }

 private:
  int64_t words_, most_blocks_ = 0;
  at::Tensor global_;
};

template <class Out>
void launch_views(const at::Tensor& pool, at::TensorList indices, c10::IntArrayRef streams, c10::IntArrayRef strong,
                  c10::IntArrayRef first_slots, const at::Tensor& step, const at::Tensor& table,
                  const Settings& settings, bool channels_last, int64_t all_rows, Out* out) {
  const int64_t pixels = int64_t{settings.height} * settings.width;
  const Sizes sizes = sizes_of(settings);
  Plan plan(sizes, pixels);
  const auto kernel = settings.resized_crop
                          ? (plan.is_shared ? views_kernel<true, true, Out> : views_kernel<false, true, Out>)
                          : (plan.is_shared ? views_kernel<true, false, Out> : views_kernel<false, false, Out>);
  plan.prepare(kernel, all_rows, pool);
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
        table.const_data_ptr<float>(), channels_last, plan.workspace(), out);
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
  Plan plan(sizes, pixels);
  const auto kernel = plan.is_shared ? ops_kernel<true> : ops_kernel<false>;
  plan.prepare(kernel, images.size(0), images);
  kernel<<<plan.blocks(images.size(0)), plan.threads, plan.shared_bytes, c10::cuda::getCurrentCUDAStream()>>>(
      images.const_data_ptr<uint8_t>(), ops.const_data_ptr<int64_t>(), magnitudes.const_data_ptr<double>(),
      images.size(0), ops.size(1), static_cast<int>(images.size(1)), static_cast<int>(images.size(2)), sizes,
      plan.workspace(), out.mutable_data_ptr<uint8_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

BACON_FAST_IMPL(CUDA, m) {
  m.impl("augment_views", augment_views);
  m.impl("augment_ops", augment_ops);
}

}  // namespace
}  // namespace bacon_fast::augment
