// The products of LoRA adapters on a CPU with bf16 instructions: for every adapter of a pass its own rows, all
// of them in one call.
//
// Every element of a result is one chain of dot products of pairs, in the order of the summed dimension, kept in
// fp32 and rounded once. So it depends neither on how many rows share a call nor on which.

#include "product.h"

#include <vector>

#if TINSMITH_PAIRS

namespace {

constexpr int W = LANES;

// y[ROWS][COLS * 16] = (add ? y : 0) + x[ROWS][k] * w, pairs of `stride` columns; the last vector has `mask`.
template <int ROWS, int COLS>
inline void block(const u16* x, int64_t ldx, const u32* w, int64_t stride, int64_t k, u16* y, int64_t ldy,
                  bool add, __mmask16 mask) {
  __m512 sum[ROWS][COLS];
#pragma GCC unroll 32
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int c = 0; c < COLS; c++) sum[r][c] = _mm512_setzero_ps();
  for (int64_t i = 0; i < k / 2; i++) {
    __m512i pairs[COLS];
#pragma GCC unroll 4
    for (int c = 0; c < COLS; c++) pairs[c] = _mm512_loadu_si512(w + i * stride + c * W);
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++) {
      const __m512i two = _mm512_set1_epi32(*(const int32_t*)(x + r * ldx + 2 * i));
#pragma GCC unroll 4
      for (int c = 0; c < COLS; c++) sum[r][c] = dot(sum[r][c], pairs[c], two);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int c = 0; c < COLS; c++) {
      u16* out = y + r * ldy + c * W;
      const __mmask16 m = c == COLS - 1 ? mask : (__mmask16)0xffff;
      __m512 total = sum[r][c];
      if (add) total = _mm512_add_ps(total, widen(_mm256_maskz_loadu_epi16(m, out)));
      _mm256_mask_storeu_epi16(out, m, (__m256i)_mm512_cvtneps_pbh(total));
    }
}

template <int COLS, int ROWS>
inline void columns(const u16* x, int64_t ldx, const u32* w, int64_t stride, int64_t k, u16* y, int64_t ldy,
                    int64_t rows, bool add, __mmask16 mask) {
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) block<ROWS, COLS>(x + r * ldx, ldx, w, stride, k, y + r * ldy, ldy, add, mask);
  for (; r + 4 <= rows; r += 4) block<4, COLS>(x + r * ldx, ldx, w, stride, k, y + r * ldy, ldy, add, mask);
  for (; r < rows; r++) block<1, COLS>(x + r * ldx, ldx, w, stride, k, y + r * ldy, ldy, add, mask);
}

// y[rows][n] = (add ? y : 0) + x[rows][k] * w
void product(const u16* x, int64_t ldx, const u32* w, int64_t k, int64_t n, u16* y, int64_t ldy, int64_t rows,
             bool add) {
  const int64_t padded = (n + W - 1) / W * W;
  const __mmask16 last = n % W ? (__mmask16)((1u << (n % W)) - 1) : (__mmask16)0xffff;
  for (int64_t c = 0; c < padded;) {
    const int64_t left = padded - c, stride = panel_stride(c, n);
    const u32* from = w + panel_of(c, k / 2);
    const int64_t taken = left >= 4 * W ? 4 * W : left >= 2 * W ? 2 * W : W;
    const __mmask16 mask = taken == left ? last : (__mmask16)0xffff;
    if (taken == 4 * W) columns<4, 6>(x, ldx, from, stride, k, y + c, ldy, rows, add, mask);
    else if (taken == 2 * W) columns<2, 12>(x, ldx, from, stride, k, y + c, ldy, rows, add, mask);
    else columns<1, 24>(x, ldx, from, stride, k, y + c, ldy, rows, add, mask);
    c += taken;
  }
}

// One adapter's rows: z = x * first, y += z * second.
struct Chain {
  const u16* x;
  int64_t ldx, rows, k;
  const u32* first;
  int64_t rank;
  u16* z;
  const u32* second;
  int64_t n;
  u16* y;
  int64_t ldy;
};

constexpr int64_t TILE = 48;  // rows that one thread takes at a time

struct Gradient {
  const u16 *x, *dz, *dy, *z;
  int64_t ldx, ldy, rows, padded, rank;
  float *a, *b;
};

constexpr int R = 8;  // ranks of a register block of gradients

constexpr int64_t DEPTH = 512;  // rows whose 32 columns are taken together out of a matrix, into the nearest cache

// target[c][r] (or [r][c] where transposed) += scale * sum over rows of x[row][c] * z[row][r], for 32 columns.
void outer(const u16* x, int64_t ldx, const u32* z, int64_t rows, int64_t padded, int64_t rank, int64_t width,
           float* target, int64_t ld, bool transposed, float scale) {
  alignas(64) static const u16 low[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  alignas(64) static const u16 high[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                           24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i to_low = _mm512_load_si512(low), to_high = _mm512_load_si512(high);
  const __mmask32 mask = width >= 32 ? 0xffffffffu : (1u << width) - 1;
  alignas(64) u32 pairs[DEPTH / 2][2 * W];
  for (int64_t start = 0; start < rows; start += DEPTH) {
    const int64_t deep = std::min(DEPTH, rows - start) / 2;
    for (int64_t i = 0; i < deep; i++) {
      const __m512i even = _mm512_maskz_loadu_epi16(mask, x + (start + 2 * i) * ldx);
      const __m512i odd = _mm512_maskz_loadu_epi16(mask, x + (start + 2 * i + 1) * ldx);
      _mm512_store_si512(pairs[i], _mm512_permutex2var_epi16(even, to_low, odd));
      _mm512_store_si512(pairs[i] + W, _mm512_permutex2var_epi16(even, to_high, odd));
    }
    for (int64_t first = 0; first < rank; first += R) {
      __m512 sum[R][2];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
      const u32* two = z + start / 2 * padded + first;
      for (int64_t i = 0; i < deep; i++, two += padded) {
        const __m512i left = _mm512_load_si512(pairs[i]), right = _mm512_load_si512(pairs[i] + W);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const __m512i both = _mm512_set1_epi32((int)two[r]);
          sum[r][0] = dot(sum[r][0], left, both);
          sum[r][1] = dot(sum[r][1], right, both);
        }
      }
      const __m512 factor = _mm512_set1_ps(scale);
      alignas(64) float out[R][32];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        _mm512_store_ps(out[r], _mm512_mul_ps(sum[r][0], factor));
        _mm512_store_ps(out[r] + W, _mm512_mul_ps(sum[r][1], factor));
      }
      const int64_t count = std::min<int64_t>(R, rank - first), wide = std::min<int64_t>(width, 32);
      if (transposed) {
        for (int64_t r = 0; r < count; r++)
          for (int64_t c = 0; c < wide; c++) target[(first + r) * ld + c] += out[r][c];
      } else {
        for (int64_t c = 0; c < wide; c++)
          for (int64_t r = 0; r < count; r++) target[c * ld + first + r] += out[r][c];
      }
    }
  }
}

constexpr int64_t BAND = 32;  // numbers of a side of a matrix that are rearranged together

// to[i] = bf16(scale * from[i]), n a multiple of 16 or masked at the end
inline void round_row(u16* to, const float* from, int64_t n, float scale) {
  const __m512 by = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < n; i += LANES) {
    const __mmask16 m = n - i < LANES ? (__mmask16)((1u << (n - i)) - 1) : (__mmask16)0xffff;
    _mm256_mask_storeu_epi16(to + i, m, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_maskz_loadu_ps(m, from + i), by)));
  }
}

// An adapter's A [rank][in] and scaled B [out][rank] as pairs: of A^T and B^T for the way forward, and of B and A,
// where wanted, for the way back. The rank is padded with zeros, so are columns.
struct Pack {
  const float *a, *b;
  int64_t in, out;
  u32 *a_turned, *b_turned, *b_plain, *a_plain;
};

inline __mmask16 first_lanes(int64_t n) { return n >= LANES ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1); }

// to[c][r] = from[r][c], for r < rows and c < columns, 16 of each at most
inline void turn(const u32* from, int64_t ldf, u32* to, int64_t ldt, int64_t rows, int64_t columns) {
  __m512i x[16], y[16];
  const __mmask16 wide = first_lanes(columns), high = first_lanes(rows);
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++) x[r] = r < rows ? _mm512_maskz_loadu_epi32(wide, from + r * ldf) : _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    y[r] = _mm512_unpacklo_epi32(x[r], x[r + 1]);
    y[r + 1] = _mm512_unpackhi_epi32(x[r], x[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4)  // x[r + i] has column 4 l + i of rows r to r + 3 in its part l
    for (int i = 0; i < 2; i++) {
      x[r + 2 * i] = _mm512_unpacklo_epi64(y[r + i], y[r + 2 + i]);
      x[r + 2 * i + 1] = _mm512_unpackhi_epi64(y[r + i], y[r + 2 + i]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);            // parts 0 and 2 of rows 0 to 7
    y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);        // parts 1 and 3
    y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);   // the same of rows 8 to 15
    y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
    x[8 + i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
    x[4 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88);
    x[12 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 16; c++)
    if (c < columns) _mm512_mask_storeu_epi32(to + c * ldt, high, x[c]);
}

// to[i] = even[i], odd[i] as a pair, 16 at most
inline void pair_up(u32* to, const u16* even, const u16* odd, int64_t n) {
  const __mmask16 m = first_lanes(n);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, even));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, odd));
  _mm512_mask_storeu_epi32(to, m, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// Columns [c, c + wide) of A.
void pack_a(const Pack& p, int64_t c, int64_t wide, int64_t rank, int64_t padded, u16* band) {
  const int64_t stride = (p.in + LANES - 1) / LANES * LANES, kept = std::min(BAND, stride - c);
  std::fill(band, band + padded * BAND, 0);
  for (int64_t r = 0; r < rank; r++) round_row(band + r * BAND, p.a + r * p.in + c, wide, 1.0f);
  for (int64_t r = 0; r < padded; r += LANES) {
    const int64_t step = panel_stride(r, padded);
    u32* to = p.a_turned + panel_of(r, p.in / 2) + c / 2 * step;
    turn((const u32*)(band + r * BAND), BAND / 2, to, step, std::min<int64_t>(LANES, padded - r), wide / 2);
  }
  if (p.a_plain)
    for (int64_t k = 0; k < padded / 2; k++) {
      const u16 *even = band + 2 * k * BAND, *odd = even + BAND;
      u32* to = p.a_plain + panel_of(c, padded / 2) + k * panel_stride(c, p.in);
      for (int64_t i = 0; i < kept; i += LANES) pair_up(to + i, even + i, odd + i, kept - i);
    }
}

// Rows [c, c + wide) of B.
void pack_b(const Pack& p, int64_t c, int64_t wide, int64_t rank, int64_t padded, float scale, u16* band) {
  const int64_t stride = (p.out + LANES - 1) / LANES * LANES, kept = std::min(BAND, stride - c);
  std::fill(band, band + padded * BAND, 0);
  for (int64_t r = 0; r < wide; r++) round_row(band + r * padded, p.b + (c + r) * rank, rank, scale);
  const int64_t step = panel_stride(c, p.out);
  for (int64_t k = 0; k < padded / 2; k += LANES)
    for (int64_t i = 0; i < kept; i += LANES)
      turn((const u32*)(band + i * padded) + k, padded / 2, p.b_turned + panel_of(c, padded / 2) + k * step + i, step,
           std::min<int64_t>(LANES, kept - i), std::min<int64_t>(LANES, padded / 2 - k));
  if (p.b_plain)
    for (int64_t k = 0; k < wide / 2; k++) {
      const u16 *even = band + 2 * k * padded, *odd = even + padded;
      for (int64_t r = 0; r < padded; r += LANES)
        pair_up(p.b_plain + panel_of(r, p.out / 2) + (c / 2 + k) * panel_stride(r, padded), even + r, odd + r, padded - r);
    }
}

// rows 2i and 2i+1 of z [rows][width], interleaved
void pair_rows(const u16* z, int64_t rows, int64_t width, u32* out) {
  for (int64_t i = 0; i < rows / 2; i++)
    for (int64_t c = 0; c < width; c++)
      out[i * width + c] = (u32)z[2 * i * width + c] | (u32)z[(2 * i + 1) * width + c] << 16;
}

}  // namespace

extern "C" {

int lora_usable() { return 1; }

// Adapters' matrices for both ways; `in` and `out` are even.
void lora_pack(const Pack* packs, int count, int64_t rank, int64_t padded, float scale, int threads) {
  struct Task { int pack; bool second; int64_t from; };
  std::vector<Task> tasks;
  for (int i = 0; i < count; i++) {
    for (int64_t c = 0; c < packs[i].in; c += BAND) tasks.push_back({i, false, c});
    for (int64_t c = 0; c < packs[i].out; c += BAND) tasks.push_back({i, true, c});
  }
  const int64_t total = (int64_t)tasks.size();
#pragma omp parallel num_threads(threads) if (total > 16)
  {
    std::vector<u16> band(padded * BAND);
#pragma omp for schedule(dynamic, 16)
    for (int64_t t = 0; t < total; t++) {
      const Pack& p = packs[tasks[t].pack];
      const int64_t c = tasks[t].from;
      if (tasks[t].second) pack_b(p, c, std::min(BAND, p.out - c), rank, padded, scale, band.data());
      else pack_a(p, c, std::min(BAND, p.in - c), rank, padded, band.data());
    }
  }
}

// Each chain's rows, tile after tile. No two chains may write the same elements.
void lora_chains(const Chain* chains, int count, int threads) {
  std::vector<std::pair<int, int64_t>> tiles;
  for (int i = 0; i < count; i++)
    for (int64_t row = 0; row < chains[i].rows; row += TILE) tiles.emplace_back(i, row);
  const int64_t total = (int64_t)tiles.size();
#pragma omp parallel for schedule(static) num_threads(threads) if (total > 1)
  for (int64_t t = 0; t < total; t++) {
    const Chain& c = chains[tiles[t].first];
    const int64_t row = tiles[t].second, rows = std::min(TILE, c.rows - row);
    u16* z = c.z + row * c.rank;
    product(c.x + row * c.ldx, c.ldx, c.first, c.k, c.rank, z, c.rank, rows, false);
    if (c.y) product(z, c.rank, c.second, c.rank, c.n, c.y + row * c.ldy, c.ldy, rows, true);
  }
}

// a[rank][in] += dz^T x and b[out][rank] += scale * dy^T z, block after block in their order.
void lora_gradients(const Gradient* blocks, const float* scales, int count, int64_t in, int64_t out, int threads) {
  std::vector<int64_t> at(count + 1, 0);
  for (int i = 0; i < count; i++) at[i + 1] = at[i] + blocks[i].rows / 2 * blocks[i].padded;
  u32* pairs = (u32*)std::aligned_alloc(64, (2 * at[count] * sizeof(u32) + 127) / 64 * 64);
  u32 *of_dz = pairs, *of_z = pairs + at[count];
  const int64_t left = (in + 31) / 32, right = (out + 31) / 32;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int i = 0; i < 2 * count; i++) {
      const Gradient& g = blocks[i / 2];
      pair_rows(i % 2 ? g.z : g.dz, g.rows, g.padded, (i % 2 ? of_z : of_dz) + at[i / 2]);
    }
#pragma omp for schedule(dynamic, 4)
    for (int64_t t = 0; t < left + right; t++)
      for (int i = 0; i < count; i++) {
        const Gradient& g = blocks[i];
        if (t < left) {
          const int64_t c = t * 32;
          outer(g.x + c, g.ldx, of_dz + at[i], g.rows, g.padded, g.rank, in - c, g.a + c, in, true, 1.0f);
        } else {
          const int64_t c = (t - left) * 32;
          outer(g.dy + c, g.ldy, of_z + at[i], g.rows, g.padded, g.rank, out - c, g.b + c * g.rank, g.rank, false,
                scales[i]);
        }
      }
  }
  std::free(pairs);
}

}  // extern "C"

#else

extern "C" int lora_usable() { return 0; }

#endif
