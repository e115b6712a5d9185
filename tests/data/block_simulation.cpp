// Runs the GPU's view of csrc/augment on a CPU: one host thread per thread of a block, barriers and warp operations
// emulated, and compares it with the plain sequential code. Built and run by test_augment_block.py under ThreadSanitizer,
// which reports a missing __syncthreads as a data race.
#include <atomic>
#include <barrier>
#include <cstdio>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "augment/view.h"

#define __device__
struct Coordinate {
  int x;
};
thread_local Coordinate threadIdx;
constexpr Coordinate blockDim{128};
constexpr int kWarps = blockDim.x / 32;

std::barrier block_barrier(blockDim.x);
std::unique_ptr<std::barrier<>> warp_barrier[kWarps];
int lanes[kWarps][32];

void __syncthreads() { block_barrier.arrive_and_wait(); }

// Every lane's value of a warp, by f(values, own lane).
template <class F>
auto in_warp(int value, F f) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  lanes[warp][lane] = value;
  warp_barrier[warp]->arrive_and_wait();
  const auto result = f(lanes[warp], lane);
  warp_barrier[warp]->arrive_and_wait();
  return result;
}

unsigned __ballot_sync(unsigned, bool vote) {
  return in_warp(vote, [](const int* votes, int) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(votes[i]) << i;
    return bits;
  });
}

int __shfl_up_sync(unsigned, int value, int distance) {
  return in_warp(value, [=](const int* values, int lane) { return values[lane < distance ? lane : lane - distance]; });
}

int __reduce_add_sync(unsigned, int value) {
  return in_warp(value, [](const int* values, int) {
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += values[i];
    return sum;
  });
}

int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
int __clz(unsigned bits) { return __builtin_clz(bits); }

void atomicAdd(int* p, int value) { std::atomic_ref(*p).fetch_add(value); }

void atomicMin(int* p, int value) {
  std::atomic_ref target(*p);
  for (int old = target; value < old && !target.compare_exchange_weak(old, value);) {
  }
}

void atomicMax(int* p, int value) {
  std::atomic_ref target(*p);
  for (int old = target; value > old && !target.compare_exchange_weak(old, value);) {
  }
}

#include "augment/block.h"
#include "augment/thread.h"

using namespace bacon_fast::augment;

constexpr int kHeight = 16, kWidth = 13, kPixels = kHeight * kWidth, kImages = 2 * kNumOps, kChain = 3;

struct Memory {
  std::vector<Pixel> first = std::vector<Pixel>(kPixels), second = std::vector<Pixel>(kPixels);
  Scratch scratch;
};

struct Result {
  std::vector<uint8_t> chains = std::vector<uint8_t>(3 * kPixels * kImages);
  std::vector<float> views = std::vector<float>(3 * kPixels * kImages);
  bool operator==(const Result&) const = default;
};

struct Problem {
  std::vector<uint8_t> images = std::vector<uint8_t>(3 * kPixels * kImages);
  std::vector<int64_t> ops = std::vector<int64_t>(kChain * kImages);
  std::vector<double> magnitudes = std::vector<double>(kChain * kImages), ranges = std::vector<double>(3 * kNumOps);
  std::vector<float> table = std::vector<float>(3 * kLevels);

  Problem() {
    std::mt19937 random(0);
    std::uniform_real_distribution<double> unit(0, 1);
    for (size_t i = 0; i < images.size(); ++i) {  // noise, two levels, one level
      const int kind = static_cast<int>(i / (3 * kPixels)) % 3;
      images[i] = kind == 0 ? random() % 256 : kind == 1 ? 7 + 90 * (random() % 2) : 33;
    }
    for (int op = 0; op < kNumOps; ++op) {
      const double span = op == kRotate ? 60 : op == kSolarize ? 256 : op == kPosterize ? 4 : 0.6;
      ranges[op] = op == kPosterize ? 4 : op == kSolarize ? 0 : op == kBrightness ? 0.2 : -span / 2;
      ranges[kNumOps + op] = span;
      ranges[2 * kNumOps + op] = op == kTranslateX ? kWidth : op == kTranslateY ? kHeight : 1;
    }
    for (size_t i = 0; i < ops.size(); ++i) {
      ops[i] = i % kChain == 0 ? static_cast<int>(i / kChain) % kNumOps : static_cast<int>(random() % kNumOps);
      const int64_t op = ops[i];
      magnitudes[i] = (ranges[op] + ranges[kNumOps + op] * unit(random)) * ranges[2 * kNumOps + op];
    }
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<float>(i);
  }

  template <class Team>
  void solve(const Team& team, Memory& m, Result& result) const {
    const Settings settings{kHeight, kWidth, 3, kChain, true, true, 11, ranges.data()};
    for (int i = 0; i < kImages; ++i) {
      apply_chain(team, m.scratch, &ops[kChain * i], &magnitudes[kChain * i], kChain, &images[3 * kPixels * i],
                  m.first.data(), m.second.data(), kHeight, kWidth, &result.chains[3 * kPixels * i]);
      const Counter counter{settings.seed, 5, 2, static_cast<uint32_t>(i)};
      make_view(team, m.scratch, settings, counter, i % 4 != 0, &images[3 * kPixels * i], m.first.data(),
                m.second.data(), table.data(), i % 2 == 0, &result.views[3 * kPixels * i]);
    }
  }
};

int main() {
  const Problem problem;
  Memory sequential_memory, block_memory;
  Result expected, result;
  problem.solve(Thread(), sequential_memory, expected);
  for (auto& barrier : warp_barrier) barrier = std::make_unique<std::barrier<>>(32);
  std::vector<std::thread> threads;
  for (int t = 0; t < blockDim.x; ++t) {
    threads.emplace_back([&, t] {
      threadIdx.x = t;
      problem.solve(Block{block_memory.scratch}, block_memory, result);
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::puts(result == expected ? "equal" : "different");
  return result == expected ? 0 : 1;
}
