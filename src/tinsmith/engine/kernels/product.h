// Products of bf16 matrices by the instruction that multiplies pairs: what lora.cpp and linear.cpp share.
//
// "Pairs" [K/2][N] hold a matrix [K][N] of bf16 with rows 2k and 2k+1 interleaved: a vector register is then
// 16 columns of two rows, which is what the instruction multiplies with two neighbouring numbers of the other side.
// Adapters' pairs stand in panels of PANEL columns, one after the other, the last as narrow as it is: whoever reads
// some columns of all rows reads them from one place.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <immintrin.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define TINSMITH_PAIRS 1

namespace {

using u16 = uint16_t;
using u32 = uint32_t;
constexpr int LANES = 16;  // columns of a register
constexpr int64_t PANEL = 64;

inline __m512 dot(__m512 sum, __m512i pairs, __m512i spread) {
  return _mm512_dpbf16_ps(sum, (__m512bh)spread, (__m512bh)pairs);
}
inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512i both(const u16* x) { return _mm512_set1_epi32(*(const int32_t*)x); }

// In pairs of so many rows and `n` columns: where column c begins, and what lies between its rows.
inline int64_t panel_of(int64_t c, int64_t pairs) { return c / PANEL * PANEL * pairs + c % PANEL; }
inline int64_t panel_stride(int64_t c, int64_t n) {
  return std::min(PANEL, (n + LANES - 1) / LANES * LANES - c / PANEL * PANEL);
}

// f(std::integral_constant<int, n>) for n = count, which is from 1 to MOST
template <int MOST, class F>
inline void with_count(int64_t count, F f) {
  if constexpr (MOST > 1)
    if (count < MOST) return with_count<MOST - 1>(count, f);
  f(std::integral_constant<int, MOST>());
}

}  // namespace
#endif
