// What a thread block does in BatchNorm on a GPU: residual sum, moments, barrier of all blocks, result; and backward.
// Each way is a first pass over the block's rows, the barrier, and a second pass, for which shared memory keeps what
// fits. The two passes may also be two launches, which keep nothing. Sums are taken in the order of threads, then of
// blocks: the result is the same at every run, in one launch or in two.
//
// A Block offers
//   kThreads                   threads of a block, a multiple of kMostChannels
//   thread(), split(), channel_block(), memory()   which one this is, and the block's shared memory, 16-byte aligned
//   copy(to, from), commit()   begins to copy 16 bytes into shared memory; closes a group of such copies
//   wait(n)                    until all groups but the last n are there, for the thread that asked for them
//   sync(), grid_sync()        barriers of the block, and of all blocks
// tests/ops/batch_norm_blocks.cpp has one of ordinary threads, on a CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "batch_norm/plan.h"

#ifdef __CUDACC__
#define BACON_FAST_DEVICE __device__ __forceinline__
#else
#define BACON_FAST_DEVICE inline
#endif

namespace bacon_fast::norm {

template <class S>
using Accumulator = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S>
struct alignas(kVectorBytes) Vector {
  static constexpr int kSize = kVectorBytes / sizeof(S);
  S values[kSize];
};

constexpr int kCopyGroups = 4;  // the first pass works on a part of the kept rows while the others still arrive

enum Phases { kFirst = 1, kSecond = 2, kBoth = 3 };

// The pointers of a call. All images are [rows, channels], all vectors [channels].
template <class S>
struct Forward {
  using Acc = Accumulator<S>;
  const S *x, *residual;  // residual: or null
  S *sum, *activated;     // sum: null without a residual
  const Acc *weight, *bias;
  Acc *mean, *inverse, *running_mean, *running_var;  // running_*: or null
  int64_t* num_batches_tracked;                      // or null
  Acc momentum, eps, slope;
  Acc* partial;  // [channel_blocks, 2, splits, block_channels]
};

template <class S>
struct Backward {
  using Acc = Accumulator<S>;
  const S *sum, *gradient, *more;  // more: gradient that reaches the sum from elsewhere, or null
  const Acc *weight, *bias, *mean, *inverse;
  Acc slope;
  S* result;
  Acc *grad_weight, *grad_bias;
  Acc* partial;  // as above
};

// One thread's part of its block: vectors of its channels, in every groups-th row.
template <class S, class Block>
class Share {
 public:
  using Acc = Accumulator<S>;
  using V = Vector<S>;

  BACON_FAST_DEVICE Share(const Block& block, const Plan& plan) : block_(block), plan_(plan) {
    const int vectors = plan.block_channels / V::kSize, row = block.thread() / vectors;
    const int64_t begin = block.split() * plan.rows_per_split;
    rows = smaller(plan.rows - begin, plan.rows_per_split);
    channel = int64_t{block.channel_block()} * plan.block_channels + block.thread() % vectors * V::kSize;
    count = channel < plan.channels ? rows_of(row) : 0;
    start_ = (begin + row) * plan.channels + channel;
  }

  int64_t channel;  // the first one of its vectors
  int count;        // of its vectors
  int64_t rows;     // of its block

  BACON_FAST_DEVICE int64_t offset(int k) const { return start_ + k * plan_.groups * plan_.channels; }

  // Vector k of a tensor, from shared memory if it is kept there.
  BACON_FAST_DEVICE V read(int tensor, const S* from, int k) const {
    return k < plan_.held[tensor] ? *kept(tensor, k) : read(from, k);
  }
  BACON_FAST_DEVICE V read(const S* from, int k) const { return *reinterpret_cast<const V*>(from + offset(k)); }
  BACON_FAST_DEVICE void keep(int tensor, int k, const V& value) const {
    if (k < plan_.held[tensor]) *kept(tensor, k) = value;
  }
  BACON_FAST_DEVICE void write(S* to, int k, const V& value) const { *reinterpret_cast<V*>(to + offset(k)) = value; }

  // Begins to fetch what is kept of up to two tensors.
  BACON_FAST_DEVICE void fetch(const S* first, const S* second) const {
    for (int group = 0; group < kCopyGroups; ++group) {
      for (int k = group_end(group - 1); k < group_end(group); ++k) {
        block_.copy(kept(0, k), first + offset(k));
        if (k < plan_.held[1]) block_.copy(kept(1, k), second + offset(k));
      }
      block_.commit();
    }
  }

  // Calls use(k, values) for all its vectors in order, kTensors of each, that load(k, values) has read. The first pass
  // waits for what it has fetched.
  template <int kTensors, bool kFetched, class Load, class Use>
  BACON_FAST_DEVICE void for_each(const Load& load, const Use& use) const {
    constexpr int kAhead = kTensors < 3 ? 3 : 2;  // as many as there are registers for
#pragma unroll 1
    for (int group = 0; group <= (kFetched ? kCopyGroups : 0); ++group) {
      if (kFetched && group < kCopyGroups) block_.wait(kCopyGroups - 1 - group);
      const int end = kFetched && group < kCopyGroups ? group_end(group) : count;
#pragma unroll 1
      for (int k = kFetched ? group_end(group - 1) : 0; k < end; k += kAhead) {
        V values[kAhead][kTensors];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (k + j < end) load(k + j, values[j]);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (k + j < end) use(k + j, values[j]);
        }
      }
    }
  }

  // --- Sums by channel. Of a part, two numbers: (part, channel of the block) -> first(), second(). Parts are the
  // groups of rows of a block, then the blocks of all rows.

  BACON_FAST_DEVICE int block_channel() const { return block_.thread() % plan_.block_channels; }
  BACON_FAST_DEVICE int64_t summed_channel() const {
    return int64_t{block_.channel_block()} * plan_.block_channels + block_channel();
  }
  // Whether this thread writes what is known of its `summed_channel`.
  BACON_FAST_DEVICE bool writes() const {
    return block_.thread() < plan_.block_channels && summed_channel() < plan_.channels;
  }
  BACON_FAST_DEVICE Acc first(int part) const { return scratch()[part * plan_.block_channels + block_channel()]; }
  BACON_FAST_DEVICE Acc second(int part, int parts) const { return first(parts + part); }

  // The thread's own two numbers by channel.
  template <class Values>
  BACON_FAST_DEVICE void give(const Values& first, const Values& second) const {
    const int at = block_.thread() * V::kSize, all = plan_.groups * plan_.block_channels;
    for (int v = 0; v < V::kSize; ++v) {
      scratch()[at + v] = first[v];
      scratch()[all + at + v] = second[v];
    }
    block_.sync();
  }

  // Sum of f(part) over all parts, f being of the thread's `summed_channel`: by lanes, then over the lanes.
  template <class F>
  BACON_FAST_DEVICE Acc sum(int parts, const F& f) const {
    const int lanes = Block::kThreads / plan_.block_channels;
    Acc result = 0;
    for (int part = block_.thread() / plan_.block_channels; part < parts; part += lanes) result += f(part);
    block_.sync();  // all have read what the lanes held before
    *lane(block_.thread()) = result;
    block_.sync();
    result = 0;
    for (int l = 0; l < lanes; ++l) result += *lane(l * plan_.block_channels + block_channel());
    return result;
  }

  // Moments of all parts from mean and squared deviations of each, rows(part) of `all` rows (Chan et al. 1979).
  template <class Rows>
  BACON_FAST_DEVICE void merge(int parts, int64_t all, const Rows& rows, Acc& mean, Acc& squares) const {
    mean = sum(parts, [&](int part) { return rows(part) * first(part); }) / all;
    squares = sum(parts, [&](int part) {
      const Acc deviation = first(part) - mean;
      return second(part, parts) + rows(part) * deviation * deviation;
    });
  }

  // This block's two numbers of each channel, for all blocks; and those of all blocks of rows, into shared memory.
  BACON_FAST_DEVICE void publish(Acc* partial, Acc first, Acc second) const {
    if (block_.thread() >= plan_.block_channels) return;
    Acc* to = of_channels(partial) + block_.split() * plan_.block_channels + block_.thread();
    to[0] = first;
    to[plan_.splits * plan_.block_channels] = second;
  }
  BACON_FAST_DEVICE void collect(const Acc* partial) const {
    constexpr int kEach = kVectorBytes / sizeof(Acc);
    const Acc* from = of_channels(partial);
    for (int i = block_.thread(); i < 2 * plan_.splits * plan_.block_channels / kEach; i += Block::kThreads) {
      block_.copy(scratch() + i * kEach, from + i * kEach);
    }
    block_.commit();
    block_.wait(0);
    block_.sync();
  }

  BACON_FAST_DEVICE int rows_of(int group) const {
    return group < rows ? static_cast<int>((rows - group + plan_.groups - 1) / plan_.groups) : 0;
  }
  BACON_FAST_DEVICE int rows_of_split(int split) const {
    return static_cast<int>(smaller(plan_.rows - split * plan_.rows_per_split, plan_.rows_per_split));
  }

  // Hands a value of each `summed_channel` on to the threads whose vectors are of it. `sync` comes between.
  BACON_FAST_DEVICE void set(int index, Acc value) const {
    if (block_.thread() < plan_.block_channels) vector(index)[block_.thread()] = value;
  }
  BACON_FAST_DEVICE void get(int index, Acc* values) const {
    const Acc* from = vector(index) + channel % plan_.block_channels;
    for (int v = 0; v < V::kSize; ++v) values[v] = from[v];
  }

 private:
  static BACON_FAST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  BACON_FAST_DEVICE V* kept(int tensor, int k) const {
    return static_cast<V*>(block_.memory()) + int64_t{tensor * plan_.held[0] + k} * Block::kThreads + block_.thread();
  }
  // Behind what is kept: numbers of the parts, of the lanes, and by channel.
  BACON_FAST_DEVICE Acc* scratch() const {
    return reinterpret_cast<Acc*>(kept(0, plan_.held[0] + plan_.held[1]) - block_.thread());
  }
  BACON_FAST_DEVICE Acc* lane(int index) const {
    const int parts = plan_.groups > plan_.splits ? plan_.groups : plan_.splits;
    return scratch() + 2 * parts * plan_.block_channels + index;
  }
  BACON_FAST_DEVICE Acc* vector(int index) const {
    return lane(Block::kThreads) + index * plan_.block_channels;
  }
  BACON_FAST_DEVICE int group_end(int group) const {
    const int held = static_cast<int>(smaller(count, plan_.held[0])), each = (held + kCopyGroups - 1) / kCopyGroups;
    return static_cast<int>(smaller((group + 1) * each, held));
  }
  template <class T>
  BACON_FAST_DEVICE T* of_channels(T* partial) const {
    return partial + int64_t{block_.channel_block()} * 2 * plan_.splits * plan_.block_channels;
  }

  const Block& block_;
  const Plan& plan_;
  int64_t start_;
};

// The normalized value before the LeakyReLU; one operation for both ways, so that both see the same side.
template <class Acc>
BACON_FAST_DEVICE Acc normalize(Acc deviation, Acc scale, Acc bias) {
  if constexpr (std::is_same_v<Acc, double>) {
    return ::fma(deviation, scale, bias);
  } else {
    return ::fmaf(deviation, scale, bias);
  }
}

template <class S, class Block>
BACON_FAST_DEVICE void forward_block(const Block& block, const Plan& plan, const Forward<S>& a, int phases) {
  using Acc = Accumulator<S>;
  constexpr int kSize = Vector<S>::kSize;
  const Share<S, Block> share(block, plan);
  const auto value_at = [&](int64_t at) {
    const Acc value = static_cast<Acc>(a.x[at]);
    return a.residual == nullptr ? value : static_cast<Acc>(static_cast<S>(value + static_cast<Acc>(a.residual[at])));
  };
  if (phases & kFirst) {
    share.fetch(a.x, nullptr);
    // Sums of values far from zero would lose their small differences: means are taken relative to row 0, and values
    // relative to the thread's first row.
    Acc origin[kSize], first[kSize], mean[kSize] = {}, squares[kSize] = {};
    for (int v = 0; v < kSize && share.count > 0; ++v) {
      origin[v] = value_at(share.channel + v);
      first[v] = value_at(share.offset(0) + v);
    }
    share.template for_each<2, true>(
        [&](int k, Vector<S>* values) {
          values[0] = share.read(0, a.x, k);
          if (a.residual != nullptr) values[1] = share.read(a.residual, k);
        },
        [&](int k, Vector<S>* values) {
          if (a.residual != nullptr) {
#pragma unroll
            for (int v = 0; v < kSize; ++v) {
              S& value = values[0].values[v];
              value = static_cast<S>(static_cast<Acc>(value) + static_cast<Acc>(values[1].values[v]));
            }
            share.write(a.sum, k, values[0]);
            share.keep(0, k, values[0]);
          }
#pragma unroll
          for (int v = 0; v < kSize; ++v) {
            const Acc deviation = static_cast<Acc>(values[0].values[v]) - first[v];
            mean[v] += deviation;
            squares[v] += deviation * deviation;
          }
        });
    for (int v = 0; v < kSize && share.count > 0; ++v) {
      const Acc sum = mean[v], deviation = sum / share.count, rest = squares[v] - sum * deviation;
      mean[v] = first[v] - origin[v] + deviation;
      squares[v] = rest > 0 ? rest : Acc(0);
    }
    share.give(mean, squares);
    Acc of_block, squares_of_block;
    share.merge(plan.groups, share.rows, [&](int part) { return share.rows_of(part); }, of_block, squares_of_block);
    share.publish(a.partial, of_block, squares_of_block);
  }
  if (phases == kBoth) block.grid_sync();
  if (phases & kSecond) {
    share.collect(a.partial);
    Acc mean, squares;
    share.merge(plan.splits, plan.rows, [&](int part) { return share.rows_of_split(part); }, mean, squares);
    const int64_t channel = share.summed_channel();
    if (share.writes()) {
      mean += value_at(channel);
      const Acc inverse = 1 / std::sqrt(squares / plan.rows + a.eps);
      share.set(0, mean);
      share.set(1, a.weight[channel] * inverse);
      share.set(2, a.bias[channel]);
      if (block.split() == 0) {
        a.mean[channel] = mean;
        a.inverse[channel] = inverse;
        if (a.running_mean != nullptr) {
          a.running_mean[channel] += a.momentum * (mean - a.running_mean[channel]);
          a.running_var[channel] += a.momentum * (squares / (plan.rows - 1) - a.running_var[channel]);
        }
        if (a.num_batches_tracked != nullptr && channel == 0) ++*a.num_batches_tracked;
      }
    }
    block.sync();
    Acc means[kSize], scales[kSize], biases[kSize];
    share.get(0, means);
    share.get(1, scales);
    share.get(2, biases);
    const S* normalized = a.residual == nullptr ? a.x : a.sum;
    share.template for_each<1, false>(
        [&](int k, Vector<S>* values) { values[0] = share.read(0, normalized, k); },
        [&](int k, Vector<S>* values) {
#pragma unroll
          for (int v = 0; v < kSize; ++v) {
            const Acc z = normalize(static_cast<Acc>(values[0].values[v]) - means[v], scales[v], biases[v]);
            values[0].values[v] = static_cast<S>(z > 0 ? z : z * a.slope);
          }
          share.write(a.activated, k, values[0]);
        });
  }
}

template <class S, class Block>
BACON_FAST_DEVICE void backward_block(const Block& block, const Plan& plan, const Backward<S>& a, int phases) {
  using Acc = Accumulator<S>;
  constexpr int kSize = Vector<S>::kSize;
  const Share<S, Block> share(block, plan);
  if (phases & kFirst) share.fetch(a.sum, a.gradient);
  Acc means[kSize], scales[kSize], biases[kSize];
  for (int v = 0; v < kSize && share.count > 0; ++v) {
    const int64_t channel = share.channel + v;
    means[v] = a.mean[channel];
    scales[v] = a.weight[channel] * a.inverse[channel];
    biases[v] = a.bias[channel];
  }
  const auto load = [&](int k, Vector<S>* values) {
    values[0] = share.read(0, a.sum, k);
    values[1] = share.read(1, a.gradient, k);
  };
  // Deviation from the mean, and the gradient before the LeakyReLU.
  const auto before = [&](const Vector<S>* values, int v, Acc& deviation, Acc& gradient) {
    deviation = static_cast<Acc>(values[0].values[v]) - means[v];
    gradient = static_cast<Acc>(values[1].values[v]);
    if (!(normalize(deviation, scales[v], biases[v]) > 0)) gradient *= a.slope;
  };
  if (phases & kFirst) {
    Acc plain[kSize] = {}, along[kSize] = {};
    share.template for_each<2, true>(load, [&](int, Vector<S>* values) {
#pragma unroll
      for (int v = 0; v < kSize; ++v) {
        Acc deviation, gradient;
        before(values, v, deviation, gradient);
        plain[v] += gradient;
        along[v] += gradient * deviation;
      }
    });
    share.give(plain, along);
    const Acc plain_of_block = share.sum(plan.groups, [&](int part) { return share.first(part); });
    const Acc along_of_block = share.sum(plan.groups, [&](int part) { return share.second(part, plan.groups); });
    share.publish(a.partial, plain_of_block, along_of_block);
  }
  if (phases == kBoth) block.grid_sync();
  if (phases & kSecond) {
    share.collect(a.partial);
    const Acc plain = share.sum(plan.splits, [&](int part) { return share.first(part); });
    const Acc along = share.sum(plan.splits, [&](int part) { return share.second(part, plan.splits); });
    if (share.writes()) {
      const int64_t channel = share.summed_channel();
      const Acc inverse = a.inverse[channel], scale = a.weight[channel] * inverse / plan.rows;
      share.set(3, scale * plain);
      share.set(4, scale * along * inverse * inverse);
      if (block.split() == 0) {
        a.grad_bias[channel] = plain;
        a.grad_weight[channel] = along * inverse;
      }
    }
    block.sync();
    Acc offsets[kSize], tilts[kSize];
    share.get(3, offsets);
    share.get(4, tilts);
    share.template for_each<3, false>(
        [&](int k, Vector<S>* values) {
          load(k, values);
          if (a.more != nullptr) values[2] = share.read(a.more, k);
        },
        [&](int k, Vector<S>* values) {
#pragma unroll
          for (int v = 0; v < kSize; ++v) {
            Acc deviation, gradient;
            before(values, v, deviation, gradient);
            gradient = scales[v] * gradient - offsets[v] - tilts[v] * deviation;
            if (a.more != nullptr) gradient += static_cast<Acc>(values[2].values[v]);
            values[0].values[v] = static_cast<S>(gradient);
          }
          share.write(a.result, k, values[0]);
        });
  }
}

}  // namespace bacon_fast::norm
