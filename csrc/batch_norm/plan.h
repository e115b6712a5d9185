// How one launch of BatchNorm on a GPU divides [rows, channels] among thread blocks, and what a block keeps in its
// shared memory between the two passes over its rows. Rows are pixels: memory is channels_last.
#pragma once

#include <algorithm>
#include <cstdint>

namespace bacon_fast::norm {

constexpr int kVectorBytes = 16;    // that a thread reads or writes at once
constexpr int kMostChannels = 32;   // of a block: 64 bytes of a row in half precision are read as fast as more
constexpr int kChannelVectors = 5;  // per-channel values that the second pass reads

struct Plan {
  int64_t rows, channels, rows_per_split;
  int splits, channel_blocks;  // of blocks: the grid
  int block_channels;          // a power of two
  int groups;                  // rows that the threads of a block treat at once
  int held[2];                 // vectors that a thread keeps: of the sum that is normalized, and of its gradient
  int64_t shared_bytes;
  bool is_one_launch;

  bool is_empty() const { return splits == 0; }
  int64_t blocks() const { return int64_t{splits} * channel_blocks; }
  int64_t partial_size() const { return 2 * blocks() * block_channels; }  // numbers that blocks leave for each other
};

// Of a GPU, or of what stands in for one.
struct Machine {
  int threads, multiprocessors;  // threads: of a block
  int64_t shared_limit;          // bytes of a block
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Numbers in shared memory beside the kept rows: partial sums of `parts` groups or splits twice, those of the lanes, and
// the vectors by channel.
inline int64_t scratch_size(const Plan& plan, int threads, int64_t parts) {
  return 2 * parts * plan.block_channels + threads + kChannelVectors * plan.block_channels;
}

// Blocks for every multiprocessor, as far as there are rows. `tensors`: 1 (forward) or 2 (backward) whose vectors are
// kept as far as they fit, the others being read again by the second pass; 0: none. A block reads the partial sums of all
// splits into its memory, which may leave room for fewer of them. Empty: more blocks of channels than multiprocessors,
// which matters where blocks wait for each other, or too little memory for a block's own partial sums.
inline Plan make_plan(int64_t rows, int64_t channels, int64_t scalar_bytes, int64_t accumulator_bytes, int tensors,
                      const Machine& machine) {
  Plan plan{};
  plan.rows = rows;
  plan.channels = channels;
  const int vector = static_cast<int>(kVectorBytes / scalar_bytes);
  plan.block_channels = vector;
  while (plan.block_channels < std::min<int64_t>(channels, kMostChannels)) plan.block_channels *= 2;
  plan.groups = machine.threads / (plan.block_channels / vector);
  plan.channel_blocks = static_cast<int>(divide_up(channels, plan.block_channels));
  const int64_t numbers = machine.shared_limit / accumulator_bytes - scratch_size(plan, machine.threads, 0);
  const int64_t parts = numbers / (2 * plan.block_channels);
  const int64_t most = std::min<int64_t>(machine.multiprocessors / plan.channel_blocks, parts);
  if (parts < plan.groups || (most == 0 && tensors > 0)) return Plan{};
  const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(most, divide_up(rows, plan.groups)));
  plan.rows_per_split = divide_up(rows, wanted);
  plan.splits = static_cast<int>(divide_up(rows, plan.rows_per_split));

  const int64_t own_parts = std::max(plan.groups, plan.splits);
  const int64_t scratch = scratch_size(plan, machine.threads, own_parts) * accumulator_bytes;
  const int64_t bytes = int64_t{machine.threads} * kVectorBytes, own = divide_up(plan.rows_per_split, plan.groups);
  int64_t fit = (machine.shared_limit - scratch) / bytes;
  for (int tensor = 0; tensor < tensors; ++tensor) {
    plan.held[tensor] = static_cast<int>(std::min(own, fit));
    fit -= plan.held[tensor];
  }
  plan.shared_bytes = scratch + (plan.held[0] + plan.held[1]) * bytes;
  plan.is_one_launch = tensors > 0;
  return plan;
}

// One launch where all its blocks run at once, of which is_resident(plan) has to be sure; else two.
template <class IsResident>
Plan choose_plan(int64_t rows, int64_t channels, int64_t scalar_bytes, int64_t accumulator_bytes, int tensors,
                 const Machine& machine, const IsResident& is_resident) {
  const Plan plan = make_plan(rows, channels, scalar_bytes, accumulator_bytes, tensors, machine);
  if (!plan.is_empty() && is_resident(plan)) return plan;
  return make_plan(rows, channels, scalar_bytes, accumulator_bytes, 0, machine);
}

}  // namespace bacon_fast::norm
