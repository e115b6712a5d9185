// The Team (pixel_ops.h) of a CPU: one thread.
#pragma once

#include <utility>

#include "augment/pixel_ops.h"

namespace bacon_fast::augment {

struct Thread {
  template <class F>
  void for_each(int n, const F& f) const {
    for (int i = 0; i < n; ++i) f(i);
  }

  template <class F>
  void for_pixels(int height, int width, const F& f) const {
    for (int y = 0; y < height; ++y) {
      for (int x = 0; x < width; ++x) f(y, x);
    }
  }

  template <class F>
  uint32_t sum(int n, const F& f) const {
    uint32_t total = 0;
    for (int i = 0; i < n; ++i) total += f(i);
    return total;
  }

  void increment(int* p) const { ++*p; }

  void find_levels(Scratch& s) const {
    for (int c = 0; c < 3; ++c) {
      const int* histogram = s.histogram + c * kLevels;
      for (s.low[c] = 0; histogram[s.low[c]] == 0;) ++s.low[c];
      for (s.high[c] = kLevels - 1; histogram[s.high[c]] == 0;) --s.high[c];
    }
  }

  void accumulate(Scratch& s) const {
    for (int c = 0; c < 3; ++c) {
      int below = 0;
      for (int i = c * kLevels; i < (c + 1) * kLevels; ++i) below += std::exchange(s.histogram[i], below);
    }
  }
};

}  // namespace bacon_fast::augment
