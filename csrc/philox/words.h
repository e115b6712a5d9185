// What the CPU and the CUDA op share: the words of a slot, and its key for a random order.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "philox.h"

namespace bacon_fast::random {

// Draws of one (seed, step, stream). The step is read where the draw is made, never by a GPU's host.
struct Draw {
  uint64_t seed;
  const int64_t* step;
  uint32_t stream;

  BACON_FAST_HOST_DEVICE PhiloxWords block(int64_t slot, int64_t index) const {
    return philox(seed, static_cast<uint32_t>(*step), stream, static_cast<uint32_t>(slot),
                  static_cast<uint32_t>(index));
  }

  // Words 4 * index to 4 * index + 3, those of them below `count`, of slot number `row`.
  BACON_FAST_HOST_DEVICE void write_block(const int64_t* slots, int64_t* words, int64_t count, int64_t row,
                                          int64_t index) const {
    const PhiloxWords drawn = block(slots[row], index);
    for (int64_t w = 4 * index, i = 0; i < 4 && w < count; ++w, ++i) words[row * count + w] = drawn.word[i];
  }

  // 63 bits of the first two words.
  BACON_FAST_HOST_DEVICE int64_t sort_key(int64_t slot) const {
    const PhiloxWords drawn = block(slot, 0);
    return (static_cast<int64_t>(drawn.word[0]) << 31) | (drawn.word[1] >> 1);
  }
};

inline Draw draw_of(int64_t seed, const at::Tensor& step, int64_t stream) {
  TORCH_CHECK_TYPE(step.scalar_type() == at::kLong && step.dim() == 0, "step: expected a 0-d int64 tensor, found ",
                   step.scalar_type(), " ", step.sizes());
  return {static_cast<uint64_t>(seed), step.const_data_ptr<int64_t>(), static_cast<uint32_t>(stream)};
}

inline int64_t blocks_of(int64_t count) { return (count + 3) / 4; }

inline at::Tensor empty_words(const at::Tensor& slots, int64_t count) {
  TORCH_CHECK_TYPE(slots.scalar_type() == at::kLong && slots.dim() == 1, "slots: expected int64 [N], found ",
                   slots.scalar_type(), " ", slots.sizes());
  return at::empty({slots.size(0), count}, slots.options());
}

inline at::Tensor empty_keys(const at::Tensor& step, int64_t count) { return at::empty({count}, step.options()); }

}  // namespace bacon_fast::random
