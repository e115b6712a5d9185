// Memory bank and class centers on a GPU: the operations of cpu.cpp, one warp a row of the batch.
//
// The result does not depend on the order of the rows: the last row that names a slot does all the work for it, and sums
// are of integers. The host reads nothing back, so the launches can be captured in a CUDA graph. For the same reason a
// slot whose class does not exist, as a damaged checkpoint may have it, raises nothing: it is left as it is, and the write
// makes all centers NaN, and so the loss.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "memory_bank/apart.h"
#include "memory_bank/fixed_point.h"
#include "register.h"

namespace bacon_fast {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr unsigned kAllLanes = 0xffffffff;

__device__ void add(int64_t* to, int64_t value) {
  // Two's complement: unsigned addition is signed addition.
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// Row of the batch this warp treats, or `rows` and more where there is none.
__device__ int64_t row_of_warp() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}

__device__ bool all_finite(const float* row, int64_t dim) {
  bool finite = true;
  for (int64_t d = threadIdx.x % kWarp; d < dim; d += kWarp) finite &= isfinite(row[d]);
  return __all_sync(kAllLanes, finite);
}

__global__ void select_kernel(
    int64_t* selected_label, int64_t* counts, int64_t* sums, int64_t* sizes, const float* bank, const bool* written,
    const int64_t* slots, const int64_t* labels, const bool* gate, int64_t rows, int64_t dim, int64_t num_slots,
    int64_t num_classes) {
  const int64_t row = row_of_warp(), lane = threadIdx.x % kWarp;
  if (row >= rows) return;
  const int64_t slot = slots[row], to = labels[row];
  CUDA_KERNEL_ASSERT(slot >= 0 && slot < num_slots && "slots: out of range");
  if (!gate[row]) return;
  CUDA_KERNEL_ASSERT(to >= 0 && to < num_classes && "labels: out of range");
  for (int64_t base = row + 1; base < rows; base += kWarp) {
    const int64_t later = base + lane;
    if (__any_sync(kAllLanes, later < rows && gate[later] && slots[later] == slot)) return;
  }

  const int64_t from = selected_label[slot];
  __syncwarp();  // every lane has read the old label before one replaces it
  if (from == to || from < -1 || from >= num_classes) return;
  const bool counted = written[slot];
  if (lane == 0) {
    selected_label[slot] = to;
    add(counts + to, 1);
    if (from >= 0) add(counts + from, -1);
    if (counted) add(sizes + to, 1);
    if (counted && from >= 0) add(sizes + from, -1);
  }
  if (!counted) return;
  for (int64_t d = lane; d < dim; d += kWarp) {
    const int64_t value = to_fixed_point(bank[slot * dim + d]);
    add(sums + to * dim + d, value);
    if (from >= 0) add(sums + from * dim + d, -value);
  }
}

__global__ void write_kernel(
    float* bank, bool* written, int64_t* sums, int64_t* sizes, const int64_t* selected_label, const int64_t* slots,
    const float* features, const bool* gate, int64_t rows, int64_t dim, int64_t num_slots, int64_t num_classes,
    bool* damaged) {
  const int64_t row = row_of_warp(), lane = threadIdx.x % kWarp;
  if (row >= rows) return;
  const int64_t slot = slots[row];
  CUDA_KERNEL_ASSERT(slot >= 0 && slot < num_slots && "slots: out of range");
  const int64_t c = selected_label[slot];
  if (c < -1 || c >= num_classes) {
    if (lane == 0) *damaged = true;
    return;
  }
  if (!gate[row] || !all_finite(features + row * dim, dim)) return;
  for (int64_t base = row + 1; base < rows; base += kWarp) {
    const int64_t mine = base + lane;
    unsigned same = __ballot_sync(kAllLanes, mine < rows && gate[mine] && slots[mine] == slot);
    for (; same != 0; same &= same - 1) {  // a later row wins, if it is finite
      if (all_finite(features + (base + __ffs(same) - 1) * dim, dim)) return;
    }
  }

  const bool replaces = written[slot];
  __syncwarp();  // every lane has read the flag before one sets it
  for (int64_t d = lane; d < dim; d += kWarp) {
    float* const place = bank + slot * dim + d;
    const float value = clamp_feature(features[row * dim + d]);
    if (c >= 0) add(sums + c * dim + d, to_fixed_point(value) - (replaces ? to_fixed_point(*place) : 0));
    *place = value;
  }
  if (lane == 0) {
    written[slot] = true;
    if (c >= 0 && !replaces) add(sizes + c, 1);
  }
}

__global__ void centers_kernel(
    const int64_t* sums, const int64_t* sizes, float* centers, bool* has_center, int64_t num_classes, int64_t dim,
    const bool* damaged) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < num_classes * dim; i += stride) {
    const int64_t c = i / dim;
    const float mean = sizes[c] > 0 ? to_center(sums[i], sizes[c]) : 0.0f;
    centers[i] = *damaged ? NAN : mean;
    if (i % dim == 0) has_center[c] = sizes[c] > 0;
  }
}

int blocks_for(int64_t threads) { return static_cast<int>(std::min<int64_t>((threads + kThreads - 1) / kThreads, 1 << 30)); }

void check_contiguous(std::initializer_list<std::pair<const char*, const at::Tensor*>> buffers) {
  for (const auto& [name, buffer] : buffers) {
    TORCH_CHECK_VALUE(buffer->is_contiguous(), name, ": expected a contiguous buffer");
  }
}

void bank_select(at::Tensor& selected_label, at::Tensor& class_counts, at::Tensor& class_sums, at::Tensor& class_sizes,
                 const at::Tensor& bank, const at::Tensor& written, const at::Tensor& slots, const at::Tensor& labels,
                 const at::Tensor& gate) {
  check_contiguous({{"selected_label", &selected_label}, {"class_counts", &class_counts}, {"class_sums", &class_sums},
                    {"class_sizes", &class_sizes}, {"bank", &bank}, {"written", &written}});
  const c10::cuda::CUDAGuard guard(bank.device());
  const Tensors changed = {&selected_label, &class_counts, &class_sums, &class_sizes};
  const at::Tensor slots_c = apart(slots, changed), labels_c = apart(labels, changed), gate_c = gate.contiguous();
  const int64_t rows = slots.size(0);
  if (rows == 0) return;
  select_kernel<<<blocks_for(rows * kWarp), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      selected_label.mutable_data_ptr<int64_t>(), class_counts.mutable_data_ptr<int64_t>(),
      class_sums.mutable_data_ptr<int64_t>(), class_sizes.mutable_data_ptr<int64_t>(), bank.const_data_ptr<float>(),
      written.const_data_ptr<bool>(), slots_c.const_data_ptr<int64_t>(), labels_c.const_data_ptr<int64_t>(),
      gate_c.const_data_ptr<bool>(), rows, bank.size(1), bank.size(0), class_counts.size(0));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void bank_write(at::Tensor& bank, at::Tensor& written, at::Tensor& class_sums, at::Tensor& class_sizes,
                at::Tensor& centers, at::Tensor& has_center, const at::Tensor& selected_label, const at::Tensor& slots,
                const at::Tensor& features, const at::Tensor& gate) {
  check_contiguous({{"bank", &bank}, {"written", &written}, {"class_sums", &class_sums}, {"class_sizes", &class_sizes},
                    {"centers", &centers}, {"has_center", &has_center}, {"selected_label", &selected_label}});
  const c10::cuda::CUDAGuard guard(bank.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensors changed = {&bank, &written, &class_sums, &class_sizes, &centers, &has_center};
  const at::Tensor slots_c = apart(slots, changed), features_c = apart(features, changed);
  const at::Tensor gate_c = apart(gate, changed);
  const int64_t rows = slots.size(0), dim = bank.size(1), num_classes = class_sizes.size(0);
  const at::Tensor damaged = at::zeros({1}, written.options());
  if (rows > 0) {
    write_kernel<<<blocks_for(rows * kWarp), kThreads, 0, stream>>>(
        bank.mutable_data_ptr<float>(), written.mutable_data_ptr<bool>(), class_sums.mutable_data_ptr<int64_t>(),
        class_sizes.mutable_data_ptr<int64_t>(), selected_label.const_data_ptr<int64_t>(),
        slots_c.const_data_ptr<int64_t>(), features_c.const_data_ptr<float>(), gate_c.const_data_ptr<bool>(), rows,
        dim, bank.size(0), num_classes, damaged.mutable_data_ptr<bool>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (num_classes * dim > 0) {
    centers_kernel<<<std::min(blocks_for(num_classes * dim), 1024), kThreads, 0, stream>>>(
        class_sums.const_data_ptr<int64_t>(), class_sizes.const_data_ptr<int64_t>(), centers.mutable_data_ptr<float>(),
        has_center.mutable_data_ptr<bool>(), num_classes, dim, damaged.const_data_ptr<bool>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace

BACON_FAST_IMPL(CUDA, m) {
  m.impl("bank_select_", bank_select);
  m.impl("bank_write_", bank_write);
}

}  // namespace bacon_fast
