// The products of a model's own weights, for the few rows of a sampling step: y = x W^T + b, and what each row's
// adapter adds. The weights are read once, from memory, in the order in which they lie there; that is the time
// that it takes.
//
// Every element is one chain of dot products of pairs in the order of the summed dimension, kept in fp32; after
// `depth` of them it is added to the sum so far, which is how the library adds whose product the trainer takes. So
// it has that product's bits (exactness.py finds the depth, and tries), whatever number of rows share a call.

#include "product.h"

#include <cstring>
#include <omp.h>
#include <type_traits>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#if TINSMITH_PAIRS

namespace {

constexpr int M = 8, N = 2;               // rows and vectors of a register block
constexpr int64_t COLUMNS = N * LANES;    // of a tile; a packed matrix is [tiles][K/2][COLUMNS] pairs
constexpr int64_t ROWS = 64;              // of x that meet a tile before the next rows do
constexpr int64_t CHAIN_ROWS = 32;        // of an adapter's first product that one thread takes at a time

struct Product {
  const u16* x;
  int64_t ldx;
  int64_t k, n;
  int64_t depth;
  const u32* packed;
  const u16* bias;
  u16* y;
  int64_t ldy;
  int64_t slot;  // in the tables of adapters
};

struct Factors {  // of one adapter for one product: pairs [k/2][rank] of A^T, and [rank/2][n] of the scaled B^T
  const u32* first;
  const u32* second;
  int64_t rank;
};

struct Segment {  // rows [start, stop) that meet one adapter
  int64_t start, stop;
  const Factors* adapter;  // by slot
};

// sums[R][N] of x [R][2 * pairs] and one tile's pairs, which lie `stride` apart. While it works, `vectors` of what
// comes next are fetched for every pair.
template <int R>
inline void block(const u16* x, int64_t ldx, const u32* w, int64_t stride, int64_t pairs, __m512 (&sum)[R][N],
                  const char* next, int vectors) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int c = 0; c < N; c++) sum[r][c] = _mm512_setzero_ps();
  for (int64_t i = 0; i < pairs; i++) {
    if (vectors > 0) _mm_prefetch(next + i * 64 * vectors, _MM_HINT_T1);
    if (vectors > 1) _mm_prefetch(next + i * 64 * vectors + 64, _MM_HINT_T1);
    __m512i right[N];
#pragma GCC unroll 2
    for (int c = 0; c < N; c++) right[c] = _mm512_loadu_si512(w + i * stride + c * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512i left = both(x + r * ldx + 2 * i);
#pragma GCC unroll 2
      for (int c = 0; c < N; c++) sum[r][c] = dot(sum[r][c], right[c], left);
    }
  }
}

// The same where there is one vector of columns; the sums of the others are zero.
template <int R>
inline void narrow_block(const u16* x, int64_t ldx, const u32* w, int64_t stride, int64_t pairs, __m512 (&sum)[R][N]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int c = 0; c < N; c++) sum[r][c] = _mm512_setzero_ps();
  for (int64_t i = 0; i < pairs; i++) {
    const __m512i right = _mm512_loadu_si512(w + i * stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sum[r][0] = dot(sum[r][0], right, both(x + r * ldx + 2 * i));
  }
}

inline const Factors* factors(const Segment& s, int64_t slot) {
  return s.adapter != nullptr && s.adapter[slot].first != nullptr ? s.adapter + slot : nullptr;
}

inline __mmask16 lanes_of(int64_t left) { return left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1); }

// y[rows][columns of one tile], adapters included. z: each segment's first product, [row of the pass][rank].
void tile(const Product& p, int64_t column, int64_t first_row, int64_t rows, const Segment* segments, int64_t count,
          const u16* const* z, const char* next) {
  alignas(64) float sums[ROWS * COLUMNS];
  const int64_t stride = panel_stride(column, p.n);  // of the adapters
  for (int64_t s = 0; s < count; s++)  // what they add comes last, and from far away
    if (const Factors* f = factors(segments[s], p.slot))
      for (int64_t i = 0; i < f->rank / 2; i++)
        for (int c = 0; c < N; c++)
          _mm_prefetch((const char*)(f->second + panel_of(column, f->rank / 2) + i * stride + c * LANES), _MM_HINT_T1);
  const u32* w = p.packed + column * (p.k / 2);
  const int64_t passes = (rows + M - 1) / M;
  for (int64_t k = 0; k < p.k; k += p.depth) {
    const int64_t pairs = std::min(p.depth, p.k - k) / 2;
    const u32* from = w + k / 2 * COLUMNS;
    const bool last = k + p.depth >= p.k;
    const char* ahead = last ? next : (const char*)(from + pairs * COLUMNS);
    int64_t pass = 0;
    for (int64_t r = 0; r < rows; r += M, pass++) {
      // What comes next is fetched in the first passes over this: all of it in one, or half of it in each of two.
      const int vectors = ahead == nullptr ? 0 : passes == 1 ? 2 : pass < 2 ? 1 : 0;
      with_count<M>(std::min<int64_t>(M, rows - r), [&](auto number) {
        constexpr int R = number;
        __m512 sum[R][N];
        block<R>(p.x + (first_row + r) * p.ldx + k, p.ldx, from, COLUMNS, pairs, sum, ahead + pass * pairs * 64, vectors);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++)
#pragma GCC unroll 2
          for (int c = 0; c < N; c++) {
            float* to = sums + (r + i) * COLUMNS + c * LANES;
            if (k) sum[i][c] = _mm512_add_ps(_mm512_load_ps(to), sum[i][c]);
            _mm512_store_ps(to, sum[i][c]);
          }
      });
    }
  }
  __mmask16 mask[N];
  for (int c = 0; c < N; c++) mask[c] = lanes_of(p.n - column - c * LANES);
  for (int64_t r = 0; r < rows; r++)
    for (int c = 0; c < N; c++) {
      __m512 total = _mm512_load_ps(sums + r * COLUMNS + c * LANES);
      if (p.bias) total = _mm512_add_ps(total, widen(_mm256_maskz_loadu_epi16(mask[c], p.bias + column + c * LANES)));
      u16* out = p.y + (first_row + r) * p.ldy + column + c * LANES;
      _mm256_mask_storeu_epi16(out, mask[c], (__m256i)_mm512_cvtneps_pbh(total));
    }
  for (int64_t s = 0; s < count; s++) {
    const Segment& own = segments[s];
    const Factors* found = factors(own, p.slot);
    if (found == nullptr) continue;
    const Factors& f = *found;
    const int64_t start = std::max(own.start, first_row), stop = std::min(own.stop, first_row + rows);
    const bool wide = column % PANEL + COLUMNS <= stride;
    for (int64_t r = start; r < stop; r += M)
      with_count<M>(std::min<int64_t>(M, stop - r), [&](auto number) {
        constexpr int R = number;
        __m512 sum[R][N];
        const u32* second = f.second + panel_of(column, f.rank / 2);
        if (wide) block<R>(z[s] + r * f.rank, f.rank, second, stride, f.rank / 2, sum, nullptr, 0);
        else narrow_block<R>(z[s] + r * f.rank, f.rank, second, stride, f.rank / 2, sum);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++)
#pragma GCC unroll 2
          for (int c = 0; c < N; c++) {
            u16* out = p.y + (r + i) * p.ldy + column + c * LANES;
            const __m512 total = _mm512_add_ps(sum[i][c], widen(_mm256_maskz_loadu_epi16(mask[c], out)));
            _mm256_mask_storeu_epi16(out, mask[c], (__m256i)_mm512_cvtneps_pbh(total));
          }
      });
  }
}

// z[rows][rank] = x[rows][k] first
void first_product(const u16* x, int64_t ldx, int64_t k, const Factors& f, int64_t rows, u16* z) {
  for (int64_t column = 0; column < f.rank; column += COLUMNS) {
    const int64_t stride = panel_stride(column, f.rank);
    const u32* first = f.first + panel_of(column, k / 2);
    const bool wide = column % PANEL + COLUMNS <= stride;
    for (int64_t r = 0; r < rows; r += M)
      with_count<M>(std::min<int64_t>(M, rows - r), [&](auto number) {
        constexpr int R = number;
        __m512 sum[R][N];
        if (wide) block<R>(x + r * ldx, ldx, first, stride, k / 2, sum, nullptr, 0);
        else narrow_block<R>(x + r * ldx, ldx, first, stride, k / 2, sum);
        for (int i = 0; i < R; i++)
          for (int c = 0; c < (wide ? N : 1); c++)
            _mm256_storeu_si256((__m256i*)(z + (r + i) * f.rank + column + c * LANES),
                                (__m256i)_mm512_cvtneps_pbh(sum[i][c]));
      });
  }
}

// All products of one call, by the threads of an enclosing team. Ends in a barrier.
void products(const Product* list, int64_t count, int64_t rows, const Segment* segments, int64_t segment_count,
              u16* scratch, int thread, int threads) {
  // Each (product, segment)'s place for its adapter's first product.
  std::vector<u16*> z(count * segment_count, nullptr);
  int64_t at = 0, job = 0;
  for (int64_t p = 0; p < count; p++)
    for (int64_t s = 0; s < segment_count; s++) {
      const Segment& own = segments[s];
      const Factors* found = factors(own, list[p].slot);
      if (found == nullptr) continue;
      const Factors& f = *found;
      z[p * segment_count + s] = scratch + at - own.start * f.rank;
      for (int64_t r = own.start; r < own.stop; r += CHAIN_ROWS, job++)
        if (job % threads == thread)
          first_product(list[p].x + r * list[p].ldx, list[p].ldx, list[p].k, f, std::min(CHAIN_ROWS, own.stop - r),
                        z[p * segment_count + s] + r * f.rank);
      at += (own.stop - own.start) * f.rank;
    }
  if (job > 0) {
#pragma omp barrier
  }
  int64_t total = 0;
  for (int64_t p = 0; p < count; p++) total += (list[p].n + COLUMNS - 1) / COLUMNS;
  const int64_t first = total * thread / threads, stop = total * (thread + 1) / threads;
  int64_t before = 0;
  for (int64_t p = 0; p < count; p++) {
    const int64_t tiles = (list[p].n + COLUMNS - 1) / COLUMNS;
    for (int64_t t = std::max<int64_t>(first - before, 0); t < std::min(tiles, stop - before); t++) {
      const bool more = before + t + 1 < stop;
      const u32* next = t + 1 < tiles ? list[p].packed + (t + 1) * COLUMNS * (list[p].k / 2) : list[p + more].packed;
      for (int64_t r = 0; r < rows; r += ROWS)
        tile(list[p], t * COLUMNS, r, std::min(ROWS, rows - r), segments, segment_count, z.data() + p * segment_count,
             more && r == 0 ? (const char*)next : nullptr);
    }
    before += tiles;
  }
#pragma omp barrier
}

// pairs of rows of x [n][k] as columns of `to` [k/2][stride], for 16 rows or fewer
void pack_columns(const u32* x, int64_t rows, int64_t pairs, u32* to, int64_t stride) {
  const __m512i step = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set1_epi32((int)pairs));
  const __mmask16 mask = lanes_of(rows);
  for (int64_t i = 0; i < pairs; i++)
    _mm512_storeu_si512(to + i * stride, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, step, x + i, 4));
}

}  // namespace

extern "C" {

// The same as a part of a team of threads, all of which call it. Ends in a barrier.
void linear_team(const Product* list, int64_t count, int64_t rows, const Segment* segments, int64_t segment_count,
                 u16* scratch, int thread, int threads) {
  products(list, count, rows, segments, segment_count, scratch, thread, threads);
}

// How many numbers `linear_team` wants for scratch.
int64_t linear_scratch(const Product* list, int64_t count, const Segment* segments, int64_t segment_count) {
  int64_t size = 0;
  for (int64_t p = 0; p < count; p++)
    for (int64_t s = 0; s < segment_count; s++)
      if (const Factors* f = factors(segments[s], list[p].slot)) size += (segments[s].stop - segments[s].start) * f->rank;
  return size;
}

// y = x W^T + b for each of the products, and the adapters of the segments on their rows.
void linear(const Product* list, int64_t count, int64_t rows, const Segment* segments, int64_t segment_count,
            int threads) {
  std::vector<u16> scratch(linear_scratch(list, count, segments, segment_count));
#pragma omp parallel num_threads(threads)
  products(list, count, rows, segments, segment_count, scratch.data(), omp_get_thread_num(), omp_get_num_threads());
}

// Matrices [n][k] of bf16 as pairs in columns, `width` of them together: [n / width][k/2][width], with zeros where
// there are no rows. The jobs: (matrix, where to, n, k, width), width a multiple of LANES.
void linear_pack(const int64_t* jobs, int64_t count, int threads) {
#pragma omp parallel num_threads(threads)
  for (int64_t j = 0; j < count; j++) {
    const u32* from = (const u32*)jobs[5 * j];
    u32* to = (u32*)jobs[5 * j + 1];
    const int64_t n = jobs[5 * j + 2], pairs = jobs[5 * j + 3] / 2, width = jobs[5 * j + 4];
    const int64_t padded = (n + width - 1) / width * width;
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < padded; row += LANES)
      pack_columns(from + row * pairs, n - row, pairs, to + row / width * width * pairs + row % width, width);
  }
}

// Ask for large pages below [start, start + size): fewer of them stand between the weights and the caches.
void linear_advise(char* start, int64_t size) {
#ifdef __linux__
  const int64_t page = 4096;
  char* first = (char*)(((int64_t)start + page - 1) / page * page);
  if (first + page <= start + size) madvise(first, (start + size - first) / page * page, MADV_HUGEPAGE);
#endif
}

}  // extern "C"

#endif
