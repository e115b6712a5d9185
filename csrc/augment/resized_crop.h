// A random part of an image, resized: torchvision's RandomResizedCrop with Pillow's bilinear filter, bit for bit. Read
// beside it the same arithmetic in PyTorch: bacon_fast/reference/resized_crop.py.
#pragma once

#include "augment/pixel_ops.h"

#define BACON_FAST_INLINE BACON_FAST_HOST_DEVICE inline

namespace bacon_fast::augment {

constexpr int kAttempts = 10;
constexpr int kWeightBits = 22;  // behind the point: 32 less 8 of a level less 2

// The part of an image that becomes a view.
struct Part {
  int top, left, height, width;
};

// exp of |t| < 0.3 as a polynomial: the exp of a CPU's and of a GPU's library differ in their last bits.
BACON_FAST_INLINE double exp_near_zero(double t) {
  constexpr double terms[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                              1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,
                              1.0 / 2,         1.0,            1.0};
  double result = terms[0];
  for (int n = 1; n < 13; ++n) result = add(multiply(result, t), terms[n]);
  return result;
}

// The first of ten draws that fits into an image of height x width; if none does, the largest part in the middle with a
// ratio of 3/4 to 4/3. words(attempt) gives two words, one of the area and one of the ratio.
template <class Words>
BACON_FAST_INLINE Part draw_part(int height, int width, uint32_t top_word, uint32_t left_word, const Words& words) {
  constexpr double log_ratio = 0.28768207245178085;  // of 4/3
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    uint32_t area_word, ratio_word;
    words(attempt, &area_word, &ratio_word);
    const double area = multiply(static_cast<double>(int64_t{height} * width),
                                 add(0.08, multiply(1.0 - 0.08, to_uniform(area_word))));
    const double ratio = exp_near_zero(add(-log_ratio, multiply(2 * log_ratio, to_uniform(ratio_word))));
    const double w = rint(sqrt(multiply(area, ratio))), h = rint(sqrt(area / ratio));
    if (w > 0 && w <= width && h > 0 && h <= height) {
      const int rows = static_cast<int>(h), columns = static_cast<int>(w);
      return {to_range(top_word, height - rows + 1), to_range(left_word, width - columns + 1), rows, columns};
    }
  }
  const double ratio = static_cast<double>(width) / height;
  const int h = ratio < 3.0 / 4.0 ? static_cast<int>(rint(width / (3.0 / 4.0))) : height;
  const int w = ratio > 4.0 / 3.0 ? static_cast<int>(rint(height * (4.0 / 3.0))) : width;
  return {(height - h) / 2, (width - w) / 2, h, w};
}

// Most pixels that a pixel is a mean of, when `from` pixels become `to`.
BACON_FAST_INLINE int most_taps(int from, int to) { return from <= to ? 3 : 2 * ((from + to - 1) / to) + 1; }

// Weights along one side, in memory for `to` times (2 + most_taps(from, to)) integers: of each new pixel the first old
// one, how many, and their weights in units of 2^-22.
class Taps {
 public:
  BACON_FAST_HOST_DEVICE Taps(int* memory, int from, int to) : memory_(memory), stride_(2 + most_taps(from, to)) {}

  BACON_FAST_HOST_DEVICE int* of(int i) const { return memory_ + static_cast<int64_t>(i) * stride_; }

 private:
  int* memory_;
  int stride_;
};

// The triangle around each new pixel's center, in the order of Pillow's sums.
template <class Team>
BACON_FAST_INLINE void compute_taps(const Team& team, const Taps& taps, int from, int to) {
  const double scale = static_cast<double>(from) / to, support = scale < 1.0 ? 1.0 : scale, slope = 1.0 / support;
  team.for_each(to, [&](int i) {
    const double center = multiply(add(i, 0.5), scale);
    const double low = add(add(center, -support), 0.5);
    const int first = low < 0 ? 0 : static_cast<int>(low);
    const int last = static_cast<int>(add(add(center, support), 0.5)), end = last < from ? last : from;
    const auto weight = [&](int k) {
      const double distance = fabs(multiply(add(add(first + k, -center), 0.5), slope));
      return distance < 1.0 ? add(1.0, -distance) : 0.0;
    };
    double total = 0;
    for (int k = 0; k < end - first; ++k) total = add(total, weight(k));
    int* out = taps.of(i);
    out[0] = first;
    out[1] = end - first;
    for (int k = 0; k < end - first; ++k) {
      out[2 + k] = static_cast<int>(add(0.5, multiply(weight(k) / total, 1 << kWeightBits)));
    }
  });
}

// The weighted sum of pixels, rounded to a level. Weights are positive and sum to 2^22 but for rounding, so the sums of
// two channels fit into the halves of a word.
template <class Read>
BACON_FAST_INLINE Pixel weighted(const int* taps, const Read& read) {
  const int count = taps[1];
  const int* weights = taps + 2;
  constexpr uint64_t half = 1u << (kWeightBits - 1);
  uint64_t red_blue = half << 32 | half;
  uint32_t green = half;
#if defined(__CUDA_ARCH__)
#pragma unroll 1  // two or three taps as a rule
#endif
  for (int k = 0; k < count; ++k) {
    const Pixel p = read(taps[0] + k);
    const uint32_t weight = weights[k];
    red_blue += (uint64_t{p & 0xFF0000} << 16 | (p & 255)) * weight;
    green += (p >> 8 & 255) * weight;
  }
  const auto rounded = [](uint32_t sum) { return static_cast<int>(sum >> kWeightBits); };
  const auto low = [](int value) { return value < 255 ? value : 255; };
  return pack(low(rounded(static_cast<uint32_t>(red_blue))), low(rounded(green)),
              low(rounded(static_cast<uint32_t>(red_blue >> 32))));
}

// The part of an image uint8 [.., source_width, 3] as height x width pixels, flipped or not. Pillow rounds after each
// pass, and goes along the columns first where that shortens the image much.
//   between  memory for the pixels between the passes
//   memory   for `Taps` of each side in turn
template <class Team>
BACON_FAST_INLINE void crop_resized(const Team& team, const uint8_t* image, int source_width, const Part& part,
                                    bool flip, int height, int width, int* memory, Pixel* between, Pixel* out) {
  const Taps rows(memory, part.height, height), columns(memory, part.width, width);
  const uint8_t* corner = image + 3 * (row_start(part.top, source_width) + part.left);
  const auto source = [&](int y, int x) {
    const uint8_t* p = corner + 3 * (row_start(y, source_width) + x);
    return pack(p[0], p[1], p[2]);
  };
  const auto place = [&](int y, int x) { return row_start(y, width) + (flip ? width - 1 - x : x); };
  if (part.height > height && part.height - height > 2 * (part.width - width)) {
    compute_taps(team, rows, part.height, height);
    team.for_pixels(height, part.width, [&](int y, int x) {
      between[row_start(y, part.width) + x] = weighted(rows.of(y), [&](int k) { return source(k, x); });
    });
    compute_taps(team, columns, part.width, width);
    team.for_pixels(height, width, [&](int y, int x) {
      const Pixel* row = between + row_start(y, part.width);
      out[place(y, x)] = weighted(columns.of(x), [&](int k) { return row[k]; });
    });
  } else {
    compute_taps(team, columns, part.width, width);
    team.for_pixels(part.height, width, [&](int y, int x) {
      between[row_start(y, width) + x] = weighted(columns.of(x), [&](int k) { return source(y, k); });
    });
    compute_taps(team, rows, part.height, height);
    team.for_pixels(height, width, [&](int y, int x) {
      out[place(y, x)] = weighted(rows.of(y), [&](int k) { return between[row_start(k, width) + x]; });
    });
  }
}

}  // namespace bacon_fast::augment

#undef BACON_FAST_INLINE
