// Derivative of BaCon's loss. Registered in C++, it costs a few microseconds a step; torch.library.register_autograd
// costs eighty, more than the loss itself for a usual batch.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "register.h"

namespace bacon_fast {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Loss = std::tuple<Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&,
    const Tensor&, const Tensor&, double, double, std::optional<double>, int64_t, std::string_view, double);
using LossBackward = Tensor(const Tensor&, const Tensor&, const Tensor&);

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Scales the gradient. It takes the features too, so that autograd comes here for a second derivative.
struct BaconLossBackward : torch::autograd::Function<BaconLossBackward> {
  static Tensor forward(
      AutogradContext*, const Tensor& grad_loss, const Tensor& grad_features, const Tensor& features) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find<LossBackward>("bacon_fast::bacon_loss_backward_cpp");
    return op.call(grad_loss, grad_features, features);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "bacon_loss has no second derivative in backend 'cpp'; backend 'reference' has");
  }
};

struct BaconLoss : torch::autograd::Function<BaconLoss> {
  static variable_list forward(
      AutogradContext* context, const Tensor& features, const Tensor& labels, const Tensor& logits,
      const Tensor& centers, const std::optional<Tensor>& has_center, const Tensor& reliable,
      const Tensor& class_counts, const Tensor& progress, double temperature, double bta,
      std::optional<double> negative_weight, int64_t top_k, std::string_view neg_mode, double min_temperature) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find<Loss>("bacon_fast::bacon_loss_cpp");
    const auto [loss, grad] = op.call(
        features, labels, logits, centers, has_center, reliable, class_counts, progress, temperature, bta,
        negative_weight, top_k, neg_mode, min_temperature);
    context->mark_non_differentiable({grad});
    context->set_materialize_grads(false);  // of the gradient's gradient, which has the features' size
    context->save_for_backward({grad, features});
    return {loss, grad};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    constexpr int kArguments = 14;
    variable_list result(kArguments);
    if (grads[0].defined()) {
      static const auto op = find<LossBackward>("bacon_fast::bacon_loss_backward_cpp");
      const variable_list saved = context->get_saved_variables();
      result[0] = op.call(grads[0], saved[0], saved[1]);
    }
    return result;
  }
};

std::tuple<Tensor, Tensor> bacon_loss(
    const Tensor& features, const Tensor& labels, const Tensor& logits, const Tensor& centers,
    const std::optional<Tensor>& has_center, const Tensor& reliable, const Tensor& class_counts,
    const Tensor& progress, double temperature, double bta, std::optional<double> negative_weight, int64_t top_k,
    std::string_view neg_mode, double min_temperature) {
  const variable_list outputs = BaconLoss::apply(
      features, labels, logits, centers, has_center, reliable, class_counts, progress, temperature, bta,
      negative_weight, top_k, neg_mode, min_temperature);
  return {outputs[0], outputs[1]};
}

Tensor bacon_loss_backward(const Tensor& grad_loss, const Tensor& grad_features, const Tensor& features) {
  return BaconLossBackward::apply(grad_loss, grad_features, features);
}

BACON_FAST_IMPL(Autograd, m) {
  m.impl("bacon_loss_cpp", &bacon_loss);
  m.impl("bacon_loss_backward_cpp", &bacon_loss_backward);
}

}  // namespace
}  // namespace bacon_fast
