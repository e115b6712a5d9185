// The inner loops, compiled once for each instruction set; `kernels` picks the set for the machine it runs on.
#pragma once

#include "bacon_loss/batch.h"
#include "contrastive/family.h"
#include "contrastive/layout.h"

namespace bacon_fast::contrastive {

template <class T>
struct Kernels {
  void (*normalize)(const Normalization<T>&, std::int64_t begin, std::int64_t end);  // vectors
  // Units of kRowUnit rows.
  void (*bacon_sums)(const BaconBatch<T>&, std::int64_t begin, std::int64_t end);
  void (*bacon_gradient)(const BaconBatch<T>&, std::int64_t begin, std::int64_t end);
  // Units of kVectorUnit rows.
  void (*family_sums)(const Family<T>&, std::int64_t chunk, std::int64_t begin, std::int64_t end);
  void (*family_row_gradient)(const Family<T>&, std::int64_t chunk, std::int64_t begin, std::int64_t end);
  // Rows.
  void (*family_own_logits)(const Family<T>&, std::int64_t begin, std::int64_t end);
  void (*family_finish_rows)(const Family<T>&, std::int64_t begin, std::int64_t end);
  // Units of kVectorUnit columns.
  void (*family_column_gradient)(const Family<T>&, std::int64_t begin, std::int64_t end);
};

// T is float or double. Honors ATEN_CPU_CAPABILITY ("default", "avx2", "avx512") as torch itself does.
template <class T>
const Kernels<T>& kernels();

}  // namespace bacon_fast::contrastive
