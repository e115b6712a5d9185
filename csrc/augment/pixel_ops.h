// The 14 RandAugment operations, bit for bit as Pillow 13 computes them, defined once for host and device. Read beside
// them the same arithmetic in PyTorch: bacon_fast/reference/pixel_ops.py.
//
// An operation runs on one image held in fast memory. A Team does the work: one thread of a CPU (thread.h) or one thread
// block of a GPU (block.h). It offers
//   for_each(n, f)            f(i) for i in 0..n-1
//   for_pixels(h, w, f)       f(y, x) for all positions
//   sum(n, f)                 sum of f(i), an unsigned number known to all
//   increment(p)              ++*p, from several threads at once
//   find_levels(s)            first and last level in use of each channel's histogram
//   accumulate(s)             each histogram replaced by its exclusive prefix sum
// and all but `increment` end with a barrier.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

namespace bacon_fast::augment {

#define BACON_FAST_INLINE BACON_FAST_HOST_DEVICE inline

// A loop over pixels vectorizes only when all that it calls is inlined.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define BACON_FAST_INLINE_ALL [[gnu::noinline, gnu::flatten]] inline
#else
#define BACON_FAST_INLINE_ALL BACON_FAST_HOST_DEVICE inline
#endif

enum Op : int {  // bacon_fast.reference.augment.OPS
  kAutocontrast,
  kBrightness,
  kColor,
  kContrast,
  kEqualize,
  kIdentity,
  kPosterize,
  kSharpness,
  kShearX,
  kShearY,
  kSolarize,
  kTranslateX,
  kTranslateY,
  kRotate,
  kNumOps
};

constexpr int kLevels = 256;

// Red, green and blue in the lower three bytes.
using Pixel = uint32_t;

BACON_FAST_INLINE Pixel pack(int red, int green, int blue) {
  return static_cast<Pixel>(red) | static_cast<Pixel>(green) << 8 | static_cast<Pixel>(blue) << 16;
}

BACON_FAST_INLINE int level(Pixel pixel, int channel) { return pixel >> (8 * channel) & 255; }

// Products and sums that round separately: a fused multiply-add would change bits. If the host has one, the including
// file turns contraction off.
#if defined(__CUDA_ARCH__)
BACON_FAST_INLINE float multiply(float a, float b) { return __fmul_rn(a, b); }
BACON_FAST_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
BACON_FAST_INLINE double multiply(double a, double b) { return __dmul_rn(a, b); }
BACON_FAST_INLINE double add(double a, double b) { return __dadd_rn(a, b); }
#else
BACON_FAST_INLINE float multiply(float a, float b) { return a * b; }
BACON_FAST_INLINE float add(float a, float b) { return a + b; }
BACON_FAST_INLINE double multiply(double a, double b) { return a * b; }
BACON_FAST_INLINE double add(double a, double b) { return a + b; }
#endif

// Position of a row. In 64 bits, since 32-bit positions may wrap around, which keeps loops from being vectorized.
BACON_FAST_INLINE int64_t row_start(int y, int width) { return static_cast<int64_t>(y) * width; }

template <class T>
BACON_FAST_INLINE T clamp(T value, T low, T high) {
  return value < low ? low : (value > high ? high : value);
}

// Memory that an operation needs besides the image; shared by the threads of a block.
struct Scratch {
  int histogram[3 * kLevels];
  uint8_t table[3 * kLevels];
  int low[3], high[3], step[3];
  unsigned total;
  double scale[3], offset[3];
};

// --- one pixel -------------------------------------------------------------------------------------------------------

// ImagingBlend: degenerate + factor * (value - degenerate) in float32, truncated.
BACON_FAST_INLINE int blend(int degenerate, int value, float factor) {
  const float mixed = add(static_cast<float>(degenerate), multiply(factor, static_cast<float>(value - degenerate)));
  return static_cast<int>(clamp(mixed, 0.0f, 255.0f));
}

BACON_FAST_INLINE int luma(Pixel pixel) {
  return (19595 * level(pixel, 0) + 38470 * level(pixel, 1) + 7471 * level(pixel, 2) + 32768) >> 16;
}

BACON_FAST_INLINE Pixel blend(Pixel degenerate, Pixel pixel, float factor) {
  return pack(blend(level(degenerate, 0), level(pixel, 0), factor), blend(level(degenerate, 1), level(pixel, 1), factor),
              blend(level(degenerate, 2), level(pixel, 2), factor));
}

// Pillow's SMOOTH filter, [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13 rounded to nearest, at an inner pixel.
BACON_FAST_INLINE Pixel smooth(const Pixel* center, int width) {
  // Red and blue are summed side by side in the halves of a word: a sum is at most 13 * 255.
  uint32_t red_blue = 4 * (*center & 0xFF00FF), green = 4 * (*center >> 8 & 255);
  for (int dy = -1; dy <= 1; ++dy) {
    for (int dx = -1; dx <= 1; ++dx) {
      const Pixel p = center[dy * width + dx];
      red_blue += p & 0xFF00FF;
      green += p >> 8 & 255;
    }
  }
  const auto rounded = [](uint32_t sum) { return (2 * sum + 13) * 10083 >> 18; };  // (2 sum + 13) / 26, exact here
  return pack(rounded(red_blue & 0xFFFF), rounded(green), rounded(red_blue >> 16));
}

// --- geometry --------------------------------------------------------------------------------------------------------

// Output to source coordinates in 16.16 fixed point.
struct Affine {
  int64_t x0, x_per_column, x_per_row, y0, y_per_column, y_per_row;
};

BACON_FAST_INLINE int64_t to_fixed(double value) {
  return static_cast<int64_t>(clamp(floor(add(multiply(value, 65536.0), 0.5)), -0x1p40, 0x1p40));
}

// From the matrix (a, b, c; d, e, f).
BACON_FAST_INLINE Affine make_affine(double a, double b, double c, double d, double e, double f) {
  return {to_fixed(add(add(c, a * 0.5), b * 0.5)), to_fixed(a), to_fixed(b),
          to_fixed(add(add(f, d * 0.5), e * 0.5)), to_fixed(d), to_fixed(e)};
}

// Python's round(value, 15) for |value| <= 1.
BACON_FAST_INLINE double round15(double value) { return rint(value * 1e15) / 1e15; }

// Image.rotate: counterclockwise about the center.
BACON_FAST_INLINE Affine make_rotation(double degrees, int height, int width) {
  const double cx = width / 2.0, cy = height / 2.0;
  double turn = fmod(degrees, 360.0);
  if (turn < 0) turn += 360.0;
  const double angle = -(turn * (3.141592653589793 / 180.0));
  const double cosine = round15(cos(angle)), sine = round15(sin(angle));
  const double c = add(add(multiply(cosine, -cx), multiply(sine, -cy)), cx);
  const double f = add(add(multiply(-sine, -cx), multiply(cosine, -cy)), cy);
  return make_affine(cosine, sine, c, -sine, cosine, f);
}

// Source coordinate of a translation: without rotation or shear Pillow walks in float64 pixel centers.
BACON_FAST_INLINE int translated(int position, double offset) {
  const double source = add(add(offset, 0.5), static_cast<double>(position));
  return source < 0 ? -1 : static_cast<int>(clamp(source, 0.0, 0x1p30));
}

BACON_FAST_INLINE bool is_inside(int64_t x, int64_t y, int height, int width) {
  return static_cast<uint64_t>(x) < static_cast<uint64_t>(width) && static_cast<uint64_t>(y) < static_cast<uint64_t>(height);
}

template <class Team>
BACON_FAST_INLINE void warp(const Team& team, const Affine& map, const Pixel* image, Pixel* out, int height, int width) {
  team.for_pixels(height, width, [&](int y, int x) {
    const int64_t source_x = (map.x0 + map.x_per_column * x + map.x_per_row * y) >> 16;
    const int64_t source_y = (map.y0 + map.y_per_column * x + map.y_per_row * y) >> 16;
    out[row_start(y, width) + x] = is_inside(source_x, source_y, height, width) ? image[source_y * width + source_x] : 0;
  });
}

template <class Team>
BACON_FAST_INLINE void translate(const Team& team, double dx, double dy, const Pixel* image, Pixel* out, int height,
                                 int width) {
  team.for_pixels(height, width, [&](int y, int x) {
    const int source_x = translated(x, dx), source_y = translated(y, dy);
    out[row_start(y, width) + x] = is_inside(source_x, source_y, height, width) ? image[source_y * width + source_x] : 0;
  });
}

// --- operations that map levels --------------------------------------------------------------------------------------

// Replaces each level by f(channel, level); with `shared` one table serves the three channels.
template <class Team, class F>
BACON_FAST_INLINE void map_levels(const Team& team, Scratch& s, Pixel* image, int pixels, bool shared, const F& f) {
  team.for_each(shared ? kLevels : 3 * kLevels, [&](int i) { s.table[i] = f(i / kLevels, i % kLevels); });
  const int green = shared ? 0 : kLevels, blue = 2 * green;
  team.for_each(pixels, [&](int i) {
    const Pixel p = image[i];
    image[i] = pack(s.table[level(p, 0)], s.table[green + level(p, 1)], s.table[blue + level(p, 2)]);
  });
}

template <class Team>
BACON_FAST_INLINE void count_levels(const Team& team, Scratch& s, const Pixel* image, int pixels) {
  team.for_each(3 * kLevels, [&](int i) { s.histogram[i] = 0; });
  team.for_each(pixels, [&](int i) {
    for (int c = 0; c < 3; ++c) team.increment(&s.histogram[c * kLevels + level(image[i], c)]);
  });
  team.find_levels(s);
}

template <class Team>
BACON_FAST_INLINE void autocontrast(const Team& team, Scratch& s, Pixel* image, int pixels) {
  count_levels(team, s, image, pixels);
  team.for_each(3, [&](int c) {
    const int spread = s.high[c] - s.low[c];
    s.scale[c] = spread > 0 ? 255.0 / spread : 1.0;
    s.offset[c] = spread > 0 ? multiply(static_cast<double>(-s.low[c]), s.scale[c]) : 0.0;
  });
  map_levels(team, s, image, pixels, false, [&](int c, int value) {
    return static_cast<int>(clamp(add(multiply(static_cast<double>(value), s.scale[c]), s.offset[c]), 0.0, 255.0));
  });
}

template <class Team>
BACON_FAST_INLINE void equalize(const Team& team, Scratch& s, Pixel* image, int pixels) {
  count_levels(team, s, image, pixels);
  team.for_each(3, [&](int c) { s.step[c] = (pixels - s.histogram[c * kLevels + s.high[c]]) / 255; });
  team.accumulate(s);
  map_levels(team, s, image, pixels, false, [&](int c, int value) {
    const int step = s.step[c];
    if (step == 0) return value;  // also where a channel has a single level
    const int equalized = (step / 2 + s.histogram[c * kLevels + value]) / step;
    return equalized < 255 ? equalized : 255;
  });
}

template <class Team>
BACON_FAST_INLINE void contrast(const Team& team, Scratch& s, Pixel* image, int pixels, float factor) {
  const uint32_t total = team.sum(pixels, [&](int i) { return luma(image[i]); });
  const int mean = static_cast<int>((int64_t{2} * total + pixels) / (int64_t{2} * pixels));  // int(mean + 0.5)
  map_levels(team, s, image, pixels, true, [&](int, int value) { return blend(mean, value, factor); });
}

// --- all of them -----------------------------------------------------------------------------------------------------

// Applies one operation; returns the buffer that holds the result, `image` or `spare` (each height * width pixels).
template <class Team>
BACON_FAST_INLINE_ALL Pixel* apply_op(const Team& team, Scratch& s, int op, double magnitude, Pixel* image,
                                      Pixel* spare, int height, int width) {
  const int pixels = height * width;
  const float factor = static_cast<float>(magnitude);
  switch (op) {
    case kAutocontrast:
      autocontrast(team, s, image, pixels);
      return image;
    case kBrightness:
      map_levels(team, s, image, pixels, true, [&](int, int value) { return blend(0, value, factor); });
      return image;
    case kColor:
      team.for_each(pixels, [&](int i) {
        const int gray = luma(image[i]);
        image[i] = blend(pack(gray, gray, gray), image[i], factor);
      });
      return image;
    case kContrast:
      contrast(team, s, image, pixels, factor);
      return image;
    case kEqualize:
      equalize(team, s, image, pixels);
      return image;
    case kPosterize: {
      const int bits = static_cast<int>(clamp(magnitude, 0.0, 8.0)), mask = ~((1 << (8 - bits)) - 1);
      map_levels(team, s, image, pixels, true, [&](int, int value) { return value & mask; });
      return image;
    }
    case kSharpness:
      team.for_each(pixels, [&](int i) { spare[i] = image[i]; });  // the border
      team.for_pixels(height - 2, width - 2, [&](int y, int x) {
        const int64_t i = row_start(y + 1, width) + x + 1;
        spare[i] = blend(smooth(image + i, width), image[i], factor);
      });
      return spare;
    case kSolarize:
      map_levels(team, s, image, pixels, true, [&](int, int value) { return value < magnitude ? value : 255 - value; });
      return image;
    case kShearX:
      warp(team, make_affine(1, magnitude, 0, 0, 1, 0), image, spare, height, width);
      return spare;
    case kShearY:
      warp(team, make_affine(1, 0, 0, magnitude, 1, 0), image, spare, height, width);
      return spare;
    case kTranslateX:
      translate(team, magnitude, 0.0, image, spare, height, width);
      return spare;
    case kTranslateY:
      translate(team, 0.0, magnitude, image, spare, height, width);
      return spare;
    case kRotate:
      warp(team, make_rotation(magnitude, height, width), image, spare, height, width);
      return spare;
    default:  // kIdentity
      return image;
  }
}

#undef BACON_FAST_INLINE

}  // namespace bacon_fast::augment
