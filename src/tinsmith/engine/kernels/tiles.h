// Products of small matrices that stay in the nearest cache, every element one chain of multiply-adds in the
// order of the summed dimension.
//
// Left sides are rows of fp32, or, where the processor multiplies bf16 by itself (DOTS), rows of bf16 whose
// neighbours go two at a time; the right side then stands in "pairs" [depth/2][width][2].

#pragma once

#include "vector.h"

namespace {

// c[M][N * W] = (more ? c : 0) + a[M][k] b[k][N * W]; a has any strides.
template <int M, int N, class T>
inline void block(float* c, int ldc, const float* a, int row, int column, const T* b, int ldb, int depth, bool more) {
  V sums[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sums[m][n] = more ? load(c + m * ldc + n * W) : zero();
  for (int k = 0; k < depth; k++) {
    V right[N];
    for (int n = 0; n < N; n++) right[n] = load(b + (int64_t)k * ldb + n * W);
    for (int m = 0; m < M; m++) {
      V left = spread(a[m * row + k * column]);
      for (int n = 0; n < N; n++) sums[m][n] = fma(left, right[n], sums[m][n]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(c + m * ldc + n * W, sums[m][n]);
}

template <int N, class T>
void rows(float* c, int ldc, const float* a, int row, int column, const T* b, int ldb, int count, int depth, bool more) {
  int m = 0;
  for (; m + ROWS <= count; m += ROWS) block<ROWS, N>(c + m * ldc, ldc, a + m * row, row, column, b, ldb, depth, more);
  float* to = c + m * ldc;
  const float* from = a + m * row;
  switch (count - m) {
    case 1: return block<1, N>(to, ldc, from, row, column, b, ldb, depth, more);
    case 2: return block<2, N>(to, ldc, from, row, column, b, ldb, depth, more);
    case 3: return block<3, N>(to, ldc, from, row, column, b, ldb, depth, more);
    case 4: return block<4, N>(to, ldc, from, row, column, b, ldb, depth, more);
    case 5: return block<5, N>(to, ldc, from, row, column, b, ldb, depth, more);
  }
}

// c[count][width] = (more ? c : 0) + a[count][depth] b[depth][width], width a multiple of W.
template <class T>
void product(float* c, int ldc, const float* a, int row, int column, const T* b, int ldb, int count, int width,
             int depth, bool more) {
  int n = 0;
  for (; n + COLUMNS * W <= width; n += COLUMNS * W)
    rows<COLUMNS>(c + n, ldc, a, row, column, b + n, ldb, count, depth, more);
  for (; n < width; n += W) rows<1>(c + n, ldc, a, row, column, b + n, ldb, count, depth, more);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
constexpr bool DOTS = true;

// to[2 i], to[2 i + 1] = even[i], odd[i], W of each, rounded
inline void store_pairs(bf16* to, V even, V odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

using Two = uint32_t;  // two neighbouring numbers of bf16

template <int M, int N>
inline void dot_block(float* c, int ldc, const Two* a, int row, int column, const Two* b, int ldb, int depth,
                      bool more) {
  V sums[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sums[m][n] = more ? load(c + m * ldc + n * W) : zero();
  for (int k = 0; k < depth; k++) {
    __m512i right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) right[n] = _mm512_loadu_si512(b + (int64_t)k * ldb + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const __m512i left = _mm512_set1_epi32((int)a[m * row + k * column]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], (__m512bh)left, (__m512bh)right[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(c + m * ldc + n * W, sums[m][n]);
}

template <int N>
void dot_rows(float* c, int ldc, const Two* a, int row, int column, const Two* b, int ldb, int count, int depth,
              bool more) {
  int m = 0;
  for (; m + 6 <= count; m += 6) dot_block<6, N>(c + m * ldc, ldc, a + m * row, row, column, b, ldb, depth, more);
  float* to = c + m * ldc;
  const Two* from = a + m * row;
  switch (count - m) {
    case 1: return dot_block<1, N>(to, ldc, from, row, column, b, ldb, depth, more);
    case 2: return dot_block<2, N>(to, ldc, from, row, column, b, ldb, depth, more);
    case 3: return dot_block<3, N>(to, ldc, from, row, column, b, ldb, depth, more);
    case 4: return dot_block<4, N>(to, ldc, from, row, column, b, ldb, depth, more);
    case 5: return dot_block<5, N>(to, ldc, from, row, column, b, ldb, depth, more);
  }
}

// c[count][width] = (more ? c : 0) + a[count][2 depth] b[2 depth][width], width a multiple of W; a, row and column
// count pairs, so do depth and ldb.
inline void dot_product(float* c, int ldc, const bf16* a, int row, int column, const bf16* b, int ldb, int count,
                        int width, int depth, bool more) {
  const Two *left = (const Two*)a, *right = (const Two*)b;
  int n = 0;
  for (; n + 4 * W <= width; n += 4 * W)
    dot_rows<4>(c + n, ldc, left, row, column, right + n, ldb, count, depth, more);
  for (; n + 2 * W <= width; n += 2 * W)
    dot_rows<2>(c + n, ldc, left, row, column, right + n, ldb, count, depth, more);
  for (; n < width; n += W) dot_rows<1>(c + n, ldc, left, row, column, right + n, ldb, count, depth, more);
}
#else
constexpr bool DOTS = false;
inline void store_pairs(bf16*, V, V) {}
inline void dot_product(float*, int, const bf16*, int, int, const bf16*, int, int, int, int, bool) {}
#endif

// to[r / 2][width][2] = rows r and r + 1 of from [count][width]; a last odd row has zeros beside it.
inline void pair_rows(bf16* to, const bf16* from, int64_t stride, int count, int width, int pad) {
  for (int r = 0; r < count; r += 2) {
    const bf16 *even = from + r * stride, *odd = even + stride;
    const bool both = r + 1 < count;
    bf16* out = to + (int64_t)(r / 2) * pad * 2;
    for (int d = 0; d < width; d++) out[2 * d] = even[d], out[2 * d + 1] = both ? odd[d] : bf16{0};
    for (int d = 2 * width; d < 2 * pad; d++) out[d] = bf16{0};
  }
}

}  // namespace
