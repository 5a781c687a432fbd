// Vectors of fp32 lanes, and numbers of fp32 or bf16 in memory. What a lane computes does not depend on its place.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace {

struct bf16 { uint16_t bits; };

#if defined(__AVX512F__)
constexpr int W = 16, COLUMNS = 4, ROWS = 6;  // lanes, and the vectors and rows of a register block
using V = __m512;
inline V zero() { return _mm512_setzero_ps(); }
inline V spread(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline V load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V divide(V a, V b) { return _mm512_div_ps(a, b); }
inline V root(V x) { return _mm512_sqrt_ps(x); }
inline V maximum(V a, V b) { return _mm512_max_ps(a, b); }
inline V where_below(V x, V limit, V yes, V no) {  // x < limit ? yes : no
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), no, yes);
}
inline V nearest(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V lanes() { return _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int W = 8, COLUMNS = 2, ROWS = 5;
using V = __m256;
inline V zero() { return _mm256_setzero_ps(); }
inline V spread(float x) { return _mm256_set1_ps(x); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline V load(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline void store(float* p, V x) { _mm256_storeu_ps(p, x); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V divide(V a, V b) { return _mm256_div_ps(a, b); }
inline V root(V x) { return _mm256_sqrt_ps(x); }
inline V maximum(V a, V b) { return _mm256_max_ps(a, b); }
inline V where_below(V x, V limit, V yes, V no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, limit, _CMP_LT_OQ));
}
inline V nearest(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V power_of_two(V n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline V lanes() { return _mm256_set_ps(7, 6, 5, 4, 3, 2, 1, 0); }
#else
#error "no vector unit that this kernel is written for"
#endif

inline float sum_of(V x) {
  float lane[W], total = 0;
  store(lane, x);
  for (int i = 0; i < W; i++) total += lane[i];
  return total;
}

inline float maximum_of(V x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float lane[W];
  store(lane, x);
  return *std::max_element(lane, lane + W);
#endif
}

// exp(x) for x <= 0, within 2 ulp; exactly 0 far below.
inline V exponential(V x) {
#if defined(__AVX512F__)
  const V y = maximum(x, spread(-200.0f));
#else
  const V low = spread(-87.0f), y = maximum(x, low);
#endif
  V n = nearest(mul(y, spread(1.44269504088896341f)));
  V r = fma(n, spread(-0.693359375f), y);
  r = fma(n, spread(2.12194440e-4f), r);
  V p = spread(1.9875691500e-4f);
  p = fma(p, r, spread(1.3981999507e-3f));
  p = fma(p, r, spread(8.3334519073e-3f));
  p = fma(p, r, spread(4.1665795894e-2f));
  p = fma(p, r, spread(1.6666665459e-1f));
  p = fma(p, r, spread(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, spread(1.0f)));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  return where_below(x, low, zero(), mul(p, power_of_two(n)));
#endif
}

inline float exponential(float x) {
  float lane[W];
  store(lane, exponential(spread(x)));
  return lane[0];
}

inline float value(float x) { return x; }
inline float value(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  p->bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline void store(bf16* p, V x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
#elif defined(__AVX512F__)
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  __m512i out = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd)), 16);
  out = _mm512_mask_mov_epi32(out, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(out));
#else
  float lane[W];
  store(lane, x);
  for (int i = 0; i < W; i++) put(p + i, lane[i]);
#endif
}

// x as it would come back from memory of type T
inline V rounded(V x, const float*) { return x; }
inline V rounded(V x, const bf16*) {
  bf16 kept[W];
  store(kept, x);
  return load(kept);
}

// The last `count` numbers of a row, with zeros behind them.
template <class T>
inline V load_some(const T* p, int64_t count) {
  T kept[W] = {};
  std::copy(p, p + count, kept);
  return load(kept);
}

template <class T>
inline void store_some(T* p, V x, int64_t count) {
  T kept[W];
  store(kept, x);
  std::copy(kept, kept + count, p);
}

// f(i, count) for the vectors of a row; all but the last have W numbers
template <class F>
inline void each(int64_t width, F f) {
  for (int64_t i = 0; i < width; i += W) f(i, std::min<int64_t>(W, width - i));
}

template <class T>
inline V take(const T* p, int64_t count) { return count == W ? load(p) : load_some(p, count); }

template <class T>
inline void give(T* p, V x, int64_t count) {
  if (count == W) store(p, x);
  else store_some(p, x, count);
}

}  // namespace
