// The products of a model's own weights, for the rows of a sampling step: y = x W^T + b, and what each row's adapter
// adds. The weights are read once, from memory, in the order in which they lie there; that is the time that it takes.
//
// Every element is one chain of dot products of pairs in the order of the summed dimension, kept in fp32; after
// `depth` of them it is added to the sum so far, which is how the library adds whose product the trainer takes. So
// it has that product's bits (linear.py finds the depth, and tries), whatever number of rows share a call.

#pragma once

#include <type_traits>
#include <vector>

#include "product.h"

#if TINSMITH_PAIRS

namespace {

constexpr int M = 8, N = 2;               // rows and vectors of a register block
constexpr int64_t TILE_COLUMNS = N * LANES;    // of a tile; a packed matrix is [tiles][K/2][TILE_COLUMNS] pairs
constexpr int64_t TILE_ROWS = 64;              // of x that meet a tile before the next rows do
constexpr int64_t CHAIN_ROWS = M;         // of an adapter's first product that one thread takes at a time

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
  alignas(64) float sums[TILE_ROWS * TILE_COLUMNS];
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
    const u32* from = w + k / 2 * TILE_COLUMNS;
    const bool last = k + p.depth >= p.k;
    const char* ahead = last ? next : (const char*)(from + pairs * TILE_COLUMNS);
    int64_t pass = 0;
    for (int64_t r = 0; r < rows; r += M, pass++) {
      // What comes next is fetched in the first passes over this: all of it in one, or half of it in each of two.
      const int vectors = ahead == nullptr ? 0 : passes == 1 ? 2 : pass < 2 ? 1 : 0;
      with_count<M>(std::min<int64_t>(M, rows - r), [&](auto number) {
        constexpr int R = number;
        __m512 sum[R][N];
        block<R>(p.x + (first_row + r) * p.ldx + k, p.ldx, from, TILE_COLUMNS, pairs, sum, ahead + pass * pairs * 64, vectors);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++)
#pragma GCC unroll 2
          for (int c = 0; c < N; c++) {
            float* to = sums + (r + i) * TILE_COLUMNS + c * LANES;
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
      __m512 total = _mm512_load_ps(sums + r * TILE_COLUMNS + c * LANES);
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
    const bool wide = column % PANEL + TILE_COLUMNS <= stride;
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

// z[rows][rank] = x[rows][k] first; meanwhile as much is fetched from `next`, where that is given.
void first_product(const u16* x, int64_t ldx, int64_t k, const Factors& f, int64_t rows, u16* z, const char* next) {
  for (int64_t column = 0; column < f.rank; column += TILE_COLUMNS) {
    const int64_t stride = panel_stride(column, f.rank);
    const u32* first = f.first + panel_of(column, k / 2);
    const bool wide = column % PANEL + TILE_COLUMNS <= stride;
    for (int64_t r = 0; r < rows; r += M)
      with_count<M>(std::min<int64_t>(M, rows - r), [&](auto number) {
        constexpr int R = number;
        __m512 sum[R][N];
        const char* ahead = next ? next + column * k * 2 : nullptr;
        if (wide) block<R>(x + r * ldx, ldx, first, stride, k / 2, sum, ahead, ahead && r == 0 ? N : 0);
        else narrow_block<R>(x + r * ldx, ldx, first, stride, k / 2, sum);
        for (int i = 0; i < R; i++)
          for (int c = 0; c < (wide ? N : 1); c++)
            _mm256_storeu_si256((__m256i*)(z + (r + i) * f.rank + column + c * LANES),
                                (__m256i)_mm512_cvtneps_pbh(sum[i][c]));
      });
  }
}

// Several products of the same rows, as tasks that threads may take in any order: first what belongs to adapters, then
// the tiles.
struct Linears {
  const Product* list;
  int64_t count, rows;
  const Segment* segments;
  int64_t segment_count;

  struct Chain { int64_t product, segment, row; };
  std::vector<Chain> chains = {};    // adapters' first products
  std::vector<int64_t> offsets = {};  // of each (product, segment): where in `scratch` its rows begin
  std::vector<int64_t> ends = {};     // of each product: the tiles up to its last
  std::vector<u16*> z = {};
  int64_t size = 0;  // of `scratch`

  void prepare() {
    for (int64_t p = 0; p < count; p++) {
      ends.push_back((p ? ends.back() : 0) + (list[p].n + TILE_COLUMNS - 1) / TILE_COLUMNS);
      for (int64_t s = 0; s < segment_count; s++) {
        const Segment& own = segments[s];
        const Factors* f = factors(own, list[p].slot);
        offsets.push_back(f ? size - own.start * f->rank : 0);
        if (f == nullptr) continue;
        size += (own.stop - own.start) * f->rank;
        for (int64_t r = own.start; r < own.stop; r += CHAIN_ROWS) chains.push_back({p, s, r});
      }
    }
  }

  void use(u16* scratch) {
    for (int64_t at : offsets) z.push_back(scratch + at);
  }

  int64_t chain_tasks() const { return (int64_t)chains.size(); }
  void chain(int64_t task, int64_t next) const {
    const Chain& c = chains[task];
    const u32 *own_first = first_of(c), *ahead = next >= 0 ? first_of(chains[next]) : nullptr;
    const Product& p = list[c.product];
    const Segment& own = segments[c.segment];
    const Factors& f = *factors(own, p.slot);
    first_product(p.x + c.row * p.ldx, p.ldx, p.k, f, std::min(CHAIN_ROWS, own.stop - c.row),
                  z[c.product * segment_count + c.segment] + c.row * f.rank,
                  (const char*)(ahead == own_first ? nullptr : ahead));
  }

  int64_t tiles() const { return ends.back(); }
  void run(int64_t task, int64_t next) const {
    const int64_t p = product_of(task);
    const char* ahead = nullptr;
    if (next >= 0) {
      const int64_t n = product_of(next);
      ahead = (const char*)(list[n].packed + (next - first_of(n)) * TILE_COLUMNS * (list[n].k / 2));
    }
    for (int64_t r = 0; r < rows; r += TILE_ROWS)
      tile(list[p], (task - first_of(p)) * TILE_COLUMNS, r, std::min(TILE_ROWS, rows - r), segments, segment_count,
           z.data() + p * segment_count, r == 0 ? ahead : nullptr);
  }

 private:
  const u32* first_of(const Chain& c) const { return factors(segments[c.segment], list[c.product].slot)->first; }
  int64_t product_of(int64_t task) const { return std::upper_bound(ends.begin(), ends.end(), task) - ends.begin(); }
  int64_t first_of(int64_t p) const { return p ? ends[p - 1] : 0; }
};

}  // namespace

#endif
