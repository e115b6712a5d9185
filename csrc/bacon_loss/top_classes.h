// The classes of the largest logits of a row.
#pragma once

#include <cstdint>

namespace bacon_fast::contrastive {

// Writes the k classes of the largest logits, largest first. Returns false, with nothing written, if the values do not
// determine their order or choice: equal logits among the first k+1, or a NaN. The result of torch.topk then follows
// from the details of its partial sort, so the caller asks torch.topk itself.
template <class Logit, class Code>
bool top_classes(const Logit* logits, std::int64_t num_classes, std::int64_t k, Code* codes, std::int64_t stride) {
  constexpr std::int64_t kMost = 8;
  if (k >= kMost) return false;
  Logit best[kMost + 1] = {};  // the k+1 largest so far, largest first
  std::int64_t found = 0;
  Code chosen[kMost + 1];
  for (std::int64_t c = 0; c < num_classes; ++c) {
    const Logit logit = logits[c];
    if (found > k && logit < best[k]) continue;
    if (logit != logit) return false;
    std::int64_t place = found > k ? k : found++;
    for (; place > 0 && best[place - 1] < logit; --place) {
      best[place] = best[place - 1];
      chosen[place] = chosen[place - 1];
    }
    best[place] = logit;
    chosen[place] = static_cast<Code>(c);
  }
  for (std::int64_t t = 1; t < found; ++t) {
    if (best[t] == best[t - 1]) return false;
  }
  for (std::int64_t t = 0; t < k; ++t) codes[t * stride] = chosen[t];
  return true;
}

}  // namespace bacon_fast::contrastive
