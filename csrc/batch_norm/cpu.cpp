// BatchNorm in training mode with the residual sum before it and the LeakyReLU after it, on a CPU (formula:
// bacon_fast/reference/batch_norm.py). Two passes over memory forward and two backward, instead of torch's seven.
//
// Work is cut into chunks of pixels by size alone, and chunks are summed in order, so the result does not depend on the
// number of threads. A chunk sums up to some thousand pixels in float; totals are doubles.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "batch_norm/panel.h"
#include "register.h"

namespace bacon_fast::norm {
namespace {

using at::Tensor;

constexpr int64_t kVector = 128;         // about so many numbers in a row of a panel: long enough for a loop
constexpr int64_t kPanel = 4096;         // numbers in a panel: several fit into the first-level cache
constexpr int64_t kChunk = 16 * kPanel;  // numbers summed in float, and the least that is worth a thread

// How [pixels, channels] is cut.
struct Layout {
  int64_t pixels, channels;
  int64_t repeat;  // pixels in a row of a panel
  int64_t panel;   // pixels in a panel, a multiple of `repeat`
  int64_t chunk;   // pixels in a chunk, a multiple of `panel`
  int64_t chunks;

  explicit Layout(const Tensor& x) : pixels(x.numel() / x.size(1)), channels(x.size(1)) {
    repeat = std::max<int64_t>(1, kVector / channels);
    panel = repeat * std::max<int64_t>(1, kPanel / (repeat * channels));
    chunk = panel * std::max<int64_t>(1, kChunk / (panel * channels));
    chunks = (pixels + chunk - 1) / chunk;
  }

  int64_t length() const { return repeat * channels; }

  // A per-channel vector, repeated over a row.
  template <class T, class Value>
  std::vector<T> row(Value value) const {
    std::vector<T> values(length());
    for (int64_t k = 0; k < length(); ++k) values[k] = static_cast<T>(value(k % channels));
    return values;
  }

  // Calls body(chunk, first pixel, pixels) for the panels of some chunks.
  template <class Body>
  void for_panels(int64_t begin, int64_t end, Body body) const {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t last = std::min(pixels, (c + 1) * chunk);
      for (int64_t p = c * chunk; p < last; p += panel) body(c, p, std::min(panel, last - p));
    }
  }

  // The same for all chunks, in parallel.
  template <class Body>
  void for_panels(Body body) const {
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { for_panels(begin, end, body); });
  }

  // Calls body(offset, rows, length) for the whole rows of a panel, then for its incomplete one.
  template <class Body>
  void for_rows(int64_t count, Body body) const {
    const int64_t rows = count / repeat, rest = count % repeat;
    if (rows > 0) body(int64_t{0}, rows, length());
    if (rest > 0) body(rows * length(), int64_t{1}, rest * channels);
  }
};

// Two sums over all pixels of each channel, gathered chunk by chunk.
template <class T>
struct Sums {
  const Layout& layout;
  std::vector<T> parts;  // [chunks, 2, length]

  explicit Sums(const Layout& layout) : layout(layout), parts(layout.chunks * 2 * layout.length(), T(0)) {}

  T* first(int64_t chunk) { return parts.data() + chunk * 2 * layout.length(); }
  T* second(int64_t chunk) { return first(chunk) + layout.length(); }

  // Totals [2, channels].
  std::vector<double> totals() const {
    std::vector<double> result(2 * layout.channels, 0.0);
    for (int64_t c = 0; c < layout.chunks; ++c) {
      for (int64_t half = 0; half < 2; ++half) {
        const T* part = parts.data() + (2 * c + half) * layout.length();
        double* total = result.data() + half * layout.channels;
        for (int64_t k = 0; k < layout.length(); ++k) total[k % layout.channels] += part[k];
      }
    }
    return result;
  }
};

Tensor nhwc(const Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

// A per-channel vector as doubles.
std::vector<double> values_of(const Tensor& t) {
  const Tensor wide = t.to(at::kDouble).contiguous();
  const double* data = wide.const_data_ptr<double>();
  return std::vector<double>(data, data + wide.numel());
}

void write(const std::vector<double>& values, const Tensor& to) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, to.scalar_type(), "batch_norm_act", [&] {
    for (size_t c = 0; c < values.size(); ++c) {
      to.data_ptr<scalar_t>()[c * to.stride(0)] = static_cast<scalar_t>(values[c]);
    }
  });
}

// Mean of each channel, and the sum of squared deviations from it, over some pixels.
struct Moments {
  int64_t pixels = 0;
  std::vector<double> mean, square;

  explicit Moments(int64_t channels) : mean(channels, 0.0), square(channels, 0.0) {}

  // The moments of both together (Chan, Golub, LeVeque, 1983).
  void merge(const Moments& other) {
    if (other.pixels == 0) return;
    pixels += other.pixels;
    const double share = static_cast<double>(other.pixels) / pixels;
    const double cross = share * (pixels - other.pixels);
    for (size_t c = 0; c < mean.size(); ++c) {
      const double delta = other.mean[c] - mean[c];
      mean[c] += delta * share;
      square[c] += other.square[c] + delta * delta * cross;
    }
  }
};

// Moments of a panel, by deviations from its own mean: squares of numbers far from zero would cancel.
template <class S>
struct PanelMoments {
  using T = Wide<S>;

  const Layout& layout;
  Moments result;
  std::vector<T> sum, square, pivot;

  explicit PanelMoments(const Layout& layout)
      : layout(layout),
        result(layout.channels),
        sum(layout.length()),
        square(layout.length()),
        pivot(layout.length()) {}

  const Moments& of(const S* s, int64_t count) {
    std::fill(sum.begin(), sum.end(), T(0));
    layout.for_rows(count, [&](int64_t offset, int64_t rows, int64_t length) {
      accumulate(s + offset, rows, length, sum.data());
    });
    fold(sum, result.mean);
    for (int64_t k = 0; k < layout.length(); ++k) {
      pivot[k] = static_cast<T>(result.mean[k % layout.channels] / count);
      sum[k] = square[k] = 0;
    }
    layout.for_rows(count, [&](int64_t offset, int64_t rows, int64_t length) {
      moments(s + offset, pivot.data(), rows, length, sum.data(), square.data());
    });
    fold(sum, result.mean);
    fold(square, result.square);
    for (int64_t c = 0; c < layout.channels; ++c) {
      const double rest = result.mean[c] / count;  // of the mean, lost when it was rounded to the pivot
      result.square[c] = std::max(0.0, result.square[c] - rest * rest * count);
      result.mean[c] = pivot[c] + rest;
    }
    result.pixels = count;
    return result;
  }

 private:
  void fold(const std::vector<T>& row, std::vector<double>& channels) const {
    std::fill(channels.begin(), channels.end(), 0.0);
    for (int64_t start = 0; start < layout.length(); start += layout.channels) {
      for (int64_t c = 0; c < layout.channels; ++c) channels[c] += row[start + c];
    }
  }
};

// Moments of x, or of x + residual, which is written to `total` first: its rounded values are what is normalized.
template <class S>
Moments statistics(const Layout& layout, const S* x, const S* residual, S* total) {
  std::vector<Moments> parts(layout.chunks, Moments(layout.channels));
  at::parallel_for(0, layout.chunks, 1, [&](int64_t begin, int64_t end) {
    PanelMoments<S> panel(layout);
    layout.for_panels(begin, end, [&](int64_t chunk, int64_t pixel, int64_t count) {
      const int64_t at = pixel * layout.channels;
      if (residual != nullptr) add(x + at, residual + at, count * layout.channels, total + at);
      parts[chunk].merge(panel.of((residual == nullptr ? x : total) + at, count));
    });
  });
  Moments all(layout.channels);
  for (const Moments& part : parts) all.merge(part);
  return all;
}

void move_running(const Tensor& running, const std::vector<double>& batch, double momentum, double factor) {
  std::vector<double> values = values_of(running);
  for (size_t c = 0; c < values.size(); ++c) values[c] = (1 - momentum) * values[c] + momentum * factor * batch[c];
  write(values, running);
}

// The normalization's per-channel vectors, repeated over a row.
template <class T>
struct Normalization {
  std::vector<T> mean, scale, bias;

  Normalization(
      const Layout& layout, const std::vector<double>& weight, const std::vector<double>& bias,
      const std::vector<double>& mean, const std::vector<double>& inverse)
      : mean(layout.row<T>([&](int64_t c) { return mean[c]; })),
        scale(layout.row<T>([&](int64_t c) { return weight[c] * inverse[c]; })),
        bias(layout.row<T>([&](int64_t c) { return bias[c]; })) {}

  Affine<T> affine(double slope) const { return {mean.data(), scale.data(), bias.data(), static_cast<T>(slope)}; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x_in, const std::optional<Tensor>& residual_in, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
    const std::optional<Tensor>& num_batches_tracked, double momentum, double eps, double negative_slope) {
  const Tensor x = nhwc(x_in);
  const bool has_residual = residual_in.has_value();
  const Tensor residual = has_residual ? nhwc(*residual_in) : Tensor();
  const Layout layout(x);
  const Tensor activated = at::empty_like(x);
  const Tensor total = has_residual ? at::empty_like(x) : at::empty({0}, x.options());
  const auto options = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const Tensor mean = at::empty({layout.channels}, options), inverse = at::empty({layout.channels}, options);

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "batch_norm_act", [&] {
    using T = Wide<scalar_t>;
    const scalar_t* input = x.const_data_ptr<scalar_t>();
    const scalar_t* added = has_residual ? residual.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* sum = has_residual ? total.data_ptr<scalar_t>() : nullptr;
    const Moments moments = statistics<scalar_t>(layout, input, added, sum);
    const std::vector<double>& means = moments.mean;
    std::vector<double> variances = moments.square, inverses(layout.channels);
    for (double& variance : variances) variance /= layout.pixels;
    for (int64_t c = 0; c < layout.channels; ++c) inverses[c] = 1 / std::sqrt(variances[c] + eps);
    write(means, mean);
    write(inverses, inverse);
    if (running_mean.has_value()) move_running(*running_mean, means, momentum, 1.0);
    if (running_var.has_value()) {
      move_running(*running_var, variances, momentum, static_cast<double>(layout.pixels) / (layout.pixels - 1));
    }
    if (num_batches_tracked.has_value()) ++*num_batches_tracked->data_ptr<int64_t>();

    const Normalization<T> normalization(layout, values_of(weight), values_of(bias), means, inverses);
    const Affine<T> affine = normalization.affine(negative_slope);
    const scalar_t* normalized = has_residual ? sum : input;
    scalar_t* result = activated.data_ptr<scalar_t>();
    layout.for_panels([&](int64_t, int64_t pixel, int64_t count) {
      const int64_t at = pixel * layout.channels;
      layout.for_rows(count, [&](int64_t offset, int64_t rows, int64_t length) {
        activate(normalized + at + offset, affine, rows, length, result + at + offset);
      });
    });
  });
  return {activated, total, mean, inverse};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_activated, const std::optional<Tensor>& grad_sum, const Tensor& total_in, const Tensor& weight,
    const Tensor& bias, const Tensor& mean, const Tensor& inverse, double negative_slope) {
  const Tensor total = nhwc(total_in), upstream = nhwc(grad_activated);
  const bool has_more = grad_sum.has_value();
  const Tensor more = has_more ? nhwc(*grad_sum) : Tensor();
  const Layout layout(total);
  const Tensor grad_x = at::empty_like(total), grad_weight = at::empty_like(weight), grad_bias = at::empty_like(bias);

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, total.scalar_type(), "batch_norm_act", [&] {
    using T = Wide<scalar_t>;
    const std::vector<double> weights = values_of(weight), means = values_of(mean), inverses = values_of(inverse);
    const Normalization<T> normalization(layout, weights, values_of(bias), means, inverses);
    const Affine<T> affine = normalization.affine(negative_slope);
    const scalar_t* grad = upstream.const_data_ptr<scalar_t>();
    const scalar_t* normalized = total.const_data_ptr<scalar_t>();
    const scalar_t* added = has_more ? more.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* result = grad_x.data_ptr<scalar_t>();

    Sums<T> sums(layout);
    layout.for_panels([&](int64_t chunk, int64_t pixel, int64_t count) {
      const int64_t at = pixel * layout.channels;
      layout.for_rows(count, [&](int64_t offset, int64_t rows, int64_t length) {
        const int64_t k = at + offset;
        products(grad + k, normalized + k, affine, rows, length, sums.first(chunk), sums.second(chunk));
      });
    });
    const std::vector<double> totals = sums.totals();
    std::vector<double> bias_gradient(layout.channels), weight_gradient(layout.channels);
    for (int64_t c = 0; c < layout.channels; ++c) {
      bias_gradient[c] = totals[c];
      weight_gradient[c] = totals[layout.channels + c] * inverses[c];
    }
    write(bias_gradient, grad_bias);
    write(weight_gradient, grad_weight);

    const auto scale = [&](int64_t c) { return weights[c] * inverses[c] / layout.pixels; };
    const std::vector<T> offset = layout.row<T>([&](int64_t c) { return scale(c) * bias_gradient[c]; });
    const std::vector<T> tilt = layout.row<T>([&](int64_t c) { return scale(c) * weight_gradient[c] * inverses[c]; });
    layout.for_panels([&](int64_t, int64_t pixel, int64_t count) {
      const int64_t at = pixel * layout.channels;
      layout.for_rows(count, [&](int64_t start, int64_t rows, int64_t length) {
        const int64_t k = at + start;
        const scalar_t* more = has_more ? added + k : nullptr;
        gradient(
            grad + k, normalized + k, more, affine, offset.data(), tilt.data(), rows, length, result + k);
      });
    });
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

BACON_FAST_IMPL(CPU, m) {
  m.impl("batch_norm_act_cpp", &forward);
  m.impl("batch_norm_act_backward_cpp", &backward);
}

}  // namespace bacon_fast::norm
