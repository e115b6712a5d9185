// One view of one image: draws, crop, flip, operations, Cutout, normalization (bacon_fast/data/augment.py, `Augment`).
#pragma once

#include "augment/pixel_ops.h"
#include "augment/resized_crop.h"

namespace bacon_fast::augment {

constexpr Pixel kCutoutColor = 125 | 123 << 8 | 114 << 16;

struct Settings {
  int source_height, source_width, height, width, padding, num_ops;  // of an image, and of a view
  bool hflip, cutout, resized_crop;
  uint64_t seed;
  const double* ranges;  // [3, 14]: low, span and unit of each operation's magnitude
};

// The source of a view's random bits.
struct Counter {
  uint64_t seed;
  uint32_t step, stream, slot;

  BACON_FAST_HOST_DEVICE PhiloxWords block(int index) const { return philox(seed, step, stream, slot, index); }
};

// Memory to make a view in, each element of 4 bytes: two images, and the weights of a resized crop.
struct Sizes {
  int64_t first, second, taps;

  BACON_FAST_HOST_DEVICE int64_t all() const { return first + second + taps; }
};

struct Memory {
  Pixel *first, *second;
  int* taps;

  BACON_FAST_HOST_DEVICE Memory(Pixel* start, const Sizes& sizes)
      : first(start), second(start + sizes.first), taps(reinterpret_cast<int*>(second + sizes.second)) {}
};

inline Sizes sizes_of(const Settings& s) {
  const int64_t pixels = int64_t{s.height} * s.width;
  if (!s.resized_crop) return {pixels, pixels, 0};
  // Between the passes one side is the view's and the other at most the image's.
  const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
  const int64_t between = larger(int64_t{s.source_height} * s.width, int64_t{s.source_width} * s.height);
  const auto taps = [](int from, int to) { return int64_t{to} * (2 + most_taps(from, to)); };
  return {pixels, larger(pixels, between), larger(taps(s.source_height, s.height), taps(s.source_width, s.width))};
}

// A rectangle, both ends inside; empty when x1 < x0.
struct Box {
  int x0, y0, x1, y1;
};

struct Geometry {
  int top, left;  // of the crop in the padded image
  bool flip;
};

BACON_FAST_HOST_DEVICE inline Geometry draw_geometry(const PhiloxWords& words, const Settings& settings) {
  const int down = settings.source_height + 2 * settings.padding - settings.height;
  const int across = settings.source_width + 2 * settings.padding - settings.width;
  return {to_range(words.word[0], down + 1), to_range(words.word[1], across + 1),
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

// Words 6 + 2s and 7 + 2s: of operation s of a chain; behind the chain, of an attempt at a resized crop.
BACON_FAST_HOST_DEVICE inline void draw_pair(const Counter& counter, int s, uint32_t* first, uint32_t* second) {
  const PhiloxWords words = counter.block((6 + 2 * s) / 4);
  const bool upper_half = s % 2 == 0;
  *first = upper_half ? words.word[2] : words.word[0];
  *second = upper_half ? words.word[3] : words.word[1];
}

BACON_FAST_HOST_DEVICE inline int draw_op(const Counter& counter, const Settings& settings, int s, double* magnitude) {
  uint32_t op_word, magnitude_word;
  draw_pair(counter, s, &op_word, &magnitude_word);
  const int op = to_range(op_word, kNumOps);
  const double low = settings.ranges[op], span = settings.ranges[kNumOps + op], unit = settings.ranges[2 * kNumOps + op];
  const double r = to_uniform(magnitude_word);
  const double value = multiply(add(low, multiply(span, r)), unit);
  *magnitude = op == kPosterize ? floor(value) : value;
  return op;
}

BACON_FAST_HOST_DEVICE inline int reflect(int position, int size) {
  position = position < 0 ? -position : position;
  return position < size ? position : 2 * (size - 1) - position;
}

// Reads `image` (uint8 [H, W, 3]) as pixels of a view through the crop and the flip.
template <class Team>
BACON_FAST_HOST_DEVICE inline void crop(const Team& team, const Settings& settings, const Geometry& g,
                                        const uint8_t* image, Pixel* out) {
  const int height = settings.height, width = settings.width, dy = g.top - settings.padding;
  const int dx = g.left - settings.padding;
  team.for_pixels(height, width, [&](int y, int x) {
    const int source_x = reflect((g.flip ? width - 1 - x : x) + dx, settings.source_width);
    const int source_y = reflect(y + dy, settings.source_height);
    const uint8_t* p = image + 3 * (row_start(source_y, settings.source_width) + source_x);
    out[row_start(y, width) + x] = pack(p[0], p[1], p[2]);
  });
}

// Makes one view and writes it normalized.
//   memory  of the settings' sizes
//   table   [3, 256], the normalized value of each level of each channel
//   out     [3, height, width], or [height, width, 3] for channels_last
template <class Team, class TableValue, class Out>
BACON_FAST_INLINE_ALL void make_view(const Team& team, Scratch& scratch, const Settings& settings,
                                     const Counter& counter, bool strong, const uint8_t* image,
                                     const Memory& memory, const TableValue* table, bool channels_last, Out* out) {
  const int height = settings.height, width = settings.width;
  Pixel *buffer = memory.first, *spare = memory.second;
  const PhiloxWords words = counter.block(0);
  const Geometry geometry = draw_geometry(words, settings);
  if (strong && settings.resized_crop) {
    const Part part = draw_part(settings.source_height, settings.source_width, words.word[0], words.word[1],
                                [&](int attempt, uint32_t* area, uint32_t* ratio) {
                                  draw_pair(counter, settings.num_ops + attempt, area, ratio);
                                });
    crop_resized(team, image, settings.source_width, part, geometry.flip, height, width, memory.taps, spare, buffer);
  } else {
    crop(team, settings, geometry, image, buffer);
  }
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
                                               const Memory& memory, int height, int width, uint8_t* out) {
  const int pixels = height * width;
  Pixel *buffer = memory.first, *spare = memory.second;
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
