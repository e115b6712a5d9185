// BaCon's loss and gradient on a CPU in one pass: class selection, negatives, temperatures, loss, d loss / d features.
//
// The gradient is linear in the upstream scalar, so the forward op returns both and the backward op scales.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/topk.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "contrastive/buffer.h"
#include "contrastive/kernels.h"
#include "contrastive/parallel.h"
#include "bacon_loss/top_classes.h"
#include "register.h"

namespace bacon_fast {
namespace {

using namespace contrastive;

constexpr double kCosineEps = 1e-8;  // smallest norm a vector is divided by
constexpr double kLogEps = 1e-8;     // added to the denominator of the softmax
constexpr double kNegativeInfinity = -std::numeric_limits<double>::infinity();

struct Options {
  double progress, temperature, bta, min_temperature;
  std::optional<double> negative_weight;
  int64_t top_k;
  bool authors;
};

double read(const at::Tensor& tensor, int64_t i) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return tensor.const_data_ptr<float>()[i];
    case at::kLong:
      return double(tensor.const_data_ptr<int64_t>()[i]);
    default:
      return tensor.const_data_ptr<double>()[i];
  }
}

// Contiguous, and in one of the types that `read` knows.
at::Tensor readable(const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  const bool known = type == at::kFloat || type == at::kLong || type == at::kDouble;
  return (known ? tensor : tensor.to(at::kDouble)).contiguous();
}

at::Tensor as_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.to(type).contiguous();  // neither copies what already fits
}

template <class T>
class BaconLoss {
 public:
  BaconLoss(
      const at::Tensor& features, const at::Tensor& labels, const at::Tensor& logits, const at::Tensor& centers,
      const std::optional<at::Tensor>& has_center, const at::Tensor& reliable, const at::Tensor& class_counts,
      const Options& options)
      : options_(options),
        rows_(features.size(0)),
        labeled_(labels.size(0)),
        dim_(features.size(1)),
        num_classes_(centers.size(0)),
        num_codes_(std::min(options.top_k, num_classes_)),
        padded_rows_(padded(rows_, kVectorUnit)),
        features_(as_type(features, at::CppTypeToScalarType<T>::value)),
        centers_(as_type(centers, at::CppTypeToScalarType<T>::value)),
        labels_(labels.contiguous()),
        logits_(as_type(logits, logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)),
        reliable_(reliable.contiguous()),
        class_counts_(readable(class_counts)) {
    if (has_center) has_center_ = has_center->contiguous();
    allocate();
  }

  // Returns the loss, and writes the gradient to grad [rows, dim].
  double run(T* grad) {
    const Kernels<T>& kernel = kernels<T>();
    batch_.grad = grad;
    const int64_t row_cost = kScalarCost * num_classes_ + kNormalizeCost * dim_;
    at::parallel_for(0, padded_rows_ / kVectorUnit, grain(kVectorUnit * row_cost), [&](int64_t begin, int64_t end) {
      kernel.normalize(batch_.features, begin * kVectorUnit, end * kVectorUnit);
      choose_classes(begin * kVectorUnit, std::min(end * kVectorUnit, rows_));
    });
    settle_ties();
    count();
    const int64_t units = padded_rows_ / kRowUnit, least = grain(kRowUnit * padded_rows_ * (dim_ + kExponentialCost));
    at::parallel_for(0, units, least, [&](int64_t begin, int64_t end) { kernel.bacon_sums(batch_, begin, end); });
    const double loss = finish();
    at::parallel_for(0, units, least, [&](int64_t begin, int64_t end) { kernel.bacon_gradient(batch_, begin, end); });
    return loss;
  }

 private:
  void allocate() {
    const int64_t width = padded(dim_, kFeatureUnit);
    reals_ = Buffer<T>(padded_rows_ * (width + dim_ + 8));
    codes_ = Buffer<Code<T>>(padded_rows_ * (num_codes_ + 1));
    std::fill_n(codes_.data(), codes_.size(), Code<T>(-1));
    sums_ = Buffer<double>(padded_rows_);
    states_ = Buffer<unsigned char>(padded_rows_);
    flags_ = Buffer<bool>(2 * padded_rows_);
    std::fill_n(flags_.data(), flags_.size(), false);
    T* next = reals_.data();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    batch_ = {};
    batch_.rows = rows_;
    batch_.dim = dim_;
    batch_.num_codes = num_codes_;
    batch_.scale = T(1 / options_.temperature);
    batch_.direct = 1 / options_.temperature <= kDirectLimit;
    T* units = take(padded_rows_ * width);
    T* panels = take(padded_rows_ * dim_);
    batch_.features = {
        features_.template const_data_ptr<T>(), rows_, dim_, T(kCosineEps), units, panels, take(padded_rows_),
        take(padded_rows_), states_.data()};
    batch_.codes = codes_.data();
    batch_.classes = codes_.data() + padded_rows_ * num_codes_;
    batch_.anchor = flags_.data();
    batch_.centers = centers_.template const_data_ptr<T>();
    batch_.sums = sums_.data();
    batch_.shifts = take(padded_rows_);
    batch_.center_similarity = take(padded_rows_);
    batch_.center_scale = take(padded_rows_);
    batch_.push = push_ = take(padded_rows_);
    batch_.push_shift = push_shift_ = take(padded_rows_);
    batch_.pull = pull_ = take(padded_rows_);
    if (padded_rows_ * padded_rows_ <= kTableLimit) {
      table_ = Buffer<T>(padded_rows_ * padded_rows_);
      batch_.table = table_.data();
    }
  }

  // Codes of rows begin..end-1: the label, or the classes of the largest logits.
  void choose_classes(int64_t begin, int64_t end) {
    bool* tied = flags_.data() + padded_rows_;
    const int64_t* labels = labels_.const_data_ptr<int64_t>();
    for (int64_t r = begin; r < std::min(end, labeled_); ++r) codes_[r] = static_cast<Code<T>>(labels[r]);
    AT_DISPATCH_FLOATING_TYPES(logits_.scalar_type(), "bacon_loss_cpp", [&] {
      const scalar_t* logits = logits_.const_data_ptr<scalar_t>();
      for (int64_t r = std::max(begin, labeled_); r < end; ++r) {
        const scalar_t* row = logits + (r - labeled_) * num_classes_;
        tied[r] = !top_classes(row, num_classes_, num_codes_, codes_.data() + r, padded_rows_);
      }
    });
  }

  void settle_ties() {
    const bool* tied = flags_.data() + padded_rows_;
    if (std::find(tied + labeled_, tied + rows_, true) == tied + rows_) return;
    const at::Tensor top = std::get<1>(at::topk(logits_, num_codes_, 1));
    const int64_t* classes = top.const_data_ptr<int64_t>();
    for (int64_t r = labeled_; r < rows_; ++r) {
      for (int64_t t = 0; tied[r] && t < num_codes_; ++t) {
        codes_[t * padded_rows_ + r] = static_cast<Code<T>>(classes[(r - labeled_) * num_codes_ + t]);
      }
    }
  }

  // Class sizes, numbers of negatives, and which rows take part.
  void count() {
    const int64_t* labels = labels_.const_data_ptr<int64_t>();
    for (int64_t r = 0; r < labeled_; ++r) {
      TORCH_CHECK_VALUE(
          labels[r] >= 0 && labels[r] < num_classes_, "labels: expected classes in 0..", num_classes_ - 1, ", found ",
          labels[r], " in row ", r);
    }
    Code<T>* classes = codes_.data() + padded_rows_ * num_codes_;
    std::copy_n(codes_.data(), rows_, classes);
    members_.assign(num_classes_, 0);
    negatives_.assign(num_classes_, rows_);
    live_.assign(num_classes_, 0);
    for (int64_t r = 0; r < rows_; ++r) {
      ++members_[classes[r]];
      const int64_t codes = r < labeled_ ? 1 : num_codes_;
      for (int64_t t = 0; t < codes; ++t) --negatives_[codes_[t * padded_rows_ + r]];
    }
    const bool* reliable = reliable_.const_data_ptr<bool>();
    const bool* has_center = has_center_.defined() ? has_center_.const_data_ptr<bool>() : nullptr;
    bool* anchor = flags_.data();
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t c = classes[r];
      anchor[r] = reliable[r] && negatives_[c] > 0 && (has_center == nullptr || has_center[c]);
      live_[c] |= anchor[r];
    }
  }

  // The positives' inverse temperatures, balanced temperature adjusting.
  std::vector<double> positive_scales() const {
    double largest = 1;
    for (int64_t c = 0; c < num_classes_; ++c) {
      const double count = read(class_counts_, c);
      TORCH_CHECK_VALUE(count >= 0 && std::isfinite(count), "class_counts: expected finite numbers >= 0, found ",
                        count);
      largest = std::max(largest, count);
    }
    const double remaining = 1 - options_.progress;
    std::vector<double> scales(num_classes_);
    for (int64_t c = 0; c < num_classes_; ++c) {
      const double adjustment = options_.bta * remaining * remaining * std::sqrt(read(class_counts_, c) / largest);
      scales[c] = 1 / std::max(options_.temperature * (1 - adjustment), options_.min_temperature);
    }
    return scales;
  }

  // From the rows' sums to the loss, and to its derivatives by the logits: push, push_shift and pull.
  double finish() {
    const bool* anchor = batch_.anchor;
    const Code<T>* classes = batch_.classes;
    const std::vector<double> scales = positive_scales();
    const bool* reliable = reliable_.const_data_ptr<bool>();
    const int64_t num_reliable = std::count(reliable, reliable + rows_, true);
    const double divisor = double(std::max<int64_t>(num_reliable, 1));

    // Sums over the negatives, of each class ("authors") or each row ("paper"), relative to exp(shift).
    const int64_t groups = options_.authors ? num_classes_ : rows_;
    const auto group_of = [&](int64_t r) { return options_.authors ? int64_t(classes[r]) : r; };
    // Whether the row's sum enters the loss: the row is an anchor, or in the class of one.
    const auto active = [&](int64_t r) { return options_.authors ? bool(live_[classes[r]]) : anchor[r]; };
    std::vector<double> sum(groups, 0.0), shift(groups, batch_.direct ? 0.0 : kNegativeInfinity);
    for (int64_t r = 0; r < rows_ && !batch_.direct; ++r) {
      if (active(r)) shift[group_of(r)] = std::max(shift[group_of(r)], double(batch_.shifts[r]));
    }
    for (int64_t r = 0; r < rows_; ++r) {
      if (!active(r)) continue;
      const int64_t g = group_of(r);
      sum[g] += batch_.direct ? sums_[r] : sums_[r] * std::exp(batch_.shifts[r] - shift[g]);
    }

    // log(weighted mean of the negatives + eps), and its derivative by the logarithm of the sum.
    std::vector<double> denominator(groups), share(groups);
    const auto settle = [&](int64_t g, int64_t c) {
      const double mean_of = double(negatives_[c]) * double(options_.authors ? members_[c] : 1);
      const double weight = options_.negative_weight ? *options_.negative_weight : double(negatives_[c]);
      const double largest = std::max(shift[g], std::log(kLogEps));
      const double negative = weight / mean_of * sum[g] * std::exp(shift[g] - largest);
      const double total = negative + kLogEps * std::exp(-largest);
      denominator[g] = largest + std::log(total);
      share[g] = negative / total;
    };
    for (int64_t c = 0; options_.authors && c < num_classes_; ++c) {
      if (live_[c]) settle(c, c);
    }

    double loss = 0;
    std::vector<double> push(groups, 0.0);
    std::fill_n(pull_, padded_rows_, T(0));
    for (int64_t r = 0; r < rows_; ++r) {
      if (!anchor[r]) continue;
      const int64_t g = group_of(r), c = classes[r];
      if (!options_.authors) settle(g, c);
      const double margin = denominator[g] - scales[c] * double(batch_.center_similarity[r]);
      const double small = std::exp(-std::abs(margin));
      const double rho = (margin > 0 ? 1 : small) / (1 + small);  // sigmoid(margin)
      loss += std::max(margin, 0.0) + std::log1p(small);          // softplus(margin)
      pull_[r] = T(-rho * scales[c] / divisor);
      push[g] += rho * share[g] / divisor;
    }
    for (int64_t r = 0; r < padded_rows_; ++r) {
      const bool pushes = r < rows_ && active(r);
      push_[r] = T(pushes ? push[group_of(r)] / (sum[group_of(r)] * options_.temperature) : 0);
      push_shift_[r] = T(pushes ? shift[group_of(r)] : 0);
    }
    return loss / divisor;
  }

  const Options options_;
  const int64_t rows_, labeled_, dim_, num_classes_, num_codes_, padded_rows_;
  const at::Tensor features_, centers_, labels_, logits_, reliable_, class_counts_;
  at::Tensor has_center_;

  BaconBatch<T> batch_;
  Buffer<T> reals_, table_;
  Buffer<Code<T>> codes_;  // [num_codes + 1, padded rows]: the codes, then the classes
  Buffer<double> sums_;
  Buffer<unsigned char> states_;
  Buffer<bool> flags_;  // [2, padded rows]: anchor, tied
  std::vector<int64_t> members_, negatives_;
  std::vector<char> live_;  // classes with an anchor
  T *push_, *push_shift_, *pull_;
};

void check_cpu(std::initializer_list<std::pair<const char*, const at::Tensor*>> tensors) {
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK_VALUE(tensor->is_cpu(), name, ": expected a tensor on the CPU, found ", tensor->device());
  }
}

// `functional.bacon_loss` explains wrong arguments; these checks keep a direct call within its arrays.
void check_shapes(
    const at::Tensor& features, const at::Tensor& labels, const at::Tensor& logits, const at::Tensor& centers,
    const std::optional<at::Tensor>& has_center, const at::Tensor& reliable, const at::Tensor& class_counts,
    const at::Tensor& progress) {
  TORCH_CHECK_VALUE(features.dim() == 2, "features: expected shape [R, D], found ", features.sizes());
  TORCH_CHECK_VALUE(centers.dim() == 2, "centers: expected shape [K, D], found ", centers.sizes());
  TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) <= features.size(0), "labels: expected shape [B], B <= ",
                    features.size(0), ", found ", labels.sizes());
  const int64_t rows = features.size(0), unlabeled = rows - labels.size(0), num_classes = centers.size(0);
  const auto check = [](const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(tensor.sizes() == shape, name, ": expected shape ", shape, ", found ", tensor.sizes());
  };
  check("centers", centers, {num_classes, features.size(1)});
  check("logits", logits, {unlabeled, num_classes});
  check("reliable", reliable, {rows});
  check("class_counts", class_counts, {num_classes});
  check("progress", progress, {});
  if (has_center) check("has_center", *has_center, {num_classes});
}

std::tuple<at::Tensor, at::Tensor> bacon_loss(
    const at::Tensor& features, const at::Tensor& labels, const at::Tensor& logits, const at::Tensor& centers,
    const std::optional<at::Tensor>& has_center, const at::Tensor& reliable, const at::Tensor& class_counts,
    const at::Tensor& progress, double temperature, double bta, std::optional<double> negative_weight, int64_t top_k,
    std::string_view neg_mode, double min_temperature) {
  check_cpu({{"features", &features}, {"labels", &labels}, {"logits", &logits}, {"centers", &centers},
             {"reliable", &reliable}, {"class_counts", &class_counts}, {"progress", &progress}});
  check_shapes(features, labels, logits, centers, has_center, reliable, class_counts, progress);
  TORCH_CHECK_VALUE(neg_mode == "authors" || neg_mode == "paper",
                    "neg_mode: expected \"authors\" or \"paper\", found \"", neg_mode, "\"");
  TORCH_CHECK_VALUE(top_k > 0, "top_k: expected a positive integer, found ", top_k);
  const double elapsed = read(readable(progress), 0);
  TORCH_CHECK_VALUE(elapsed >= 0 && elapsed <= 1, "progress: expected a number >= 0 and <= 1, found ", elapsed);
  const at::ScalarType type = features.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor loss = at::empty({}, features.options().dtype(type));
  at::Tensor grad = at::empty(features.sizes(), features.options().dtype(type));
  const Options options = {elapsed, temperature, bta, min_temperature, negative_weight, top_k, neg_mode == "authors"};
  AT_DISPATCH_FLOATING_TYPES(type, "bacon_loss_cpp", [&] {
    BaconLoss<scalar_t> pass(features, labels, logits, centers, has_center, reliable, class_counts, options);
    *loss.mutable_data_ptr<scalar_t>() = scalar_t(pass.run(grad.mutable_data_ptr<scalar_t>()));
  });
  return {loss, grad};
}

at::Tensor bacon_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& grad_features, const at::Tensor& features) {
  return grad_features.mul(grad_loss).to(features.scalar_type());
}

BACON_FAST_IMPL(CPU, m) {
  m.impl("bacon_loss_cpp", &bacon_loss);
  m.impl("bacon_loss_backward_cpp", &bacon_loss_backward);
}

}  // namespace
}  // namespace bacon_fast
