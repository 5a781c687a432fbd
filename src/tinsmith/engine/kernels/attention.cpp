// Causal attention on a CPU whose result for a query depends on that query and its keys alone.
//
// Every product is a chain of fused multiply-adds in one fixed order per element: a score over the head's
// dimension, an output over the keys in order of their position. How many rows share a call, and which,
// changes no bit. So a query comes out the same in a training pass, a chunk of a prompt and a decode step.
//
// Keys stand in pages of PAGE positions, transposed ([dim][PAGE]), so that a vector register holds the
// same dimension of neighbouring keys; values stand as they are ([PAGE][dim], dim padded to VALUE_PAD).
// All arithmetic is fp32; element types are fp32 or bf16.

#include <cstdlib>

#include "vector.h"

namespace {

constexpr int PAGE = 64;
constexpr int VALUE_PAD = 16;
constexpr int TILE = 64;  // query rows that are worked on together
constexpr float NEVER = -INFINITY;

constexpr int PARTS = PAGE / W;

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

inline int padded(int n, int to) { return (n + to - 1) / to * to; }

// Scores of `count` rows against one page: scaled, NEVER where a row does not see the key.
template <class T>
void score(float* s, const float* q, int key_dim, const T* keys, const int* position, int first_key, int count,
           float scale, int window) {
  product(s, PAGE, q, key_dim, 1, keys, PAGE, count, PAGE, key_dim, false);
  for (int r = 0; r < count; r++) {
    int seen_to = position[r] - first_key;                       // the last key that it sees
    int seen_from = window > 0 ? seen_to - window + 1 : INT32_MIN;  // the first one
    float* row = s + r * PAGE;
    bool whole = seen_to >= PAGE - 1 && seen_from <= 0;
    for (int i = 0; i < PARTS; i++) {
      V x = mul(load(row + i * W), spread(scale));
      if (!whole) {
        V at = add(lanes(), spread((float)(i * W)));
        x = where_below(spread((float)seen_to), at, spread(NEVER), x);
        if (window > 0) x = where_below(at, spread((float)seen_from), spread(NEVER), x);
      }
      store(row + i * W, x);
    }
  }
}

// Attention of up to TILE rows over pages [first, last). out: [count][value_pad] sums, not yet divided;
// top and total: [count], the maximum and the sum of the exponentials, sinks included.
template <class T>
void attend(float* out, float* top, float* total, const float* q, const int* position, const float* sink,
            const T* const* keys, const T* const* values, int first, int last, int count, int key_dim, int value_pad,
            float scale, int window) {
  alignas(64) float s[TILE * PAGE];
  alignas(64) float sums[TILE * W];
  memset(out, 0, sizeof(float) * count * value_pad);
  memset(sums, 0, sizeof(sums));
  for (int r = 0; r < count; r++) {
    top[r] = sink ? sink[r] : NEVER;
    if (sink) sums[r * W] = 1.0f;
  }
  for (int page = first; page < last; page++) {
    score(s, q, key_dim, keys[page], position, page * PAGE, count, scale, window);
    for (int r = 0; r < count; r++) {
      float* row = s + r * PAGE;
      V most = load(row);
      for (int i = 1; i < PARTS; i++) most = maximum(most, load(row + i * W));
      float highest = std::max(top[r], maximum_of(most));
      if (highest == NEVER) {
        memset(row, 0, sizeof(float) * PAGE);
        continue;
      }
      V sum = load(sums + r * W);
      if (highest > top[r]) {
        V shrink = spread(top[r] == NEVER ? 0.0f : exponential(top[r] - highest));
        sum = mul(sum, shrink);
        float* o = out + r * value_pad;
        for (int d = 0; d < value_pad; d += W) store(o + d, mul(load(o + d), shrink));
        top[r] = highest;
      }
      for (int i = 0; i < PARTS; i++) {
        V p = exponential(sub(load(row + i * W), spread(highest)));
        sum = add(sum, p);
        store(row + i * W, p);
      }
      store(sums + r * W, sum);
    }
    product(out, value_pad, s, PAGE, 1, values[page], value_pad, count, value_pad, PAGE, true);
  }
  for (int r = 0; r < count; r++) {
    total[r] = sum_of(load(sums + r * W));
    if (total[r] == 0.0f) total[r] = 1.0f, top[r] = 0.0f;  // it sees nothing
  }
}

template <class T>
void gather(float* to, const T* from, int64_t stride, int count, int dim, int pad) {
  for (int r = 0; r < count; r++) {
    for (int d = 0; d < dim; d++) to[r * pad + d] = value(from[r * stride + d]);
    for (int d = dim; d < pad; d++) to[r * pad + d] = 0.0f;
  }
}

// Rows of keys [count][dim] into pages [dim][PAGE], the rest of the last page zeros.
template <class T>
void transpose_pages(T* to, const T* from, int64_t stride, int count, int dim) {
  for (int page = 0; page * PAGE < count; page++) {
    T* p = to + (int64_t)page * dim * PAGE;
    int filled = std::min(PAGE, count - page * PAGE);
    if (filled < PAGE) memset((void*)p, 0, sizeof(T) * dim * PAGE);
    for (int j = 0; j < filled; j++) {
      const T* key = from + (int64_t)(page * PAGE + j) * stride;
      for (int d = 0; d < dim; d++) p[d * PAGE + j] = key[d];
    }
  }
}

template <class T>
void copy_pages(T* to, const T* from, int64_t stride, int count, int dim, int pad) {
  for (int j = 0; j < padded(count, PAGE); j++) {
    T* row = to + (int64_t)j * pad;
    int n = j < count ? dim : 0;
    if (n) memcpy((void*)row, from + j * stride, sizeof(T) * n);
    memset((void*)(row + n), 0, sizeof(T) * (pad - n));
  }
}

struct Layout {  // of q, k, v, out and their gradients: [rows][heads][dim] with any strides but that of dim
  int64_t q_head, q_row, k_head, k_row, v_head, v_row;
};

int first_page(int position, int window) { return window > 0 ? std::max(0, position - window + 1) / PAGE : 0; }

template <class T>
void train_forward(const T* q, const T* k, const T* v, T* out, float* top, float* total, const int* spans, int count,
                   Layout at, int heads, int kv_heads, int key_dim, int value_dim, int total_rows, float scale,
                   int window, const float* sinks, int threads) {
  const int group = heads / kv_heads, value_pad = padded(value_dim, VALUE_PAD);
  struct Task { int span, head, tile; };
  int64_t pages = 0, tasks = 0;
  int64_t* page_of = (int64_t*)malloc(sizeof(int64_t) * (count + 1));
  for (int i = 0; i < count; i++) {
    page_of[i] = pages;
    pages += (spans[2 * i + 1] + PAGE - 1) / PAGE;
    tasks += (int64_t)heads * ((spans[2 * i + 1] + TILE - 1) / TILE);
  }
  page_of[count] = pages;
  T* kp = (T*)aligned_alloc(64, sizeof(T) * pages * PAGE * kv_heads * padded(key_dim, 32));
  T* vp = (T*)aligned_alloc(64, sizeof(T) * pages * PAGE * kv_heads * padded(value_pad, 32));
  Task* list = (Task*)malloc(sizeof(Task) * tasks);
  int64_t n = 0;
  for (int i = 0; i < count; i++)  // the dearest ones first
    for (int tile = (spans[2 * i + 1] - 1) / TILE; tile >= 0; tile--)
      for (int h = 0; h < heads; h++) list[n++] = {i, h, tile};
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (int job = 0; job < count * kv_heads; job++) {
      int i = job / kv_heads, h = job % kv_heads, start = spans[2 * i], length = spans[2 * i + 1];
      int64_t page = page_of[i] * kv_heads + (int64_t)h * (page_of[i + 1] - page_of[i]);
      transpose_pages(kp + page * PAGE * key_dim, k + h * at.k_head + start * at.k_row, at.k_row, length, key_dim);
      copy_pages(vp + page * PAGE * value_pad, v + h * at.v_head + start * at.v_row, at.v_row, length, value_dim,
                 value_pad);
    }
    float* rows_q = (float*)aligned_alloc(64, sizeof(float) * TILE * padded(key_dim, 16));
    float* sums = (float*)aligned_alloc(64, sizeof(float) * TILE * value_pad);
    const T** keys = (const T**)malloc(sizeof(T*) * (pages + 1));
    const T** values = (const T**)malloc(sizeof(T*) * (pages + 1));
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < tasks; job++) {
      Task t = list[job];
      int start = spans[2 * t.span], length = spans[2 * t.span + 1], own = t.head / group;
      int from = t.tile * TILE, rows_here = std::min(TILE, length - from);
      int64_t page = page_of[t.span] * kv_heads + (int64_t)own * (page_of[t.span + 1] - page_of[t.span]);
      int last = (from + rows_here - 1) / PAGE + 1;
      for (int p = 0; p < last; p++) {
        keys[p] = kp + (page + p) * PAGE * key_dim;
        values[p] = vp + (page + p) * PAGE * value_pad;
      }
      int position[TILE];
      float sink[TILE], top_here[TILE], total_here[TILE];
      for (int r = 0; r < rows_here; r++) {
        position[r] = from + r;
        if (sinks) sink[r] = sinks[t.head];
      }
      gather(rows_q, q + t.head * at.q_head + (start + from) * at.q_row, at.q_row, rows_here, key_dim, key_dim);
      attend(sums, top_here, total_here, rows_q, position, sinks ? sink : nullptr, keys, values,
             first_page(from, window), last, rows_here, key_dim, value_pad, scale, window);
      for (int r = 0; r < rows_here; r++) {
        int64_t row = start + from + r;
        T* o = out + (row * heads + t.head) * value_dim;
        for (int d = 0; d < value_dim; d++) put(o + d, sums[r * value_pad + d] / total_here[r]);
        top[t.head * (int64_t)total_rows + row] = top_here[r];
        total[t.head * (int64_t)total_rows + row] = total_here[r];
      }
    }
    free(rows_q), free(sums), free(keys), free(values);
  }
  free(page_of), free(kp), free(vp), free(list);
}

// Gradients of one sequence and one key-value head, page after page of keys.
template <class T>
void train_backward(const T* q, const T* k, const T* v, const T* out, const T* grad, const float* top,
                    const float* total, T* dq, T* dk, T* dv, const int* spans, int count, Layout at, int64_t grad_head,
                    int64_t grad_row, int heads, int kv_heads, int key_dim, int value_dim, int total_rows, float scale,
                    int window, int threads) {
  const int group = heads / kv_heads;
  const int key_pad = padded(key_dim, 16), value_pad = padded(value_dim, VALUE_PAD);
  int longest = 0;
  for (int i = 0; i < count; i++) longest = std::max(longest, padded(spans[2 * i + 1], PAGE));
#pragma omp parallel num_threads(threads)
  {
    auto room = [](int64_t n) { return (float*)aligned_alloc(64, sizeof(float) * ((n + 15) / 16 * 16)); };
    float* qs = room((int64_t)group * longest * key_pad);
    float* dos = room((int64_t)group * longest * value_pad);
    float* dqs = room((int64_t)group * longest * key_pad);
    float* deltas = room((int64_t)group * longest);
    float *keys = room(PAGE * key_pad), *keys_t = room(PAGE * key_dim), *values_t = room(PAGE * value_dim);
    float *dks = room(PAGE * key_pad), *dvs = room(PAGE * value_pad);
    float *s = room(TILE * PAGE), *dp = room(TILE * PAGE);
#pragma omp for schedule(dynamic)
    for (int job = 0; job < count * kv_heads; job++) {
      int i = job / kv_heads, own = job % kv_heads, start = spans[2 * i], length = spans[2 * i + 1];
      for (int g = 0; g < group; g++) {
        int h = own * group + g;
        float* to = dos + (int64_t)g * longest * value_pad;
        gather(qs + (int64_t)g * longest * key_pad, q + h * at.q_head + start * at.q_row, at.q_row, length, key_dim,
               key_pad);
        gather(to, grad + h * grad_head + start * grad_row, grad_row, length, value_dim, value_pad);
        for (int r = 0; r < length; r++) {
          const T* o = out + ((int64_t)(start + r) * heads + h) * value_dim;
          float sum = 0;
          for (int d = 0; d < value_dim; d++) sum += value(o[d]) * to[(int64_t)r * value_pad + d];
          deltas[(int64_t)g * longest + r] = sum;
        }
      }
      memset(dqs, 0, sizeof(float) * group * longest * key_pad);
      for (int first = 0; first < length; first += PAGE) {
        int filled = std::min(PAGE, length - first);
        const T* kk = k + own * at.k_head + (int64_t)(start + first) * at.k_row;
        const T* vv = v + own * at.v_head + (int64_t)(start + first) * at.v_row;
        memset(keys, 0, sizeof(float) * PAGE * key_pad);
        memset(keys_t, 0, sizeof(float) * PAGE * key_dim);
        memset(values_t, 0, sizeof(float) * PAGE * value_dim);
        for (int j = 0; j < filled; j++) {
          for (int d = 0; d < key_dim; d++) keys[j * key_pad + d] = keys_t[d * PAGE + j] = value(kk[j * at.k_row + d]);
          for (int d = 0; d < value_dim; d++) values_t[d * PAGE + j] = value(vv[j * at.v_row + d]);
        }
        memset(dks, 0, sizeof(float) * PAGE * key_pad);
        memset(dvs, 0, sizeof(float) * PAGE * value_pad);
        int beyond = window > 0 ? std::min(length, first + PAGE - 1 + window) : length;  // rows that see the page
        for (int g = 0; g < group; g++) {
          int h = own * group + g;
          for (int from = first; from < beyond; from += TILE) {
            int n = std::min(TILE, length - from);
            int position[TILE];
            for (int r = 0; r < n; r++) position[r] = from + r;
            const float* q_tile = qs + ((int64_t)g * longest + from) * key_pad;
            const float* do_tile = dos + ((int64_t)g * longest + from) * value_pad;
            product(s, PAGE, q_tile, key_pad, 1, keys_t, PAGE, n, PAGE, key_dim, false);
            product(dp, PAGE, do_tile, value_pad, 1, values_t, PAGE, n, PAGE, value_dim, false);
            for (int r = 0; r < n; r++) {
              int64_t row = (int64_t)h * total_rows + start + from + r;
              int seen_to = position[r] - first, seen_from = window > 0 ? seen_to - window + 1 : INT32_MIN;
              bool whole = seen_to >= PAGE - 1 && seen_from <= 0;
              V highest = spread(top[row]), share = spread(1.0f / total[row]);
              V delta = spread(deltas[(int64_t)g * longest + from + r]);
              for (int c = 0; c < PARTS; c++) {
                float *ps = s + r * PAGE + c * W, *pd = dp + r * PAGE + c * W;
                V p = mul(exponential(sub(mul(load(ps), spread(scale)), highest)), share);
                if (!whole) {
                  V column = add(lanes(), spread((float)(c * W)));
                  p = where_below(spread((float)seen_to), column, zero(), p);
                  if (window > 0) p = where_below(column, spread((float)seen_from), zero(), p);
                }
                store(ps, p);
                store(pd, mul(mul(sub(load(pd), delta), p), spread(scale)));
              }
            }
            product(dvs, value_pad, s, 1, PAGE, do_tile, value_pad, PAGE, value_pad, n, true);
            product(dks, key_pad, dp, 1, PAGE, q_tile, key_pad, PAGE, key_pad, n, true);
            product(dqs + ((int64_t)g * longest + from) * key_pad, key_pad, dp, PAGE, 1, keys, key_pad, n, key_pad,
                    PAGE, true);
          }
        }
        for (int j = 0; j < filled; j++) {
          int64_t row = (int64_t)(start + first + j) * kv_heads + own;
          for (int d = 0; d < key_dim; d++) put(dk + row * key_dim + d, dks[j * key_pad + d]);
          for (int d = 0; d < value_dim; d++) put(dv + row * value_dim + d, dvs[j * value_pad + d]);
        }
      }
      for (int g = 0; g < group; g++)
        for (int r = 0; r < length; r++) {
          T* to = dq + ((int64_t)(start + r) * heads + own * group + g) * key_dim;
          for (int d = 0; d < key_dim; d++) put(to + d, dqs[((int64_t)g * longest + r) * key_pad + d]);
        }
    }
    free(qs), free(dos), free(dqs), free(deltas), free(keys), free(keys_t), free(values_t), free(dks), free(dvs);
    free(s), free(dp);
  }
}

// New keys and values into their pages, then attention over the pages. chunks: (row, length, position,
// where its page numbers begin in `pages`) of each sequence.
template <class T>
void paged(const T* q, const T* k, const T* v, T* out, T* key_pages, T* value_pages, const int* chunks, int count,
           const int* pages, Layout at, int heads, int kv_heads, int key_dim, int value_dim, float scale, int window,
           const float* sinks, int threads) {
  const int group = heads / kv_heads, value_pad = padded(value_dim, VALUE_PAD);
  const int64_t key_page = (int64_t)key_dim * PAGE, value_page = (int64_t)value_pad * PAGE;
  const int together = std::max(1, TILE / group);  // positions of a chunk whose heads make a tile
  int64_t tasks = 0;
  int most = 0;
  for (int i = 0; i < count; i++) {
    tasks += (chunks[4 * i + 1] + together - 1) / together;
    most = std::max(most, (chunks[4 * i + 2] + chunks[4 * i + 1] - 1) / PAGE + 1);
  }
  struct Task { int chunk, from; };
  Task* list = (Task*)malloc(sizeof(Task) * (tasks + 1));
  int64_t n = 0;
  for (int i = 0; i < count; i++)
    for (int from = 0; from < chunks[4 * i + 1]; from += together) list[n++] = {i, from};
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int job = 0; job < count * kv_heads; job++) {
      int i = job / kv_heads, h = job % kv_heads;
      const int* c = chunks + 4 * i;
      for (int j = 0; j < c[1]; j++) {
        int position = c[2] + j, place = position % PAGE;
        int64_t page = (int64_t)pages[c[3] + position / PAGE] * kv_heads + h;
        const T* key = k + h * at.k_head + (int64_t)(c[0] + j) * at.k_row;
        for (int d = 0; d < key_dim; d++) key_pages[page * key_page + (int64_t)d * PAGE + place] = key[d];
        memcpy((void*)(value_pages + page * value_page + (int64_t)place * value_pad),
               v + h * at.v_head + (int64_t)(c[0] + j) * at.v_row, sizeof(T) * value_dim);
      }
    }
    float* rows_q = (float*)aligned_alloc(64, sizeof(float) * TILE * padded(key_dim, 16));
    float* sums = (float*)aligned_alloc(64, sizeof(float) * TILE * value_pad);
    const T** keys = (const T**)malloc(sizeof(T*) * (most + 1));
    const T** values = (const T**)malloc(sizeof(T*) * (most + 1));
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < tasks * kv_heads; job++) {
      Task t = list[job / kv_heads];
      const int* c = chunks + 4 * t.chunk;
      int own = (int)(job % kv_heads), positions = std::min(together, c[1] - t.from), low = c[2] + t.from;
      int first = first_page(low, window), last = (low + positions - 1) / PAGE + 1;
      for (int p = first; p < last; p++) {
        int64_t page = (int64_t)pages[c[3] + p] * kv_heads + own;
        keys[p] = key_pages + page * key_page;
        values[p] = value_pages + page * value_page;
      }
      for (int g0 = 0; g0 < group; g0 += TILE) {  // one tile, unless a group has more heads than a tile rows
        int heads_here = std::min(TILE, group - g0), rows_here = positions * heads_here;
        int position[TILE];
        float sink[TILE], top[TILE], total[TILE];
        for (int j = 0; j < positions; j++)
          for (int g = 0; g < heads_here; g++) {
            int r = j * heads_here + g, h = own * group + g0 + g;
            position[r] = low + j;
            if (sinks) sink[r] = sinks[h];
            gather(rows_q + (int64_t)r * key_dim, q + h * at.q_head + (int64_t)(c[0] + t.from + j) * at.q_row, 0, 1,
                   key_dim, key_dim);
          }
        attend(sums, top, total, rows_q, position, sinks ? sink : nullptr, keys, values, first, last, rows_here,
               key_dim, value_pad, scale, window);
        for (int j = 0; j < positions; j++)
          for (int g = 0; g < heads_here; g++) {
            int r = j * heads_here + g;
            T* o = out + ((int64_t)(c[0] + t.from + j) * heads + own * group + g0 + g) * value_dim;
            for (int d = 0; d < value_dim; d++) put(o + d, sums[r * value_pad + d] / total[r]);
          }
      }
    }
    free(rows_q), free(sums), free(keys), free(values);
  }
  free(list);
}

}  // namespace

#define FOR_TYPE(name, T)                                                                                             \
  extern "C" void train_forward_##name(                                                                               \
      const void* q, const void* k, const void* v, void* out, float* top, float* total, const int* spans, int count,  \
      const int64_t* at, int heads, int kv_heads, int key_dim, int value_dim, int rows, float scale, int window,      \
      const float* sinks, int threads) {                                                                              \
    Layout layout = {at[0], at[1], at[2], at[3], at[4], at[5]};                                                       \
    train_forward((const T*)q, (const T*)k, (const T*)v, (T*)out, top, total, spans, count, layout, heads, kv_heads,  \
                  key_dim, value_dim, rows, scale, window, sinks, threads);                                           \
  }                                                                                                                   \
  extern "C" void train_backward_##name(                                                                              \
      const void* q, const void* k, const void* v, const void* out, const void* grad, const float* top,               \
      const float* total, void* dq, void* dk, void* dv, const int* spans, int count, const int64_t* at, int heads,    \
      int kv_heads, int key_dim, int value_dim, int rows, float scale, int window, int threads) {                     \
    Layout layout = {at[0], at[1], at[2], at[3], at[4], at[5]};                                                       \
    train_backward((const T*)q, (const T*)k, (const T*)v, (const T*)out, (const T*)grad, top, total, (T*)dq, (T*)dk,  \
                   (T*)dv, spans, count, layout, at[6], at[7], heads, kv_heads, key_dim, value_dim, rows, scale,      \
                   window, threads);                                                                                  \
  }                                                                                                                   \
  extern "C" void paged_##name(const void* q, const void* k, const void* v, void* out, void* key_pages,               \
                               void* value_pages, const int* chunks, int count, const int* pages, const int64_t* at,  \
                               int heads, int kv_heads, int key_dim, int value_dim, float scale, int window,          \
                               const float* sinks, int threads) {                                                     \
    Layout layout = {at[0], at[1], at[2], at[3], at[4], at[5]};                                                       \
    paged((const T*)q, (const T*)k, (const T*)v, (T*)out, (T*)key_pages, (T*)value_pages, chunks, count, pages,       \
          layout, heads, kv_heads, key_dim, value_dim, scale, window, sinks, threads);                                \
  }

FOR_TYPE(fp32, float)
FOR_TYPE(bf16, bf16)
