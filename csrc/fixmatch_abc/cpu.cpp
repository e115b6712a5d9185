// FixMatch's and ABC's losses of both heads with their gradients, in one pass (formulas: bacon_fast/reference/fixmatch_abc.py).
//
// Each loss is linear in its upstream gradient and every row of logits enters one loss, so the forward op returns the
// gradient at upstream 1 and the backward op scales its rows.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "fixmatch_abc/softmax.h"
#include "philox.h"
#include "register.h"

namespace bacon_fast {
namespace {

constexpr uint32_t kStreamLabeled = 7;  // bacon_fast.data.philox.Stream
constexpr uint32_t kStreamUnlabeled = 8;

enum Loss { kSupervised, kUnsupervised, kBalancedLabeled, kBalancedUnlabeled, kNumLosses };
enum Stat { kConfidentShare, kBalancedShare, kKnown, kRight, kNumStats };

// The part of one labeled or unlabeled sample; parts are summed in the order of the samples, so the result never varies.
struct Contribution {
  double losses[kNumLosses] = {};
  double stats[kNumStats] = {};
};

// Row of logits `from` as T in `to`.
template <class Logit, class T>
void load_row(const Logit* from, T* to, int64_t count) {
  for (int64_t k = 0; k < count; ++k) to[k] = static_cast<T>(from[k]);
}

// weight · cross entropy of a row against a class, with its gradient.
template <class Logit, class T>
double cross_entropy(const Logit* logits, int64_t count, int64_t label, T weight, T* gradient) {
  if (weight == 0) {  // such a row takes no part, not even with a NaN
    std::fill_n(gradient, count, T(0));
    return 0;
  }
  load_row(logits, gradient, count);
  const Softmax<T> softmax(gradient, count);
  for (int64_t k = 0; k < count; ++k) gradient[k] *= weight / softmax.sum;
  gradient[label] -= weight;
  return static_cast<double>(weight) * (softmax.lse - static_cast<T>(logits[label]));
}

template <class Logit>
struct Heads {
  using T = std::conditional_t<std::is_same_v<Logit, double>, double, float>;

  const Logit *logits, *balanced;
  const int64_t *labels, *true_labels;
  const float *keep_labeled, *keep_unlabeled;
  T *grad_logits, *grad_balanced;
  int64_t* pseudo_labels;
  int64_t batch, num_unlabeled, num_classes;
  uint32_t step;
  uint64_t seed;
  double threshold;

  // 0 or 1, drawn with the probability.
  T draw(float probability, uint32_t stream, int64_t row) const {
    const uint32_t word = philox(seed, step, stream, static_cast<uint32_t>(row), 0).word[0];
    return static_cast<float>(word >> 8) * 0x1p-24f < probability;
  }

  void labeled(int64_t row, Contribution& out) const {
    const int64_t offset = row * num_classes, label = labels[row];
    const T share = T(1) / batch, kept = draw(keep_labeled[label], kStreamLabeled, row);
    out.losses[kSupervised] =
        cross_entropy<Logit, T>(logits + offset, num_classes, label, share, grad_logits + offset);
    out.losses[kBalancedLabeled] =
        cross_entropy<Logit, T>(balanced + offset, num_classes, label, kept * share, grad_balanced + offset);
  }

  void unlabeled(int64_t row, Contribution& out) const {
    const int64_t weak = (batch + row) * num_classes;
    // The gradients of the weak rows are zero; until then their memory serves as scratch.
    load_row(logits + weak, grad_logits + weak, num_classes);
    const Softmax<T> main(grad_logits + weak, num_classes);
    std::fill_n(grad_logits + weak, num_classes, T(0));
    const bool confident = 1 / main.sum >= static_cast<T>(threshold);

    load_row(balanced + weak, grad_balanced + weak, num_classes);
    const Softmax<T> second(grad_balanced + weak, num_classes);
    std::fill_n(grad_balanced + weak, num_classes, T(0));
    const bool balanced_confident = 1 / second.sum >= static_cast<T>(threshold);
    const T kept = balanced_confident ? draw(keep_unlabeled[second.top], kStreamUnlabeled, row) : T(0);

    const T share = T(1) / num_unlabeled;
    const int64_t strong = weak + num_unlabeled * num_classes;
    out.losses[kUnsupervised] =
        cross_entropy<Logit, T>(logits + strong, num_classes, main.top, confident * share, grad_logits + strong);
    out.losses[kBalancedUnlabeled] =
        cross_entropy<Logit, T>(balanced + strong, num_classes, second.top, kept * share, grad_balanced + strong);
    out.stats[kConfidentShare] = double(confident) / num_unlabeled;
    out.stats[kBalancedShare] = double(kept) / num_unlabeled;
    out.stats[kKnown] = confident && true_labels[row] >= 0;
    out.stats[kRight] = confident && true_labels[row] == main.top;
    pseudo_labels[row] = confident ? main.top : -1;
  }
};

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Outputs fixmatch_abc(
    const at::Tensor& logits, const at::Tensor& balanced, const at::Tensor& labels, const at::Tensor& true_labels,
    const at::Tensor& keep_labeled, const at::Tensor& keep_unlabeled, const at::Tensor& step, int64_t seed,
    double threshold) {
  const at::Tensor logits_c = logits.contiguous(), balanced_c = balanced.contiguous();
  const at::Tensor labels_c = labels.contiguous(), true_labels_c = true_labels.contiguous();
  const at::Tensor keep_labeled_c = keep_labeled.contiguous(), keep_unlabeled_c = keep_unlabeled.contiguous();
  const int64_t batch = labels.size(0), num_unlabeled = true_labels.size(0), num_classes = logits.size(1);
  const int64_t* label = labels_c.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < batch; ++r) {
    TORCH_CHECK_VALUE(label[r] >= 0 && label[r] < num_classes, "labels: expected classes in 0..", num_classes - 1,
                      ", found ", label[r], " in row ", r);
  }

  const auto type = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto options = logits.options();
  at::Tensor losses = at::empty({kNumLosses}, options.dtype(type));
  at::Tensor stats = at::empty({kNumStats}, options.dtype(at::kFloat));
  at::Tensor pseudo_labels = at::empty({num_unlabeled}, true_labels.options());
  at::Tensor grad_logits = at::empty(logits.sizes(), options.dtype(type));
  at::Tensor grad_balanced = at::empty(logits.sizes(), options.dtype(type));
  std::vector<Contribution> parts(batch + num_unlabeled);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "fixmatch_abc", [&] {
    using T = typename Heads<scalar_t>::T;
    const Heads<scalar_t> heads{
        logits_c.const_data_ptr<scalar_t>(),
        balanced_c.const_data_ptr<scalar_t>(),
        label,
        true_labels_c.const_data_ptr<int64_t>(),
        keep_labeled_c.const_data_ptr<float>(),
        keep_unlabeled_c.const_data_ptr<float>(),
        grad_logits.mutable_data_ptr<T>(),
        grad_balanced.mutable_data_ptr<T>(),
        pseudo_labels.mutable_data_ptr<int64_t>(),
        batch,
        num_unlabeled,
        num_classes,
        static_cast<uint32_t>(*step.const_data_ptr<int64_t>()),
        static_cast<uint64_t>(seed),
        threshold};
    // About 32k exponentials are worth a thread.
    const int64_t grain = std::max<int64_t>(1, 32768 / (4 * num_classes));
    at::parallel_for(0, batch + num_unlabeled, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (r < batch) {
          heads.labeled(r, parts[r]);
        } else {
          heads.unlabeled(r - batch, parts[r]);
        }
      }
    });

    Contribution total;
    for (const Contribution& part : parts) {
      for (int i = 0; i < kNumLosses; ++i) total.losses[i] += part.losses[i];
      for (int i = 0; i < kNumStats; ++i) total.stats[i] += part.stats[i];
    }
    std::copy_n(total.losses, kNumLosses, losses.mutable_data_ptr<T>());
    std::copy_n(total.stats, kNumStats, stats.mutable_data_ptr<float>());
  });
  return {losses, stats, pseudo_labels, grad_logits, grad_balanced};
}

// Rows of `gradient` times the upstream gradient of the loss that they enter, in the dtype of the logits.
template <class Logit, class T>
void scale_rows(
    const T* gradient, Logit* out, int64_t num_rows, int64_t num_classes, int64_t batch, int64_t num_unlabeled,
    T labeled, T unlabeled) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const bool weak = r >= batch && r < batch + num_unlabeled;
    const T scale = r < batch ? labeled : (weak ? T(0) : unlabeled);
    for (int64_t k = r * num_classes; k < (r + 1) * num_classes; ++k) {
      // An upstream gradient that is not finite must not reach rows without part in the loss.
      out[k] = gradient[k] == 0 ? T(0) : gradient[k] * scale;
    }
  }
}

std::tuple<at::Tensor, at::Tensor> fixmatch_abc_backward(
    const at::Tensor& grad_losses, const at::Tensor& grad_logits, const at::Tensor& grad_balanced,
    const at::Tensor& logits, const at::Tensor& balanced, int64_t batch, int64_t num_unlabeled) {
  const at::Tensor upstream = grad_losses.contiguous();
  const at::Tensor first = grad_logits.contiguous(), second = grad_balanced.contiguous();
  at::Tensor out_logits = at::empty(logits.sizes(), logits.options());
  at::Tensor out_balanced = at::empty(logits.sizes(), logits.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "fixmatch_abc_backward", [&] {
    using T = typename Heads<scalar_t>::T;
    const T* scale = upstream.const_data_ptr<T>();
    const int64_t rows = logits.size(0), classes = logits.size(1);
    scale_rows<scalar_t, T>(first.const_data_ptr<T>(), out_logits.mutable_data_ptr<scalar_t>(), rows, classes, batch,
                            num_unlabeled, scale[kSupervised], scale[kUnsupervised]);
    scale_rows<scalar_t, T>(second.const_data_ptr<T>(), out_balanced.mutable_data_ptr<scalar_t>(), rows, classes,
                            batch, num_unlabeled, scale[kBalancedLabeled], scale[kBalancedUnlabeled]);
  });
  return {out_logits, out_balanced};
}

}  // namespace

BACON_FAST_IMPL(CPU, m) {
  m.impl("fixmatch_abc_cpp", fixmatch_abc);
  m.impl("fixmatch_abc_backward_cpp", fixmatch_abc_backward);
}

}  // namespace bacon_fast
