// Nesterov SGD and the moving average of one chunk of elements: one definition for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define BACON_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BACON_FAST_HOST_DEVICE inline
#endif

namespace bacon_fast::optim {

// Elements of a piece of work; on a GPU, of a thread block's.
constexpr int64_t kChunk = 4096;
// Tensors of one launch. Their description travels with the kernel's arguments, which may take 32,764 bytes.
constexpr int kMaxEntries = 512;

// One tensor. All pointers are to elements in the same order.
struct Entry {
  void* parameter;
  const void* gradient;  // null: the parameter is not trained in this step
  void* momentum;
  void* average;  // null: there is none
  int64_t numel;
  double weight_decay;
  bool copies;  // `numel` bytes are copied from `parameter` to `average`, of whatever type
};

struct Plan {
  Entry entries[kMaxEntries];
  int32_t first_chunk[kMaxEntries + 1];
  int count = 0;

  BACON_FAST_HOST_DEVICE int32_t chunks() const { return first_chunk[count]; }

  // The entry that a chunk belongs to: the last one whose first chunk is not beyond it.
  BACON_FAST_HOST_DEVICE int entry_of(int32_t chunk) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_chunk[middle] <= chunk ? low : high) = middle;
    }
    return low;
  }
};

// Numbers of a step. The pointers are read where the update runs, so that a captured graph sees new values.
struct Settings {
  const float* rate;
  const float* scale;      // of the gradients, or null
  const float* found_inf;  // not 0: a gradient overflowed and nothing is trained; or null
  double momentum;
  double average_weight;  // of the new value
};

static_assert(sizeof(Plan) + sizeof(Settings) <= 32764, "all of it is a kernel's argument");

// Half precision is computed in float.
template <class Scalar>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// As torch.lerp: exact at weights 0 and 1.
template <class Acc>
BACON_FAST_HOST_DEVICE Acc lerp(Acc from, Acc to, Acc weight) {
  return weight < Acc(0.5) ? from + weight * (to - from) : to - (to - from) * (Acc(1) - weight);
}

// Updates elements begin, begin + stride, ... below end, with the arithmetic of torch.optim.SGD(nesterov=True).
template <class Scalar, bool kTrains, bool kAverages>
BACON_FAST_HOST_DEVICE void update_range(const Entry& entry, const Settings& settings, int64_t begin, int64_t end,
                                         int64_t stride) {
  using Acc = typename Accumulator<Scalar>::type;
  Scalar* const __restrict__ parameter = static_cast<Scalar*>(entry.parameter);
  const Scalar* const __restrict__ gradient = static_cast<const Scalar*>(entry.gradient);
  Scalar* const __restrict__ momentum = static_cast<Scalar*>(entry.momentum);
  Scalar* const __restrict__ average = static_cast<Scalar*>(entry.average);
  const Acc decay = static_cast<Acc>(entry.weight_decay), kept = static_cast<Acc>(settings.momentum);
  const Acc weight = static_cast<Acc>(settings.average_weight);
  const Acc rate = kTrains ? static_cast<Acc>(*settings.rate) : Acc(0);
  const Acc unscale = kTrains && settings.scale != nullptr ? Acc(1) / static_cast<Acc>(*settings.scale) : Acc(1);
#ifdef __CUDA_ARCH__
#pragma unroll 4
#endif
  for (int64_t i = begin; i < end; i += stride) {
    Acc value = static_cast<Acc>(parameter[i]);
    if constexpr (kTrains) {
      const Acc slope = static_cast<Acc>(gradient[i]) * unscale + decay * value;
      const Acc velocity = kept * static_cast<Acc>(momentum[i]) + slope;
      momentum[i] = static_cast<Scalar>(velocity);
      parameter[i] = static_cast<Scalar>(value - rate * (slope + kept * velocity));
      value = static_cast<Acc>(parameter[i]);
    }
    if constexpr (kAverages) average[i] = static_cast<Scalar>(lerp(static_cast<Acc>(average[i]), value, weight));
  }
}

template <class Word>
BACON_FAST_HOST_DEVICE void copy_range(const Entry& entry, int64_t begin, int64_t end, int64_t stride) {
  const Word* const __restrict__ from = static_cast<const Word*>(entry.parameter);
  Word* const __restrict__ to = static_cast<Word*>(entry.average);
  for (int64_t i = begin; i < end; i += stride) to[i] = from[i];
}

// The work of thread `thread` of `threads` for a chunk.
template <class Scalar>
BACON_FAST_HOST_DEVICE void update_chunk(const Plan& plan, const Settings& settings, int32_t chunk, int64_t thread,
                                         int64_t threads) {
  const int index = plan.entry_of(chunk);
  const Entry& entry = plan.entries[index];
  const int64_t first = (chunk - plan.first_chunk[index]) * kChunk;
  const int64_t end = first + kChunk < entry.numel ? first + kChunk : entry.numel, begin = first + thread;
  if (entry.copies) return copy_range<uint8_t>(entry, begin, end, threads);
  const bool overflow = settings.found_inf != nullptr && *settings.found_inf != 0.0f;
  if (entry.gradient != nullptr && !overflow) {
    if (entry.average != nullptr) return update_range<Scalar, true, true>(entry, settings, begin, end, threads);
    return update_range<Scalar, true, false>(entry, settings, begin, end, threads);
  }
  if (entry.average != nullptr) update_range<Scalar, false, true>(entry, settings, begin, end, threads);
}

}  // namespace bacon_fast::optim
