// The least work that is worth waking another thread.
#pragma once

#include <algorithm>
#include <cstdint>

namespace bacon_fast::contrastive {

// In multiplications of the micro-kernels: about a microsecond.
constexpr std::int64_t kGrain = 1 << 17;
// Normalizing a number, taking its exponential and only reading it take as long as so many multiplications.
constexpr std::int64_t kNormalizeCost = 16;
constexpr std::int64_t kExponentialCost = 16;
constexpr std::int64_t kScalarCost = 64;

// The least number of tasks of a thread, each of so many multiplications.
inline std::int64_t grain(std::int64_t cost) {
  return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, cost));
}

}  // namespace bacon_fast::contrastive
