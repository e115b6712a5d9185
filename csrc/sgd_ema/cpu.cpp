// One step of Nesterov SGD with the moving average on a CPU: chunks of the parameters, over threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include "register.h"
#include "sgd_ema/plans.h"

namespace bacon_fast::optim {
namespace {

constexpr int64_t kGrain = 8;  // chunks a thread is worth waking for

void sgd_ema(at::TensorList parameters, at::TensorList gradients, at::TensorList momenta, at::TensorList averages,
             c10::ArrayRef<double> weight_decays, at::TensorList copies, at::TensorList copied, const at::Tensor& rate,
             double momentum, double average_momentum, const std::optional<at::Tensor>& grad_scale,
             const std::optional<at::Tensor>& found_inf) {
  const Arguments all{parameters, gradients, momenta, averages, weight_decays, copies, copied};
  check_arguments(all, rate, grad_scale, found_inf);
  const Settings settings = settings_of(rate, grad_scale, found_inf, momentum, 1 - average_momentum);
  for_each_dtype(all, [&](auto scalar, const Plan& plan) {
    at::parallel_for(0, plan.chunks(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        update_chunk<decltype(scalar)>(plan, settings, static_cast<int32_t>(chunk), 0, 1);
      }
    });
  });
}

}  // namespace

BACON_FAST_IMPL(CPU, m) { m.impl("sgd_ema_", sgd_ema); }

}  // namespace bacon_fast::optim
