// Checks and layouts that the CPU and the CUDA op share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/ArrayRef.h>

#include "augment/view.h"

namespace bacon_fast::augment {

constexpr int64_t kMaxPixels = 1 << 24;

inline void check_images(const char* name, const at::Tensor& images) {
  TORCH_CHECK_TYPE(images.scalar_type() == at::kByte, name, ": expected uint8, found ", images.scalar_type());
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(3) == 3 && images.is_contiguous(), name,
                    ": expected contiguous [N, H, W, 3], found ", images.sizes());
  // The sum of the grays of an image fits into 32 bits.
  TORCH_CHECK_VALUE(images.size(1) > 0 && images.size(2) > 0 && images.size(1) <= kMaxPixels / images.size(2), name,
                    ": expected 1 to 2^24 pixels an image, found ", images.sizes());
}

// Number of rows of the output. Checks what the schema does not.
inline int64_t check_views(const at::Tensor& pool, at::TensorList indices, c10::IntArrayRef streams,
                           c10::IntArrayRef strong, c10::IntArrayRef first_slots, const at::Tensor& step,
                           const at::Tensor& table, const at::Tensor& ranges, int64_t padding, int64_t num_ops,
                           int64_t height, int64_t width) {
  check_images("pool", pool);
  TORCH_CHECK_VALUE(
      streams.size() == indices.size() && strong.size() == indices.size() && first_slots.size() == indices.size(),
      "streams, strong, first_slots: expected one of each per index tensor, ", indices.size());
  TORCH_CHECK_VALUE(padding >= 0 && padding < pool.size(1) && padding < pool.size(2), "padding: expected 0 to ",
                    std::min(pool.size(1), pool.size(2)) - 1, ", found ", padding);
  TORCH_CHECK_VALUE(num_ops >= 0 && num_ops < (1 << 30), "num_ops: expected 0 to 2^30 - 1, found ", num_ops);
  const int64_t highest = pool.size(1) + 2 * padding, widest = pool.size(2) + 2 * padding;
  TORCH_CHECK_VALUE(height > 0 && width > 0 && height <= highest && width <= widest && height <= kMaxPixels / width,
                    "height, width: expected 1 to ", highest, " and ", widest, ", and up to 2^24 pixels, found ", height,
                    " and ", width);
  const auto check = [&](const char* name, const at::Tensor& tensor, at::ScalarType dtype, c10::IntArrayRef shape) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, ": expected ", dtype, ", found ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.sizes() == shape && tensor.is_contiguous() && tensor.device() == pool.device(), name,
                      ": expected contiguous ", shape, " on ", pool.device(), ", found ", tensor.sizes(), " on ",
                      tensor.device());
  };
  check("step", step, at::kLong, {});
  check("table", table, at::kFloat, {3, kLevels});
  check("ranges", ranges, at::kDouble, {3, kNumOps});
  int64_t rows = 0;
  for (const at::Tensor& of_request : indices) {
    check("indices", of_request, at::kLong, {of_request.numel()});
    rows += of_request.numel();
  }
  return rows;
}

inline at::Tensor empty_views(const at::Tensor& pool, int64_t rows, const Settings& settings, at::ScalarType dtype,
                              bool channels_last) {
  return at::empty({rows, 3, settings.height, settings.width}, pool.options().dtype(dtype),
                   channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

inline Settings make_settings(const at::Tensor& pool, const at::Tensor& ranges, int64_t seed, int64_t padding,
                              bool hflip, int64_t num_ops, bool cutout, int64_t height, int64_t width,
                              bool resized_crop) {
  return {.source_height = static_cast<int>(pool.size(1)),
          .source_width = static_cast<int>(pool.size(2)),
          .height = static_cast<int>(height),
          .width = static_cast<int>(width),
          .padding = static_cast<int>(padding),
          .num_ops = static_cast<int>(num_ops),
          .hflip = hflip,
          .cutout = cutout,
          .resized_crop = resized_crop,
          .seed = static_cast<uint64_t>(seed),
          .ranges = ranges.const_data_ptr<double>()};
}

inline void check_ops(const at::Tensor& images, const at::Tensor& ops, const at::Tensor& magnitudes) {
  check_images("images", images);
  TORCH_CHECK_VALUE(ops.scalar_type() == at::kLong && magnitudes.scalar_type() == at::kDouble && ops.dim() == 2 &&
                        ops.size(0) == images.size(0) && ops.sizes() == magnitudes.sizes() && ops.is_contiguous() &&
                        magnitudes.is_contiguous() && ops.device() == images.device() &&
                        magnitudes.device() == images.device(),
                    "ops, magnitudes: expected contiguous int64 and float64 [N, S] on ", images.device());
}

}  // namespace bacon_fast::augment
