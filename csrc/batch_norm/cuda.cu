// BatchNorm in training mode with the residual sum before it and the LeakyReLU after it, on a GPU: one launch each way,
// whose blocks wait for each other between the moments and the result (a cooperative launch, which a CUDA graph may
// contain). Where they cannot all run at once, the same code is two launches. No atomics: every run gives equal bits.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "batch_norm/kernels.cuh"
#include "register.h"

namespace bacon_fast::norm {
namespace {

using at::Tensor;

int attribute(cudaDeviceAttr name) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, c10::cuda::current_device()));
  return value;
}

// channels_last, and where vectors of 16 bytes can be read.
Tensor rows_first(const Tensor& images) {
  const Tensor rows = images.contiguous(at::MemoryFormat::ChannelsLast);
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % kVectorBytes == 0 ? rows : rows.clone();
}

template <class T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->data_ptr<T>() : nullptr;
}

// Launches `kernel` for images [N,C,H,W], of which a block keeps `tensors`. arguments(partial) fills in its pointers.
template <class S, class Kernel, class Arguments>
void launch(Kernel kernel, const Tensor& images, int tensors, const Arguments& arguments) {
  using Acc = Accumulator<S>;
  const int64_t channels = images.size(1);
  TORCH_CHECK_VALUE(channels * sizeof(S) % kVectorBytes == 0, "x: expected channels in multiples of ",
                    kVectorBytes / sizeof(S), ", found ", channels);
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  const int limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  // Every kernel may use 48 KB without asking. Always the same value: threads of the host may launch at once.
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  const auto is_resident = [&](const Plan& plan) {
    if (attribute(cudaDevAttrCooperativeLaunch) == 0) return false;
    int per_multiprocessor = 0;
    C10_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, plan.shared_bytes));
    return plan.blocks() <= int64_t{per_multiprocessor} * multiprocessors;
  };
  Plan plan = choose_plan(images.numel() / channels, channels, sizeof(S), sizeof(Acc), tensors,
                          {kThreads, multiprocessors, limit}, is_resident);
  TORCH_CHECK(!plan.is_empty(), "batch_norm_act: a block of this GPU has too little shared memory, ", limit, " bytes");

  const Tensor partial = at::empty({plan.partial_size()}, images.options().dtype(c10::CppTypeToScalarType<Acc>::value));
  auto filled = arguments(partial.data_ptr<Acc>());
  const dim3 grid(plan.splits, plan.channel_blocks);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  if (plan.is_one_launch) {
    int phases = kBoth;
    void* all[] = {&plan, &filled, &phases};
    C10_CUDA_CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, dim3(kThreads), all,
                                               plan.shared_bytes, stream));
    return;
  }
  for (const int phase : {kFirst, kSecond}) {
    kernel<<<grid, kThreads, plan.shared_bytes, stream>>>(plan, filled, phase);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x_in, const std::optional<Tensor>& residual_in, const Tensor& weight_in, const Tensor& bias_in,
    const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
    const std::optional<Tensor>& num_batches_tracked, double momentum, double eps, double negative_slope) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor x = rows_first(x_in), activated = at::empty_like(x);
  const std::optional<Tensor> residual = residual_in ? std::optional(rows_first(*residual_in)) : std::nullopt;
  const Tensor sum = residual ? at::empty_like(x) : at::empty({0}, x.options());
  const at::ScalarType wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor weight = weight_in.to(wide).contiguous(), bias = bias_in.to(wide).contiguous();
  const Tensor mean = at::empty({x.size(1)}, x.options().dtype(wide)), inverse = at::empty_like(mean);
  // Running statistics of another dtype are updated in a copy.
  const auto widened = [&](const std::optional<Tensor>& running) {
    return running ? std::optional(running->to(wide)) : std::nullopt;
  };
  const std::optional<Tensor> wide_mean = widened(running_mean), wide_var = widened(running_var);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "batch_norm_act", [&] {
    using Acc = Accumulator<scalar_t>;
    launch<scalar_t>(forward_kernel<scalar_t>, x, 1, [&](Acc* partial) {
      return Forward<scalar_t>{
          x.const_data_ptr<scalar_t>(),
          data<scalar_t>(residual),
          residual ? sum.data_ptr<scalar_t>() : nullptr,
          activated.data_ptr<scalar_t>(),
          weight.const_data_ptr<Acc>(),
          bias.const_data_ptr<Acc>(),
          mean.data_ptr<Acc>(),
          inverse.data_ptr<Acc>(),
          data<Acc>(wide_mean),
          data<Acc>(wide_var),
          data<int64_t>(num_batches_tracked),
          static_cast<Acc>(momentum),
          static_cast<Acc>(eps),
          static_cast<Acc>(negative_slope),
          partial,
      };
    });
  });
  if (running_mean && running_mean->scalar_type() != wide) running_mean->copy_(*wide_mean);
  if (running_var && running_var->scalar_type() != wide) running_var->copy_(*wide_var);
  return {activated, sum, mean, inverse};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& gradient_in, const std::optional<Tensor>& more_in, const Tensor& sum_in, const Tensor& weight_in,
    const Tensor& bias_in, const Tensor& mean, const Tensor& inverse, double negative_slope) {
  const c10::cuda::CUDAGuard guard(sum_in.device());
  const Tensor sum = rows_first(sum_in), gradient = rows_first(gradient_in), result = at::empty_like(sum);
  const std::optional<Tensor> more = more_in ? std::optional(rows_first(*more_in)) : std::nullopt;
  const at::ScalarType wide = mean.scalar_type();
  const Tensor weight = weight_in.to(wide).contiguous(), bias = bias_in.to(wide).contiguous();
  const Tensor grad_weight = at::empty_like(mean), grad_bias = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, sum.scalar_type(), "batch_norm_act", [&] {
    using Acc = Accumulator<scalar_t>;
    launch<scalar_t>(backward_kernel<scalar_t>, sum, 2, [&](Acc* partial) {
      return Backward<scalar_t>{
          sum.const_data_ptr<scalar_t>(),
          gradient.const_data_ptr<scalar_t>(),
          data<scalar_t>(more),
          weight.const_data_ptr<Acc>(),
          bias.const_data_ptr<Acc>(),
          mean.const_data_ptr<Acc>(),
          inverse.const_data_ptr<Acc>(),
          static_cast<Acc>(negative_slope),
          result.data_ptr<scalar_t>(),
          grad_weight.data_ptr<Acc>(),
          grad_bias.data_ptr<Acc>(),
          partial,
      };
    });
  });
  return {result, grad_weight.to(weight_in.scalar_type()), grad_bias.to(bias_in.scalar_type())};
}

}  // namespace

BACON_FAST_IMPL(CUDA, m) {
  m.impl("batch_norm_act_cpp", &forward);
  m.impl("batch_norm_act_backward_cpp", &backward);
}

}  // namespace bacon_fast::norm
