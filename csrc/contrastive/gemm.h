// Small matrix products on tiles: the inner loops of every similarity and every gradient here.
#pragma once

#include "contrastive/layout.h"
#include "contrastive/simd.h"

namespace bacon_fast::contrastive {
namespace {

// Rows that one micro-kernel computes together: with two vectors a row the sums fill half the registers of AVX-512, or
// half of the sixteen of AVX2, enough independent sums to hide the latency of a multiply-add.
constexpr int kTileRows = BACON_FAST_VECTOR_BYTES == 64 ? 8 : 4;
static_assert(kRowUnit % kTileRows == 0);

// Columns of one packed panel: two vectors.
template <class T>
constexpr int kPanel = 2 * kLanes<T>;

// c[i, :] (+)= sum over k of a[i, k] · b[k, :], for kTileRows rows i and kVectors vectors of columns. a is read one
// element at a time, so any strides do; a row of b must be contiguous.
template <class T, int kVectors>
BACON_FAST_INLINE void multiply_tile(
    std::int64_t depth, const T* a, std::int64_t a_row, std::int64_t a_step, const T* b, std::int64_t b_step, T* c,
    std::int64_t c_row, bool accumulate) {
  using V = Vector<T>;
  V sums[kTileRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = accumulate ? load<V>(c + i * c_row + v * kLanes<T>) : V{};
    }
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    V right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load<V>(b + k * b_step + v * kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const T left = a[i * a_row + k * a_step];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[i][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + i * c_row + v * kLanes<T>, sums[i][v]);
  }
}

// Similarities of kTileRows unit rows and of whole panels of unit columns: out[i, j] = units[i] · column j.
template <class T>
void similarity_tile(
    std::int64_t dim, const T* units, std::int64_t units_row, const T* panels, std::int64_t num_panels, T* out,
    std::int64_t out_row) {
  for (std::int64_t panel = 0; panel < num_panels; ++panel) {
    multiply_tile<T, 2>(
        dim, units, units_row, 1, panels + panel * dim * kPanel<T>, kPanel<T>, out + panel * kPanel<T>, out_row, false);
  }
}

// out[i, :] += sum over k of weights[i, k] · vectors[k, :] for kTileRows rows i; width is a multiple of kLanes.
template <class T>
void combine_tile(
    std::int64_t depth, const T* weights, std::int64_t weights_row, std::int64_t weights_step, const T* vectors,
    std::int64_t vectors_row, std::int64_t width, T* out, std::int64_t out_row) {
  std::int64_t column = 0;
  for (; column + kPanel<T> <= width; column += kPanel<T>) {
    multiply_tile<T, 2>(
        depth, weights, weights_row, weights_step, vectors + column, vectors_row, out + column, out_row, true);
  }
  for (; column < width; column += kLanes<T>) {
    multiply_tile<T, 1>(
        depth, weights, weights_row, weights_step, vectors + column, vectors_row, out + column, out_row, true);
  }
}

}  // namespace
}  // namespace bacon_fast::contrastive
