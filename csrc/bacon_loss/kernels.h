// The two passes over the batch of BaCon's loss, for one instruction set. Ranges count units of kRowUnit rows.
#pragma once

#include "bacon_loss/batch.h"
#include "contrastive/units.h"

namespace bacon_fast::contrastive {
namespace {

// Columns done between two visits of a row: 8 KB of float similarities.
constexpr std::int64_t kBaconTile = 256;

// The number of codes a row: the usual number as a constant for the compiler, else 0.
constexpr int kUsualCodes = 3;

// Where `of` is among the codes of columns j, j+1, ...: they may be of that class, so they are no negatives of it.
template <class T, int kCodes>
BACON_FAST_INLINE Mask<T> may_be(const BaconBatch<T>& b, std::int64_t j, std::int64_t stride, Code<T> of) {
  using M = Mask<T>;
  if constexpr (kCodes == kUsualCodes) {
    return (load<M>(b.codes + j) == of) | (load<M>(b.codes + stride + j) == of) |
        (load<M>(b.codes + 2 * stride + j) == of);
  }
  M match{};
  for (std::int64_t t = 0; t < b.num_codes; ++t) match |= load<M>(b.codes + t * stride + j) == of;
  return match;
}

// Where columns j, j+1, ... are of a class that is one of the codes of `row`.
template <class T, int kCodes>
BACON_FAST_INLINE Mask<T> is_code(
    const BaconBatch<T>& b, std::int64_t j, std::int64_t stride, std::int64_t row,
    const Code<T> (&codes)[kUsualCodes]) {
  using M = Mask<T>;
  const M classes = load<M>(b.classes + j);
  if constexpr (kCodes == kUsualCodes) return (classes == codes[0]) | (classes == codes[1]) | (classes == codes[2]);
  M match{};
  for (std::int64_t t = 0; t < b.num_codes; ++t) match |= classes == b.codes[t * stride + row];
  return match;
}

// The similarities of kRowUnit rows and of columns first..first+count-1, in `tile` or straight in the table.
template <class T>
T* bacon_similarities(
    const BaconBatch<T>& b, std::int64_t row, std::int64_t first, std::int64_t count, T* tile, std::int64_t& stride) {
  const std::int64_t width = padded(b.dim, kFeatureUnit), columns = padded(b.rows, kVectorUnit);
  T* out = b.table ? b.table + row * columns + first : tile;
  stride = b.table ? columns : kBaconTile;
  for (std::int64_t i = 0; i < kRowUnit; i += kTileRows) {
    similarity_tile<T>(
        b.dim, b.features.units + (row + i) * width, width, b.features.panels + first * b.dim, count / kPanel<T>,
        out + i * stride, stride);
  }
  return out;
}

template <class T>
void bacon_center_similarity(const BaconBatch<T>& b, std::int64_t row) {
  const Measured<T> center(b.centers + b.classes[row] * b.dim, b.dim);
  const T scale = center.inverse(b.features.eps);
  b.center_scale[row] = scale * center.shrink;
  b.center_similarity[row] = dot(b.features.units + row * padded(b.dim, kFeatureUnit), center.data, b.dim) * scale;
}

// Adds the exponentials of one row's negatives to its sum; leaves in `values` what the gradient needs of them.
template <class T, int kCodes, bool kDirect>
void bacon_sum_row(const BaconBatch<T>& b, std::int64_t row, std::int64_t first, std::int64_t count, T* values) {
  using V = Vector<T>;
  using M = Mask<T>;
  const std::int64_t stride = padded(b.rows, kVectorUnit);
  const std::int64_t inside = b.rows - first < count ? b.rows - first : count;  // the rest is padding
  const Code<T> own = b.classes[row];
  const auto for_vectors = [&](auto&& visit) __attribute__((always_inline)) {
    std::int64_t j = 0;
    for (; j + kLanes<T> <= inside; j += kLanes<T>) visit(j, may_be<T, kCodes>(b, first + j, stride, own));
    if (j < inside) {
      const M padding = lane_numbers<T>() >= Code<T>(inside - j);
      visit(j, padding | may_be<T, kCodes>(b, first + j, stride, own));
    }
  };
  const V zero{};
  V total{};
  if constexpr (kDirect) {
    for_vectors([&](std::int64_t j, M ignored) __attribute__((always_inline)) {
      const V value = bounded_exponential(load<V>(values + j) * b.scale);
      store(values + j, value);
      total += ignored ? zero : value;
    });
  } else {
    V largest = broadcast(b.shifts[row]);
    for_vectors([&](std::int64_t j, M ignored) __attribute__((always_inline)) {
      const V logit = load<V>(values + j) * b.scale;
      store(values + j, logit);
      const V candidate = ignored ? largest : logit;
      largest = candidate > largest ? candidate : largest;
    });
    const T seen = max_lanes<T>(largest);
    if (seen == -std::numeric_limits<T>::infinity()) {
      largest = zero;  // no negative so far
    } else {
      b.sums[row] *= std::exp(double(b.shifts[row] - seen));
      b.shifts[row] = seen;
      largest = broadcast(seen);
    }
    for_vectors([&](std::int64_t j, M ignored) __attribute__((always_inline)) {
      const V value = exponential(load<V>(values + j) - largest);
      total += ignored ? zero : value;
    });
  }
  b.sums[row] += sum_lanes<T>(total);
}

template <class T>
void bacon_sums(const BaconBatch<T>& b, std::int64_t begin, std::int64_t end) {
  const bool usual = b.num_codes == kUsualCodes;
  const auto sum_row = b.direct ? usual ? bacon_sum_row<T, kUsualCodes, true> : bacon_sum_row<T, 0, true>
                                : usual ? bacon_sum_row<T, kUsualCodes, false> : bacon_sum_row<T, 0, false>;
  alignas(64) T tile[kRowUnit * kBaconTile];
  const std::int64_t columns = padded(b.rows, kVectorUnit);
  for (std::int64_t row = begin * kRowUnit; row < end * kRowUnit; row += kRowUnit) {
    for (std::int64_t r = row; r < row + kRowUnit; ++r) {
      b.sums[r] = 0;
      b.shifts[r] = b.direct ? T(0) : -std::numeric_limits<T>::infinity();
      if (b.anchor[r]) bacon_center_similarity(b, r);
    }
    for (std::int64_t first = 0; first < columns; first += kBaconTile) {
      const std::int64_t count = columns - first < kBaconTile ? columns - first : kBaconTile;
      std::int64_t stride;
      T* values = bacon_similarities(b, row, first, count, tile, stride);
      for (std::int64_t r = 0; r < kRowUnit; ++r) {
        // Rows that are not active are summed too: the table is read in both directions.
        sum_row(b, row + r, first, count, values + r * stride);
      }
    }
    for (std::int64_t r = row; r < row + kRowUnit; ++r) {
      // Units hide values that are not finite; in an anchor they must show in the loss.
      if (b.features.state[r] & kNotFinite) {
        b.sums[r] = std::numeric_limits<double>::quiet_NaN();
        b.center_similarity[r] = std::numeric_limits<T>::quiet_NaN();
      }
    }
  }
}

// Turns one row's values, or its similarities if there is no table of values, into d loss / d similarity: of the row as
// anchor and as negative of the others.
template <class T, int kCodes, bool kDirect, bool kTable>
void bacon_weights_row(
    const BaconBatch<T>& b, std::int64_t row, std::int64_t first, std::int64_t count, const T* values, T* weights) {
  using V = Vector<T>;
  const std::int64_t stride = padded(b.rows, kVectorUnit);
  const V zero{}, push = broadcast(b.push[row]);
  const Code<T> own = b.classes[row];
  Code<T> codes[kUsualCodes];
  for (int t = 0; t < kUsualCodes && t < b.num_codes; ++t) codes[t] = b.codes[t * stride + row];
  for (std::int64_t j = 0; j < count; j += kLanes<T>) {
    const std::int64_t column = first + j;
    const V push_ours = may_be<T, kCodes>(b, column, stride, own) ? zero : push;
    const V push_theirs = is_code<T, kCodes>(b, column, stride, row, codes) ? zero : load<V>(b.push + column);
    const V value = kTable ? load<V>(values + j) : load<V>(values + j) * b.scale;
    V weight;
    if constexpr (kDirect) {
      weight = (kTable ? value : bounded_exponential(value)) * (push_ours + push_theirs);
    } else {
      // A shift is the largest logit of its negatives; others, whose push is 0, must not overflow.
      const V ours = value - b.push_shift[row];
      const V theirs = value - load<V>(b.push_shift + column);
      weight = push_ours * exponential(ours > zero ? zero : ours) +
          push_theirs * exponential(theirs > zero ? zero : theirs);
    }
    // Not 0 · NaN for a pair of rows that has no part in the loss; push is never negative.
    store(weights + j, push_ours + push_theirs != zero ? weight : zero);
  }
}

template <class T, int kCodes, bool kTable>
auto bacon_weights(const BaconBatch<T>& b) {
  return b.direct ? bacon_weights_row<T, kCodes, true, kTable> : bacon_weights_row<T, kCodes, false, kTable>;
}

template <class T>
void bacon_gradient(const BaconBatch<T>& b, std::int64_t begin, std::int64_t end) {
  const std::int64_t columns = padded(b.rows, kVectorUnit), width = padded(b.dim, kFeatureUnit);
  const bool usual = b.num_codes == kUsualCodes;
  const auto weights_row = [&] {
    if (b.table) return usual ? bacon_weights<T, kUsualCodes, true>(b) : bacon_weights<T, 0, true>(b);
    return usual ? bacon_weights<T, kUsualCodes, false>(b) : bacon_weights<T, 0, false>(b);
  }();
  alignas(64) T tile[kRowUnit * kBaconTile];
  alignas(64) T weights[kRowUnit * kBaconTile];
  Scratch<T> grad_units(kRowUnit * width);
  for (std::int64_t row = begin * kRowUnit; row < end * kRowUnit; row += kRowUnit) {
    grad_units.clear();
    for (std::int64_t first = 0; first < columns; first += kBaconTile) {
      const std::int64_t count = columns - first < kBaconTile ? columns - first : kBaconTile;
      std::int64_t stride = columns;
      T* values = b.table ? b.table + row * columns + first : bacon_similarities(b, row, first, count, tile, stride);
      for (std::int64_t r = 0; r < kRowUnit; ++r) {
        weights_row(b, row + r, first, count, values + r * stride, weights + r * kBaconTile);
      }
      for (std::int64_t i = 0; i < kRowUnit; i += kTileRows) {
        combine_tile<T>(
            count, weights + i * kBaconTile, kBaconTile, 1, b.features.units + first * width, width, width,
            grad_units.data + i * width, width);
      }
    }
    for (std::int64_t r = row; r < row + kRowUnit && r < b.rows; ++r) {
      T* grad_unit = grad_units.data + (r - row) * width;
      if (b.pull[r] != 0) {
        const T pull = b.pull[r] * b.center_scale[r];
        const T* center = b.centers + b.classes[r] * b.dim;
        for (std::int64_t d = 0; d < b.dim; ++d) grad_unit[d] += pull * center[d];
      }
      normalize_backward(b.features, r, grad_unit, b.grad + r * b.dim);
    }
  }
}

}  // namespace
}  // namespace bacon_fast::contrastive
