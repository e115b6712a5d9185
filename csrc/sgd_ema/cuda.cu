// One step of Nesterov SGD with the moving average on a GPU: one launch for up to kMaxEntries tensors of a dtype.
//
// The table of tensors is an argument of the kernel, not a buffer: nothing is copied to the device, gradients may have
// new addresses in every step, and a captured graph holds the addresses of its capture.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include "register.h"
#include "sgd_ema/plans.h"

namespace bacon_fast::optim {
namespace {

constexpr int kThreads = 256;

template <class Scalar>
__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ Plan plan, const Settings settings) {
  update_chunk<Scalar>(plan, settings, static_cast<int32_t>(blockIdx.x), threadIdx.x, kThreads);
}

void sgd_ema(at::TensorList parameters, at::TensorList gradients, at::TensorList momenta, at::TensorList averages,
             c10::ArrayRef<double> weight_decays, at::TensorList copies, at::TensorList copied, const at::Tensor& rate,
             double momentum, double average_momentum, const std::optional<at::Tensor>& grad_scale,
             const std::optional<at::Tensor>& found_inf) {
  const Arguments all{parameters, gradients, momenta, averages, weight_decays, copies, copied};
  check_arguments(all, rate, grad_scale, found_inf);
  const c10::cuda::CUDAGuard guard(rate.device());
  const Settings settings = settings_of(rate, grad_scale, found_inf, momentum, 1 - average_momentum);
  for_each_dtype(all, [&](auto scalar, const Plan& plan) {
    update_kernel<decltype(scalar)>
        <<<plan.chunks(), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(plan, settings);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

BACON_FAST_IMPL(CUDA, m) { m.impl("sgd_ema_", sgd_ema); }

}  // namespace bacon_fast::optim
