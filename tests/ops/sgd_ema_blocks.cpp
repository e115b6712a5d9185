// Runs csrc/sgd_ema/update.h as a GPU does, every chunk by 256 threads, and as a CPU does, by one: equal bit for bit.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "sgd_ema/update.h"

using namespace bacon_fast::optim;

struct Tensor {
  std::vector<float> parameter, gradient, momentum, average;
};

// The same tensors at every call.
std::vector<Tensor> tensors(const std::vector<int64_t>& sizes) {
  std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  std::vector<Tensor> all;
  for (const int64_t size : sizes) {
    Tensor tensor;
    for (auto* values : {&tensor.parameter, &tensor.gradient, &tensor.momentum, &tensor.average}) {
      for (int64_t i = 0; i < size; ++i) values->push_back(normal(generator));
    }
    all.push_back(tensor);
  }
  return all;
}

std::vector<Tensor> run(const std::vector<int64_t>& sizes, float found_inf, int threads) {
  std::vector<Tensor> all = tensors(sizes);
  static Plan plan;
  plan.count = 0;
  int32_t chunks = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    Tensor& t = all[i];
    const bool copies = i % 4 == 3;
    const int64_t numel = copies ? sizes[i] * 4 - 1 : sizes[i];  // bytes, not a multiple of a word
    plan.first_chunk[plan.count] = chunks;
    plan.entries[plan.count++] = {t.parameter.data(), i % 4 == 1 || copies ? nullptr : t.gradient.data(),
                                  t.momentum.data(), i % 4 == 2 ? nullptr : t.average.data(), numel, 0.01, copies};
    chunks += static_cast<int32_t>((numel + kChunk - 1) / kChunk);
  }
  plan.first_chunk[plan.count] = chunks;
  const float rate = 0.1f, scale = 8.0f;
  const Settings settings{&rate, &scale, &found_inf, 0.9, 0.25};
  for (int32_t chunk = 0; chunk < chunks; ++chunk) {
    for (int thread = threads - 1; thread >= 0; --thread) update_chunk<float>(plan, settings, chunk, thread, threads);
  }
  return all;
}

int main() {
  const std::vector<int64_t> sizes{1, 4095, 4096, 4097, 3, 300, 8192, 12289, 77, 10000, 255, 257};
  for (const float found_inf : {0.0f, 1.0f}) {
    const auto one = run(sizes, found_inf, 1), block = run(sizes, found_inf, 256), before = tensors(sizes);
    for (size_t i = 0; i < sizes.size(); ++i) {
      for (auto member : {&Tensor::parameter, &Tensor::momentum, &Tensor::average}) {
        if (std::memcmp((one[i].*member).data(), (block[i].*member).data(), sizes[i] * sizeof(float)) != 0) {
          std::printf("tensor %zu differs\n", i);
          return 1;
        }
      }
      const bool averages = i % 4 != 2;
      for (int64_t e = 0; averages && e < sizes[i]; ++e) {  // every element was reached
        if (one[i].average[e] == before[i].average[e]) return std::printf("element %ld of %zu is old\n", long(e), i), 1;
      }
    }
  }
  std::puts("equal");
}
