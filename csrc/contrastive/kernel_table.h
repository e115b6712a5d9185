// Defines the table of the instruction set that the including file has set up.
#pragma once

#include "bacon_loss/kernels.h"
#include "contrastive/family_kernels.h"
#include "contrastive/kernels.h"

namespace bacon_fast::contrastive {
namespace {

template <class T>
constexpr Kernels<T> kTable = {
    normalize_range<T>,     bacon_sums<T>,        bacon_gradient<T>,     family_sums<T>,
    family_row_gradient<T>, family_own_logits<T>, family_finish_rows<T>, family_column_gradient<T>,
};

}  // namespace
}  // namespace bacon_fast::contrastive
