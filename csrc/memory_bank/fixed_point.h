// The grid on which the memory bank adds features up, shared by host and device (bacon_fast/reference/memory_bank.py).
// Sums of 64-bit integers depend neither on the order of the additions nor on their number.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define BACON_FAST_HOST_DEVICE __host__ __device__
#else
#define BACON_FAST_HOST_DEVICE
#endif

namespace bacon_fast {

constexpr float kFeatureLimit = 4096.0f;           // features are clamped to +-this when they are written
constexpr double kFixedPointScale = 1073741824.0;  // 2^30 steps per unit

BACON_FAST_HOST_DEVICE inline float clamp_feature(float value) {
  return value < -kFeatureLimit ? -kFeatureLimit : (value > kFeatureLimit ? kFeatureLimit : value);
}

// What is written is within the limits; a bank that comes from elsewhere may hold more, and NaN, which counts as 0.
BACON_FAST_HOST_DEVICE inline int64_t to_fixed_point(float value) {
  const float bounded = value == value ? clamp_feature(value) : 0.0f;
  return static_cast<int64_t>(rint(static_cast<double>(bounded) * kFixedPointScale));
}

// Center of a class of `size` > 0 slots from one component of its sum.
BACON_FAST_HOST_DEVICE inline float to_center(int64_t sum, int64_t size) {
  return static_cast<float>(static_cast<double>(sum) / (static_cast<double>(size) * kFixedPointScale));
}

}  // namespace bacon_fast
