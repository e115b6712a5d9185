// Augmentation on a CPU: one thread makes a whole view, in its own cache.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")  // pixel_ops.h: no fused multiply-adds, on processors that have them by default
#else
#pragma STDC FP_CONTRACT OFF
#endif

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "augment/arguments.h"
#include "augment/thread.h"
#include "register.h"

namespace bacon_fast::augment {
namespace {

// A view of 32x32 costs about 10 microseconds, a task of a thread pool about as much.
constexpr int64_t kViewsPerTask = 8;

// Memory that one thread works in.
struct Workspace {
  explicit Workspace(const Sizes& sizes) : pixels(sizes.all()), memory(pixels.data(), sizes) {}

  std::vector<Pixel> pixels;
  Memory memory;
  Scratch scratch;
};

template <class Value>
void make_views(const at::Tensor& pool, at::TensorList indices, c10::IntArrayRef streams, c10::IntArrayRef strong,
                c10::IntArrayRef first_slots, uint32_t step, const Settings& settings, const Value* table,
                bool channels_last, Value* out) {
  const uint8_t* images = pool.const_data_ptr<uint8_t>();
  const int64_t source_pixels = int64_t{settings.source_height} * settings.source_width;
  const int64_t pixels = int64_t{settings.height} * settings.width;
  const Sizes sizes = sizes_of(settings);
  for (size_t r = 0; r < indices.size(); ++r) {
    const int64_t* index = indices[r].const_data_ptr<int64_t>();
    const int64_t rows = indices[r].numel();
    at::parallel_for(0, rows, kViewsPerTask, [&](int64_t begin, int64_t end) {
      Workspace w(sizes);
      for (int64_t i = begin; i < end; ++i) {
        const Counter counter{settings.seed, step, static_cast<uint32_t>(streams[r]),
                              static_cast<uint32_t>(first_slots[r] + i)};
        make_view(Thread(), w.scratch, settings, counter, strong[r] != 0, images + 3 * source_pixels * index[i],
                  w.memory, table, channels_last, out + 3 * pixels * i);
      }
    });
    out += 3 * pixels * rows;
  }
}

at::Tensor augment_views(const at::Tensor& pool, at::TensorList indices, c10::IntArrayRef streams,
                         c10::IntArrayRef strong, c10::IntArrayRef first_slots, int64_t seed, const at::Tensor& step,
                         const at::Tensor& table, const at::Tensor& ranges, int64_t padding, bool hflip,
                         int64_t num_ops, bool cutout, int64_t height, int64_t width, bool resized_crop,
                         at::ScalarType dtype, bool channels_last) {
  const int64_t rows =
      check_views(pool, indices, streams, strong, first_slots, step, table, ranges, padding, num_ops, height, width);
  for (const at::Tensor& of_request : indices) {
    const int64_t* index = of_request.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < of_request.numel(); ++i) {
      TORCH_CHECK_INDEX(index[i] >= 0 && index[i] < pool.size(0), "indices: expected values in 0..", pool.size(0) - 1,
                        ", found ", index[i]);
    }
  }
  const Settings settings =
      make_settings(pool, ranges, seed, padding, hflip, num_ops, cutout, height, width, resized_crop);
  const uint32_t step_value = static_cast<uint32_t>(*step.const_data_ptr<int64_t>());
  const at::Tensor values = table.to(dtype);
  at::Tensor out = empty_views(pool, rows, settings, dtype, channels_last);
  AT_DISPATCH_SWITCH(dtype, "augment_views", AT_DISPATCH_CASE_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, [&] {
    make_views(pool, indices, streams, strong, first_slots, step_value, settings, values.const_data_ptr<scalar_t>(),
               channels_last, out.mutable_data_ptr<scalar_t>());
  }));
  return out;
}

at::Tensor augment_ops(const at::Tensor& images, const at::Tensor& ops, const at::Tensor& magnitudes) {
  check_ops(images, ops, magnitudes);
  const int height = images.size(1), width = images.size(2), pixels = height * width;
  const int64_t chain = ops.size(1);
  const uint8_t* in = images.const_data_ptr<uint8_t>();
  const int64_t* op = ops.const_data_ptr<int64_t>();
  const double* magnitude = magnitudes.const_data_ptr<double>();
  for (int64_t i = 0; i < ops.numel(); ++i) {
    TORCH_CHECK_INDEX(op[i] >= 0 && op[i] < kNumOps, "ops: expected values in 0..", kNumOps - 1, ", found ", op[i]);
  }
  at::Tensor result = at::empty(images.sizes(), images.options());
  uint8_t* out = result.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, images.size(0), kViewsPerTask, [&](int64_t begin, int64_t end) {
    Workspace w({pixels, pixels, 0});
    for (int64_t i = begin; i < end; ++i) {
      apply_chain(Thread(), w.scratch, op + i * chain, magnitude + i * chain, chain, in + 3 * pixels * i,
                  w.memory, height, width, out + 3 * pixels * i);
    }
  });
  return result;
}

BACON_FAST_IMPL(CPU, m) {
  m.impl("augment_views", augment_views);
  m.impl("augment_ops", augment_ops);
}

}  // namespace
}  // namespace bacon_fast::augment
