// Random words of counters on a CPU.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "philox/words.h"
#include "register.h"

namespace bacon_fast::random {
namespace {

constexpr int64_t kGrain = 4096;  // blocks a thread is worth waking for

at::Tensor words(int64_t seed, const at::Tensor& step, int64_t stream, const at::Tensor& slots, int64_t count) {
  const at::Tensor slots_c = slots.contiguous();
  at::Tensor out = empty_words(slots, count);
  const Draw draw = draw_of(seed, step, stream);
  const int64_t* slot = slots_c.const_data_ptr<int64_t>();
  int64_t* word = out.mutable_data_ptr<int64_t>();
  const int64_t blocks = blocks_of(count);
  at::parallel_for(0, slots.size(0) * blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) draw.write_block(slot, word, count, i / blocks, i % blocks);
  });
  return out;
}

at::Tensor sort_keys(int64_t seed, const at::Tensor& step, int64_t stream, int64_t count) {
  at::Tensor out = empty_keys(step, count);
  const Draw draw = draw_of(seed, step, stream);
  int64_t* key = out.mutable_data_ptr<int64_t>();
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) key[i] = draw.sort_key(i);
  });
  return out;
}

}  // namespace

BACON_FAST_IMPL(CPU, m) {
  m.impl("philox", words);
  m.impl("philox_sort_keys", sort_keys);
}

}  // namespace bacon_fast::random
