// The GPU's BatchNorm (csrc/batch_norm) on a CPU: a host thread for each thread of every block, all of them at once.
// A library for test_batch_norm_blocks.py, and a program for ThreadSanitizer, which reports a missing barrier as a race.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <barrier>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "batch_norm/block.h"

using namespace bacon_fast::norm;

constexpr int kNumThreads = 64;
using Barrier = std::barrier<>;

struct alignas(kVectorBytes) Line {
  char bytes[kVectorBytes];
};

struct HostBlock {
  static constexpr int kThreads = kNumThreads;
  struct Copy {
    void* to;
    const void* from;
  };

  int index, which_split, which_channels;
  Line* shared;
  Barrier *barrier, *grid_barrier;
  mutable std::vector<std::vector<Copy>> groups{1};  // asked for and not there yet; the last one is open

  int thread() const { return index; }
  int split() const { return which_split; }
  int channel_block() const { return which_channels; }
  void* memory() const { return shared; }
  void copy(void* to, const void* from) const { groups.back().push_back({to, from}); }
  void commit() const { groups.emplace_back(); }
  void wait(int last) const {  // as late as it is allowed: what nobody waits for never arrives
    while (static_cast<int>(groups.size()) - 1 > last) {
      for (const Copy& one : groups.front()) std::memcpy(one.to, one.from, kVectorBytes);
      groups.erase(groups.begin());
    }
  }
  void sync() const { barrier->arrive_and_wait(); }
  void grid_sync() const { grid_barrier->arrive_and_wait(); }
};

// One launch of all blocks.
template <class Run>
void launch(const Plan& plan, const Run& run) {
  Barrier grid(plan.blocks() * kNumThreads);
  std::vector<std::unique_ptr<Barrier>> barriers;
  std::vector<std::vector<Line>> memory;
  std::vector<std::thread> threads;
  for (int64_t b = 0; b < plan.blocks(); ++b) {
    barriers.push_back(std::make_unique<Barrier>(kNumThreads));
    memory.emplace_back(plan.shared_bytes / kVectorBytes + 1);
    std::memset(memory.back().data(), 0xff, memory.back().size() * kVectorBytes);  // NaN
  }
  for (int64_t b = 0; b < plan.blocks(); ++b) {
    for (int t = 0; t < kNumThreads; ++t) {
      threads.emplace_back([&, b, t] {
        run(HostBlock{t, static_cast<int>(b % plan.splits), static_cast<int>(b / plan.splits), memory[b].data(),
                      barriers[b].get(), &grid});
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
}

struct Call {
  int64_t rows, channels, multiprocessors, shared_limit, resident_blocks;
  double momentum, eps, slope;
  void *x, *residual, *sum, *activated, *weight, *bias, *mean, *inverse, *running_mean, *running_var, *batches;
  void *gradient, *more, *result, *grad_weight, *grad_bias;
};

template <class S>
Plan plan_of(const Call& c, int tensors) {
  const Machine machine{kNumThreads, static_cast<int>(c.multiprocessors), c.shared_limit};
  return choose_plan(c.rows, c.channels, sizeof(S), sizeof(Accumulator<S>), tensors, machine,
                     [&](const Plan& plan) { return plan.blocks() <= c.resident_blocks; });
}

template <class S, class Run>
Plan run_plan(const Plan& plan, const Run& run) {
  std::vector<Line> partial(plan.partial_size() * sizeof(Accumulator<S>) / kVectorBytes + 1);
  std::memset(partial.data(), 0xff, partial.size() * kVectorBytes);
  auto* numbers = reinterpret_cast<Accumulator<S>*>(partial.data());
  if (plan.is_one_launch) {
    launch(plan, [&](const HostBlock& block) { run(block, numbers, kBoth); });
  } else if (!plan.is_empty()) {
    for (const int phase : {kFirst, kSecond}) {
      launch(plan, [&](const HostBlock& block) { run(block, numbers, phase); });
    }
  }
  return plan;
}

template <class S>
Plan forward(const Call& c) {
  using Acc = Accumulator<S>;
  const Plan plan = plan_of<S>(c, 1);
  return run_plan<S>(plan, [&](const HostBlock& block, Acc* partial, int phases) {
    const Forward<S> arguments{
        static_cast<S*>(c.x), static_cast<S*>(c.residual), static_cast<S*>(c.sum), static_cast<S*>(c.activated),
        static_cast<Acc*>(c.weight), static_cast<Acc*>(c.bias), static_cast<Acc*>(c.mean), static_cast<Acc*>(c.inverse),
        static_cast<Acc*>(c.running_mean), static_cast<Acc*>(c.running_var), static_cast<int64_t*>(c.batches),
        static_cast<Acc>(c.momentum), static_cast<Acc>(c.eps), static_cast<Acc>(c.slope), partial};
    forward_block(block, plan, arguments, phases);
  });
}

template <class S>
Plan backward(const Call& c) {
  using Acc = Accumulator<S>;
  const Plan plan = plan_of<S>(c, 2);
  return run_plan<S>(plan, [&](const HostBlock& block, Acc* partial, int phases) {
    const Backward<S> arguments{
        static_cast<S*>(c.residual == nullptr ? c.x : c.sum), static_cast<S*>(c.gradient), static_cast<S*>(c.more),
        static_cast<Acc*>(c.weight), static_cast<Acc*>(c.bias), static_cast<Acc*>(c.mean), static_cast<Acc*>(c.inverse),
        static_cast<Acc>(c.slope), static_cast<S*>(c.result), static_cast<Acc*>(c.grad_weight),
        static_cast<Acc*>(c.grad_bias), partial};
    backward_block(block, plan, arguments, phases);
  });
}

template <class S>
void both(const Call& call, Plan* plans) {
  plans[0] = forward<S>(call);
  plans[1] = backward<S>(call);
}

// bits: of a number; 16 for bfloat16, 15 for float16. plans[2]: of forward and backward.
extern "C" void run(int bits, const Call* call, Plan* plans) {
  if (bits == 32) return both<float>(*call, plans);
#ifndef __SANITIZE_THREAD__  // the program needs no other, and compiles sooner
  if (bits == 64) return both<double>(*call, plans);
  if (bits == 16) return both<c10::BFloat16>(*call, plans);
  if (bits == 15) return both<c10::Half>(*call, plans);
#endif
}

// A plan alone, of as many bytes a number as given and float32 sums.
extern "C" void plan_for(int64_t rows, int64_t channels, int64_t bytes, int tensors, int threads, int multiprocessors,
                         int64_t shared_limit, Plan* plan) {
  *plan = make_plan(rows, channels, bytes, bytes == 8 ? 8 : 4, tensors, {threads, multiprocessors, shared_limit});
}

int main() {
  constexpr int64_t kRows = 150, kChannels = 24;
  std::vector<std::vector<float>> images(7, std::vector<float>(kRows * kChannels));
  std::vector<std::vector<float>> vectors(8, std::vector<float>(32, 1));
  std::mt19937 random(0);
  for (auto* image : {&images[0], &images[1], &images[4], &images[5]}) {
    for (float& value : *image) value = std::normal_distribution<float>()(random);
  }
  int64_t batches = 0;
  Call call{kRows, kChannels, 3, 9000, 100, 0.1, 1e-5, 0.1};
  void** pointers = &call.x;
  for (auto* image : {&images[0], &images[1], &images[2], &images[3]}) *pointers++ = image->data();
  for (int v = 0; v < 6; ++v) *pointers++ = vectors[v].data();
  *pointers++ = &batches;
  for (auto* image : {&images[4], &images[5], &images[6]}) *pointers++ = image->data();
  for (int v = 6; v < 8; ++v) *pointers++ = vectors[v].data();
  Plan plans[2];
  run(32, &call, plans);
  const bool kept = plans[0].is_one_launch && plans[1].is_one_launch && plans[1].held[0] > 0 && plans[0].splits == 3;
  std::puts(batches == 1 && kept ? "done" : "not as planned");
}
