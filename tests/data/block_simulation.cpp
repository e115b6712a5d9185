// Runs the GPU's view of csrc/augment on a CPU: one host thread per thread of a block, barriers and warp operations
// emulated, and compares it with the plain sequential code. Built and run by test_augment_block.py under ThreadSanitizer,
// which reports a missing __syncthreads as a data race.
#include <array>
#include <atomic>
#include <barrier>
#include <cassert>
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

unsigned __reduce_add_sync(unsigned, unsigned value) {
  return in_warp(static_cast<int>(value), [](const int* values, int) {
    unsigned sum = 0;
    for (int i = 0; i < 32; ++i) sum += values[i];
    return sum;
  });
}

int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
int __clz(unsigned bits) { return __builtin_clz(bits); }

template <class T>
void atomicAdd(T* p, T value) {
  std::atomic_ref(*p).fetch_add(value);
}

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

#define CUDA_KERNEL_ASSERT(condition) assert(condition)
#include "augment/rows.h"
#include "augment/thread.h"

using namespace bacon_fast::augment;

constexpr int kHeight = 16, kWidth = 13, kPixels = kHeight * kWidth, kImages = 2 * kNumOps, kChain = 3;

// Views of the images' own size, of a window, of a resized part that grows, shrinks much in height, and keeps its size.
constexpr std::array<Settings, 5> kSettings{{
    {kHeight, kWidth, kHeight, kWidth, 3, kChain, true, true, false, 11, nullptr},
    {kHeight, kWidth, 9, 7, 0, kChain, true, true, false, 11, nullptr},
    {kHeight, kWidth, kHeight, kWidth, 0, kChain, true, true, true, 11, nullptr},
    {kHeight, kWidth, 3, kWidth, 0, 0, true, false, true, 12, nullptr},
    {kHeight, kWidth, 5, 4, 2, 1, false, true, true, 13, nullptr},
}};
constexpr int kBlocks = 2;  // that share the rows, each with memory of its own

struct Result {
  std::vector<uint8_t> chains = std::vector<uint8_t>(3 * kPixels * kImages);
  std::array<std::vector<float>, kSettings.size()> views;
  bool operator==(const Result&) const = default;
  Result() {
    for (size_t k = 0; k < views.size(); ++k) views[k].resize(3 * kSettings[k].height * kSettings[k].width * 2 * kImages);
  }
};

// Of one view, as a thread block has it in global memory.
struct Workspace {
  std::vector<Pixel> pixels;
  Memory memory;
  explicit Workspace(const Sizes& sizes) : pixels(sizes.all()), memory(pixels.data(), sizes) {}
};

struct Problem {
  std::vector<uint8_t> images = std::vector<uint8_t>(3 * kPixels * kImages);
  std::vector<int64_t> ops = std::vector<int64_t>(kChain * kImages), order = std::vector<int64_t>(kImages);
  std::vector<double> magnitudes = std::vector<double>(kChain * kImages), ranges = std::vector<double>(3 * kNumOps);
  std::vector<float> table = std::vector<float>(3 * kLevels);
  Requests requests{};

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
    for (int i = 0; i < kImages; ++i) order[i] = (i * 5) % kImages;
    requests.count = 2;  // weak views, then strong ones
    for (int r = 0; r < 2; ++r) {
      requests.begin[r + 1] = requests.begin[r] + kImages;
      requests.indices[r] = order.data();
      requests.stream[r] = requests.first_slot[r] = r + 7;
      requests.strong[r] = r == 1;
    }
  }

  Settings settings(size_t k) const {
    Settings result = kSettings[k];
    result.ranges = ranges.data();
    return result;
  }

  void solve_alone(Result& result) const {
    Scratch scratch;
    Workspace w({kPixels, kPixels, 0});
    for (int i = 0; i < kImages; ++i) {
      apply_chain(Thread(), scratch, &ops[kChain * i], &magnitudes[kChain * i], kChain, &images[3 * kPixels * i],
                  w.memory, kHeight, kWidth, &result.chains[3 * kPixels * i]);
    }
    for (size_t k = 0; k < kSettings.size(); ++k) {
      const Settings s = settings(k);
      Workspace own(sizes_of(s));
      for (int row = 0; row < 2 * kImages; ++row) {
        const int r = row / kImages, i = row % kImages;
        const Counter counter{s.seed, 5, requests.stream[r], requests.first_slot[r] + i};
        make_view(Thread(), scratch, s, counter, r == 1, &images[3 * kPixels * order[i]], own.memory, table.data(),
                  k % 2 == 0, &result.views[k][3 * s.height * s.width * row]);
      }
    }
  }

  // What a thread of one of the GPU's blocks does, kernel after kernel. Memory is of the block, a list for each kernel.
  void solve_in(const Block& block, int which, const std::vector<Memory>& memory, Result& result) const {
    apply_chains(block, images.data(), ops.data(), magnitudes.data(), kImages, kChain, kHeight, kWidth, memory[0],
                 which, kBlocks, result.chains.data());
    for (size_t k = 0; k < kSettings.size(); ++k) {
      make_rows(block, settings(k), requests, images.data(), kImages, 5, table.data(), k % 2 == 0, memory[1 + k], which,
                kBlocks, result.views[k].data());
    }
  }
};

int main() {
  const Problem problem;
  Result expected, result;
  problem.solve_alone(expected);
  for (auto& barrier : warp_barrier) barrier = std::make_unique<std::barrier<>>(32);
  for (int which = 0; which < kBlocks; ++which) {
    Scratch scratch;
    std::vector<std::unique_ptr<Workspace>> owned;
    std::vector<Memory> memory;
    for (size_t k = 0; k <= kSettings.size(); ++k) {
      const Sizes sizes = k == 0 ? Sizes{kPixels, kPixels, 0} : sizes_of(problem.settings(k - 1));
      owned.push_back(std::make_unique<Workspace>(sizes));
      memory.push_back(owned.back()->memory);
    }
    std::vector<std::thread> threads;
    for (int t = 0; t < blockDim.x; ++t) {
      threads.emplace_back([&, t] {
        threadIdx.x = t;
        problem.solve_in(Block{scratch}, which, memory, result);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  std::puts(result == expected ? "equal" : "different");
  return result == expected ? 0 : 1;
}
