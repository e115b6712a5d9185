// One view of one image: draws, crop, flip, operations, Cutout, normalization (bacon_fast/data/augment.py, `Augment`).
#pragma once

#include "augment/pixel_ops.h"

namespace bacon_fast::augment {

constexpr Pixel kCutoutColor = 125 | 123 << 8 | 114 << 16;

struct Settings {
  int height, width, padding, num_ops;
  bool hflip, cutout;
  uint64_t seed;
  const double* ranges;  // [3, 14]: low, span and unit of each operation's magnitude
};

// The source of a view's random bits.
struct Counter {
  uint64_t seed;
  uint32_t step, stream, slot;

  BACON_FAST_HOST_DEVICE PhiloxWords block(int index) const { return philox(seed, step, stream, slot, index); }
};

// A rectangle, both ends inside; empty when x1 < x0.
struct Box {
  int x0, y0, x1, y1;
};

struct Geometry {
  int top, left;  // of the crop in the padded image
  bool flip;
};

BACON_FAST_HOST_DEVICE inline Geometry draw_geometry(const PhiloxWords& words, const Settings& settings) {
  const int positions = 2 * settings.padding + 1;
  return {to_range(words.word[0], positions), to_range(words.word[1], positions),
          settings.hflip && words.word[2] >= 0x80000000u};
}

BACON_FAST_HOST_DEVICE inline Box draw_cutout(uint32_t size_word, uint32_t x_word, uint32_t y_word, int height,
                                              int width) {
  // The centers are in (1, size], as numpy's uniform(size) draws them. All values here are exact in float64.
  const double side = 0.5 * width * to_uniform(size_word);
  const double x = width + (1.0 - width) * to_uniform(x_word), y = height + (1.0 - height) * to_uniform(y_word);
  if (side <= 0) return {0, 0, -1, -1};
  const int x0 = static_cast<int>(fmax(0.0, x - side / 2)), y0 = static_cast<int>(fmax(0.0, y - side / 2));
  const int x1 = static_cast<int>(x0 + side), y1 = static_cast<int>(y0 + side);  // Pillow truncates
  return {x0, y0, x1 < width ? x1 : width - 1, y1 < height ? y1 : height - 1};
}

// Operation s of a chain: words 6 + 2s and 7 + 2s.
BACON_FAST_HOST_DEVICE inline int draw_op(const Counter& counter, const Settings& settings, int s, double* magnitude) {
  const PhiloxWords words = counter.block((6 + 2 * s) / 4);
  const bool upper_half = s % 2 == 0;
  const int op = to_range(upper_half ? words.word[2] : words.word[0], kNumOps);
  const double low = settings.ranges[op], span = settings.ranges[kNumOps + op], unit = settings.ranges[2 * kNumOps + op];
  const double r = to_uniform(upper_half ? words.word[3] : words.word[1]);
  const double value = multiply(add(low, multiply(span, r)), unit);
  *magnitude = op == kPosterize ? floor(value) : value;
  return op;
}

BACON_FAST_HOST_DEVICE inline int reflect(int position, int size) {
  position = position < 0 ? -position : position;
  return position < size ? position : 2 * (size - 1) - position;
}

// Reads `image` (uint8 [H, W, 3]) as pixels through the crop and the flip.
template <class Team>
BACON_FAST_HOST_DEVICE inline void crop(const Team& team, const Settings& settings, const Geometry& g,
                                        const uint8_t* image, Pixel* out) {
  const int height = settings.height, width = settings.width, dy = g.top - settings.padding;
  const int dx = g.left - settings.padding;
  team.for_pixels(height, width, [&](int y, int x) {
    const int source_x = reflect((g.flip ? width - 1 - x : x) + dx, width);
    const uint8_t* p = image + 3 * (row_start(reflect(y + dy, height), width) + source_x);
    out[row_start(y, width) + x] = pack(p[0], p[1], p[2]);
  });
}

// Makes one view and writes it normalized.
//   buffers  two images of height * width pixels; `spare` is not touched for weak views
//   table    [3, 256], the normalized value of each level of each channel
//   out      [3, H, W], or [H, W, 3] for channels_last
template <class Team, class TableValue, class Out>
BACON_FAST_INLINE_ALL void make_view(const Team& team, Scratch& scratch, const Settings& settings,
                                     const Counter& counter, bool strong, const uint8_t* image, Pixel* buffer,
                                     Pixel* spare, const TableValue* table, bool channels_last, Out* out) {
  const int height = settings.height, width = settings.width;
  const PhiloxWords words = counter.block(0);
  crop(team, settings, draw_geometry(words, settings), image, buffer);
  if (strong) {
    for (int s = 0; s < settings.num_ops; ++s) {
      double magnitude;
      const int op = draw_op(counter, settings, s, &magnitude);
      Pixel* result = apply_op(team, scratch, op, magnitude, buffer, spare, height, width);
      if (result == spare) {
        spare = buffer;
        buffer = result;
      }
    }
    if (settings.cutout) {
      const PhiloxWords more = counter.block(1);
      const Box box = draw_cutout(words.word[3], more.word[0], more.word[1], height, width);
      team.for_pixels(box.y1 - box.y0 + 1, box.x1 - box.x0 + 1,
                      [&](int y, int x) { buffer[(box.y0 + y) * width + box.x0 + x] = kCutoutColor; });
    }
  }
  const int pixels = height * width;
  const int per_pixel = channels_last ? 3 : 1, per_channel = channels_last ? 1 : pixels;
  team.for_each(pixels, [&](int i) {
    for (int c = 0; c < 3; ++c) {
      out[i * per_pixel + c * per_channel] = static_cast<Out>(table[c * kLevels + level(buffer[i], c)]);
    }
  });
}

// A given chain of operations on one image, without crop and normalization: uint8 [H, W, 3] to the same.
template <class Team>
BACON_FAST_HOST_DEVICE inline void apply_chain(const Team& team, Scratch& scratch, const int64_t* ops,
                                               const double* magnitudes, int64_t length, const uint8_t* image,
                                               Pixel* buffer, Pixel* spare, int height, int width, uint8_t* out) {
  const int pixels = height * width;
  team.for_each(pixels, [&](int i) { buffer[i] = pack(image[3 * i], image[3 * i + 1], image[3 * i + 2]); });
  for (int64_t s = 0; s < length; ++s) {
    Pixel* result = apply_op(team, scratch, static_cast<int>(ops[s]), magnitudes[s], buffer, spare, height, width);
    if (result == spare) {
      spare = buffer;
      buffer = result;
    }
  }
  team.for_each(pixels, [&](int i) {
    for (int c = 0; c < 3; ++c) out[3 * i + c] = static_cast<uint8_t>(level(buffer[i], c));
  });
}

}  // namespace bacon_fast::augment
