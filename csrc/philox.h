// Counter-based random bits: Philox4x32-10 (Salmon et al., SC 2011), bit for bit as in bacon_fast/data/philox.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BACON_FAST_HOST_DEVICE __host__ __device__
#else
#define BACON_FAST_HOST_DEVICE
#endif

namespace bacon_fast {

struct PhiloxWords {
  uint32_t word[4];
};

// Block number `block` of the words at (seed, step, view, slot).
BACON_FAST_HOST_DEVICE inline PhiloxWords philox(uint64_t seed, uint32_t step, uint32_t view, uint32_t slot,
                                                 uint32_t block) {
  uint32_t c0 = slot, c1 = step, c2 = view, c3 = block;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// Word to a number in [0, 1), exactly.
BACON_FAST_HOST_DEVICE inline double to_uniform(uint32_t word) { return word * 0x1p-32; }

// Word to an integer in [0, n).
BACON_FAST_HOST_DEVICE inline int to_range(uint32_t word, int n) {
  return static_cast<int>((static_cast<uint64_t>(word) * static_cast<uint32_t>(n)) >> 32);
}

}  // namespace bacon_fast
