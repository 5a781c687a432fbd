// Causal attention on a CPU whose result for a query depends on that query and its keys alone.
//
// Every product is a chain of fused multiply-adds in one fixed order per element: a score over the head's
// dimension, an output over the keys in order of their position. How many rows share a call, and which,
// changes no bit. So a query comes out the same in a training pass, a chunk of a prompt and a decode step.
//
// Keys stand in pages of PAGE positions, transposed ([dim][PAGE]), so that a vector register holds the
// same dimension of neighbouring keys; values stand as they are ([PAGE][dim], dim padded to VALUE_PAD).
// Elements are fp32 or bf16, sums and softmax fp32. Where the processor multiplies bf16 by itself (DOT), keys
// stand in pairs of dimensions ([dim / 2][PAGE][2]) and values in pairs of positions ([PAGE / 2][dim][2]); weights
// and the scores' gradients are then rounded to bf16 before they are multiplied, as transformers rounds the weights.

#include <cstdlib>
#include <type_traits>

#include "tiles.h"

namespace {

constexpr int PAGE = 64;
constexpr int VALUE_PAD = 16;
constexpr int TILE = 64;  // query rows that are worked on together
constexpr float NEVER = -INFINITY;

constexpr int PARTS = PAGE / W;

inline int padded(int n, int to) { return (n + to - 1) / to * to; }

template <bool DOT>
using Row = std::conditional_t<DOT, bf16, float>;  // what a left side of a product is made of

// An array of its own, aligned, for as long as it is in scope.
template <class E>
struct Room {
  E* data;
  explicit Room(int64_t n) : data((E*)aligned_alloc(64, (sizeof(E) * std::max<int64_t>(n, 1) + 63) / 64 * 64)) {}
  ~Room() { free(data); }
  Room(const Room&) = delete;
  operator E*() const { return data; }
};

// Scores of `count` rows against one page: scaled, NEVER where a row does not see the key.
template <class T, bool DOT>
void score(float* s, const Row<DOT>* q, int key_dim, const T* keys, const int* position, int first_key, int count,
           float scale, int window) {
  if constexpr (DOT) dot_product(s, PAGE, q, key_dim / 2, 1, keys, PAGE, count, PAGE, key_dim / 2, false);
  else product(s, PAGE, q, key_dim, 1, keys, PAGE, count, PAGE, key_dim, false);
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
template <class T, bool DOT>
void attend(float* out, float* top, float* total, const Row<DOT>* q, const int* position, const float* sink,
            const T* const* keys, const T* const* values, int first, int last, int count, int key_dim, int value_pad,
            float scale, int window) {
  alignas(64) float s[TILE * PAGE];
  alignas(64) float sums[TILE * W];
  alignas(64) bf16 weights[DOT ? TILE * PAGE : 1];
  memset(out, 0, sizeof(float) * count * value_pad);
  memset(sums, 0, sizeof(sums));
  for (int r = 0; r < count; r++) {
    top[r] = sink ? sink[r] : NEVER;
    if (sink) sums[r * W] = 1.0f;
  }
  for (int page = first; page < last; page++) {
    score<T, DOT>(s, q, key_dim, keys[page], position, page * PAGE, count, scale, window);
    for (int r = 0; r < count; r++) {
      float* row = s + r * PAGE;
      V most = load(row);
      for (int i = 1; i < PARTS; i++) most = maximum(most, load(row + i * W));
      float highest = std::max(top[r], maximum_of(most));
      if (highest == NEVER) {
        if constexpr (DOT) memset((void*)(weights + r * PAGE), 0, sizeof(bf16) * PAGE);
        else memset(row, 0, sizeof(float) * PAGE);
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
        if constexpr (DOT) store(weights + r * PAGE + i * W, p);
        else store(row + i * W, p);
      }
      store(sums + r * W, sum);
    }
    if constexpr (DOT)
      dot_product(out, value_pad, weights, PAGE / 2, 1, values[page], value_pad, count, value_pad, PAGE / 2, true);
    else product(out, value_pad, s, PAGE, 1, values[page], value_pad, count, value_pad, PAGE, true);
  }
  for (int r = 0; r < count; r++) {
    total[r] = sum_of(load(sums + r * W));
    if (total[r] == 0.0f) total[r] = 1.0f, top[r] = 0.0f;  // it sees nothing
  }
}

inline void take_row(float* to, const float* from, int dim) { std::copy(from, from + dim, to); }
inline void take_row(bf16* to, const bf16* from, int dim) { std::copy(from, from + dim, to); }
inline void take_row(float* to, const bf16* from, int dim) {
  for (int d = 0; d < dim; d++) to[d] = value(from[d]);
}

template <class R, class T>
void gather(R* to, const T* from, int64_t stride, int count, int dim, int pad) {
  for (int r = 0; r < count; r++) {
    take_row(to + (int64_t)r * pad, from + r * stride, dim);
    for (int d = dim; d < pad; d++) to[(int64_t)r * pad + d] = R{0};
  }
}

// A key into its place of a page.
template <bool DOT, class T, class S>
inline void put_key(T* page, const S* key, int place, int dim) {
  if constexpr (DOT)
    for (int d = 0; d < dim; d += 2) {
      T* two = page + ((int64_t)(d / 2) * PAGE + place) * 2;
      two[0] = key[d], two[1] = d + 1 < dim ? key[d + 1] : T{0};
    }
  else
    for (int d = 0; d < dim; d++) take_row(page + (int64_t)d * PAGE + place, key + d, 1);
}

template <bool DOT, class T>
inline void put_value(T* page, const T* from, int place, int dim, int pad) {
  if constexpr (DOT) {
    T* to = page + (int64_t)(place / 2) * pad * 2 + place % 2;
    for (int d = 0; d < dim; d++) to[2 * d] = from[d];
  } else
    std::copy(from, from + dim, page + (int64_t)place * pad);
}

// Keys and values [count][dim] into pages, zeros in what is left of the last one.
template <bool DOT, class T>
void fill_pages(T* keys, T* values, const T* k, int64_t k_row, const T* v, int64_t v_row, int count, int key_dim,
                int value_dim, int value_pad) {
  for (int first = 0; first < count; first += PAGE) {
    int filled = std::min(PAGE, count - first);
    T *key_page = keys + (int64_t)first * key_dim, *value_page = values + (int64_t)first * value_pad;
    if (filled < PAGE) memset((void*)key_page, 0, sizeof(T) * key_dim * PAGE);
    if (filled < PAGE || value_dim < value_pad) memset((void*)value_page, 0, sizeof(T) * value_pad * PAGE);
    for (int j = 0; j < filled; j++) {
      put_key<DOT>(key_page, k + (first + j) * k_row, j, key_dim);
      put_value<DOT>(value_page, v + (first + j) * v_row, j, value_dim, value_pad);
    }
  }
}

template <class T>
inline void divide_row(T* to, const float* sums, float total, int dim) {
  const V by = spread(total);
  each(dim, [&](int64_t d, int64_t n) { give(to + d, divide(load(sums + d), by), n); });
}

struct Layout {  // of q, k, v, out and their gradients: [rows][heads][dim] with any strides but that of dim
  int64_t q_head, q_row, k_head, k_row, v_head, v_row;
};

int first_page(int position, int window) { return window > 0 ? std::max(0, position - window + 1) / PAGE : 0; }

template <class T, bool DOT>
void train_forward(const T* q, const T* k, const T* v, T* out, float* top, float* total, const int* spans, int count,
                   Layout at, int heads, int kv_heads, int key_dim, int value_dim, int total_rows, float scale,
                   int window, const float* sinks, int threads) {
  const int group = heads / kv_heads, value_pad = padded(value_dim, VALUE_PAD);
  struct Task { int span, head, tile; };
  int64_t pages = 0, tasks = 0;
  Room<int64_t> page_of(count + 1);
  for (int i = 0; i < count; i++) {
    page_of[i] = pages;
    pages += (spans[2 * i + 1] + PAGE - 1) / PAGE;
    tasks += (int64_t)heads * ((spans[2 * i + 1] + TILE - 1) / TILE);
  }
  page_of[count] = pages;
  Room<T> kp(pages * PAGE * kv_heads * key_dim), vp(pages * PAGE * kv_heads * value_pad);
  Room<Task> list(tasks);
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
      fill_pages<DOT>(kp + page * PAGE * key_dim, vp + page * PAGE * value_pad, k + h * at.k_head + start * at.k_row,
                      at.k_row, v + h * at.v_head + start * at.v_row, at.v_row, length, key_dim, value_dim, value_pad);
    }
    Room<Row<DOT>> rows_q(TILE * key_dim);
    Room<float> sums(TILE * value_pad);
    Room<const T*> keys(pages), values(pages);
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
      gather(rows_q.data, q + t.head * at.q_head + (start + from) * at.q_row, at.q_row, rows_here, key_dim, key_dim);
      attend<T, DOT>(sums, top_here, total_here, rows_q, position, sinks ? sink : nullptr, keys, values,
                     first_page(from, window), last, rows_here, key_dim, value_pad, scale, window);
      for (int r = 0; r < rows_here; r++) {
        int64_t row = start + from + r;
        T* o = out + (row * heads + t.head) * value_dim;
        divide_row(o, sums + r * value_pad, total_here[r], value_dim);
        top[t.head * (int64_t)total_rows + row] = top_here[r];
        total[t.head * (int64_t)total_rows + row] = total_here[r];
      }
    }
  }
}

// What one thread needs for the gradients of a sequence and a key-value head: all query rows of its group, and one
// page of keys. Rows of bf16 stand twice: as they are, and in pairs of rows.
template <bool DOT>
struct Scratch {
  Room<Row<DOT>> q, grad, ds, keys, keys_t, values_t;
  Room<bf16> q_pairs, grad_pairs, p_pairs, ds_pairs;
  Room<float> dq, deltas, dk, dv, s, dp;
  Scratch(int64_t rows, int key_pad, int value_pad)
      : q(rows * key_pad), grad(rows * value_pad), ds(TILE * PAGE), keys(PAGE * key_pad), keys_t(PAGE * key_pad),
        values_t(PAGE * value_pad), q_pairs(DOT ? rows * key_pad : 1), grad_pairs(DOT ? rows * value_pad : 1),
        p_pairs(DOT ? TILE * PAGE : 1), ds_pairs(DOT ? TILE * PAGE : 1), dq(rows * key_pad), deltas(rows),
        dk(PAGE * key_pad), dv(PAGE * value_pad), s(TILE * PAGE), dp(TILE * PAGE) {}
};

// The weights and the gradients of the scores of a tile, from scores and d weights, in place.
struct Mask {
  int first_key, from, window;
};
inline void score_gradients(float* s, float* dp, const float* top, const float* total, const float* deltas, int count,
                            Mask mask, float scale) {
  for (int r = 0; r < count; r++) {
    int seen_to = mask.from + r - mask.first_key;
    int seen_from = mask.window > 0 ? seen_to - mask.window + 1 : INT32_MIN;
    bool whole = seen_to >= PAGE - 1 && seen_from <= 0;
    V highest = spread(top[r]), share = spread(1.0f / total[r]), delta = spread(deltas[r]);
    for (int c = 0; c < PARTS; c++) {
      float *ps = s + r * PAGE + c * W, *pd = dp + r * PAGE + c * W;
      V p = mul(exponential(sub(mul(load(ps), spread(scale)), highest)), share);
      if (!whole) {
        V column = add(lanes(), spread((float)(c * W)));
        p = where_below(spread((float)seen_to), column, zero(), p);
        if (mask.window > 0) p = where_below(column, spread((float)seen_from), zero(), p);
      }
      store(ps, p);
      store(pd, mul(mul(sub(load(pd), delta), p), spread(scale)));
    }
  }
}

// Rows [count][PAGE] of fp32 to bf16, in pairs of rows.
inline void round_pairs(bf16* to, const float* from, int count) {
  for (int r = 0; r < count; r += 2)
    for (int c = 0; c < PAGE; c += W)
      store_pairs(to + r * PAGE + 2 * c, load(from + r * PAGE + c), r + 1 < count ? load(from + (r + 1) * PAGE + c) : zero());
}

// A row of fp32, rounded to the element type.
template <class T>
inline void give_row(T* to, const float* from, int dim) {
  each(dim, [&](int64_t d, int64_t n) { give(to + d, load(from + d), n); });
}

// Gradients of one sequence and one key-value head, page after page of keys.
template <class T, bool DOT>
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
    Scratch<DOT> mine((int64_t)group * longest, key_pad, value_pad);
#pragma omp for schedule(dynamic)
    for (int job = 0; job < count * kv_heads; job++) {
      int i = job / kv_heads, own = job % kv_heads, start = spans[2 * i], length = spans[2 * i + 1];
      for (int g = 0; g < group; g++) {
        int h = own * group + g;
        const int64_t row = (int64_t)g * longest;
        const T *of_q = q + h * at.q_head + start * at.q_row, *of_grad = grad + h * grad_head + start * grad_row;
        gather(mine.q + row * key_pad, of_q, at.q_row, length, key_dim, key_pad);
        gather(mine.grad + row * value_pad, of_grad, grad_row, length, value_dim, value_pad);
        if constexpr (DOT) {
          pair_rows(mine.q_pairs + row * key_pad, of_q, at.q_row, length, key_dim, key_pad);
          pair_rows(mine.grad_pairs + row * value_pad, of_grad, grad_row, length, value_dim, value_pad);
        }
        for (int r = 0; r < length; r++) {
          const T* o = out + ((int64_t)(start + r) * heads + h) * value_dim;
          V sum = zero();
          each(value_dim, [&](int64_t d, int64_t n) { sum = fma(take(o + d, n), take(of_grad + r * grad_row + d, n), sum); });
          mine.deltas[row + r] = sum_of(sum);
        }
      }
      memset(mine.dq, 0, sizeof(float) * group * longest * key_pad);
      for (int first = 0; first < length; first += PAGE) {
        int filled = std::min(PAGE, length - first);
        const T* kk = k + own * at.k_head + (int64_t)(start + first) * at.k_row;
        const T* vv = v + own * at.v_head + (int64_t)(start + first) * at.v_row;
        memset((void*)mine.keys.data, 0, sizeof(Row<DOT>) * PAGE * key_pad);
        memset((void*)mine.keys_t.data, 0, sizeof(Row<DOT>) * PAGE * key_pad);
        memset((void*)mine.values_t.data, 0, sizeof(Row<DOT>) * PAGE * value_pad);
        if constexpr (DOT) pair_rows(mine.keys, kk, at.k_row, filled, key_dim, key_pad);
        else gather(mine.keys.data, kk, at.k_row, filled, key_dim, key_pad);
        for (int j = 0; j < filled; j++) {
          put_key<DOT>(mine.keys_t.data, kk + j * at.k_row, j, key_dim);
          put_key<DOT>(mine.values_t.data, vv + j * at.v_row, j, value_dim);
        }
        memset(mine.dk, 0, sizeof(float) * PAGE * key_pad);
        memset(mine.dv, 0, sizeof(float) * PAGE * value_pad);
        int beyond = window > 0 ? std::min(length, first + PAGE - 1 + window) : length;  // rows that see the page
        for (int g = 0; g < group; g++) {
          for (int from = first; from < beyond; from += TILE) {
            const int n = std::min(TILE, length - from);
            const int64_t row = (int64_t)g * longest + from;
            const int64_t of_all = (int64_t)(own * group + g) * total_rows + start + from;
            const Row<DOT>*of_q = mine.q + row * key_pad, *of_grad = mine.grad + row * value_pad;
            if constexpr (DOT) {
              dot_product(mine.s, PAGE, of_q, key_pad / 2, 1, mine.keys_t, PAGE, n, PAGE, key_dim / 2, false);
              dot_product(mine.dp, PAGE, of_grad, value_pad / 2, 1, mine.values_t, PAGE, n, PAGE, value_pad / 2, false);
            } else {
              product(mine.s, PAGE, of_q, key_pad, 1, mine.keys_t.data, PAGE, n, PAGE, key_dim, false);
              product(mine.dp, PAGE, of_grad, value_pad, 1, mine.values_t.data, PAGE, n, PAGE, value_dim, false);
            }
            score_gradients(mine.s, mine.dp, top + of_all, total + of_all, mine.deltas + row, n, {first, from, window},
                            scale);
            float* of_dq = mine.dq + row * key_pad;
            if constexpr (DOT) {
              const int pairs = (n + 1) / 2;
              round_pairs(mine.p_pairs, mine.s, n);
              round_pairs(mine.ds_pairs, mine.dp, n);
              for (int c = 0; c < n * PAGE; c += W) store(mine.ds + c, load(mine.dp + c));
              dot_product(mine.dv, value_pad, mine.p_pairs, 1, PAGE, mine.grad_pairs + row * value_pad, value_pad, PAGE,
                          value_pad, pairs, true);
              dot_product(mine.dk, key_pad, mine.ds_pairs, 1, PAGE, mine.q_pairs + row * key_pad, key_pad, PAGE,
                          key_pad, pairs, true);
              dot_product(of_dq, key_pad, mine.ds, PAGE / 2, 1, mine.keys, key_pad, n, key_pad, PAGE / 2, true);
            } else {
              product(mine.dv, value_pad, mine.s, 1, PAGE, of_grad, value_pad, PAGE, value_pad, n, true);
              product(mine.dk, key_pad, mine.dp, 1, PAGE, of_q, key_pad, PAGE, key_pad, n, true);
              product(of_dq, key_pad, mine.dp, PAGE, 1, mine.keys.data, key_pad, n, key_pad, PAGE, true);
            }
          }
        }
        for (int j = 0; j < filled; j++) {
          int64_t row = (int64_t)(start + first + j) * kv_heads + own;
          give_row(dk + row * key_dim, mine.dk + j * key_pad, key_dim);
          give_row(dv + row * value_dim, mine.dv + j * value_pad, value_dim);
        }
      }
      for (int g = 0; g < group; g++)
        for (int r = 0; r < length; r++)
          give_row(dq + ((int64_t)(start + r) * heads + own * group + g) * key_dim,
                   mine.dq + ((int64_t)g * longest + r) * key_pad, key_dim);
    }
  }
}

// New keys and values into their pages, then attention over the pages. chunks: (row, length, position,
// where its page numbers begin in `pages`) of each sequence.
template <class T, bool DOT>
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
  Room<Task> list(tasks);
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
        put_key<DOT>(key_pages + page * key_page, key, place, key_dim);
        put_value<DOT>(value_pages + page * value_page, v + h * at.v_head + (int64_t)(c[0] + j) * at.v_row, place,
                       value_dim, value_pad);
      }
    }
    Room<Row<DOT>> rows_q(TILE * key_dim);
    Room<float> sums(TILE * value_pad);
    Room<const T*> keys(most), values(most);
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
            gather(rows_q.data + (int64_t)r * key_dim, q + h * at.q_head + (int64_t)(c[0] + t.from + j) * at.q_row, 0, 1,
                   key_dim, key_dim);
          }
        attend<T, DOT>(sums, top, total, rows_q, position, sinks ? sink : nullptr, keys, values, first, last,
                       rows_here, key_dim, value_pad, scale, window);
        for (int j = 0; j < positions; j++)
          for (int g = 0; g < heads_here; g++) {
            int r = j * heads_here + g;
            T* o = out + ((int64_t)(c[0] + t.from + j) * heads + own * group + g0 + g) * value_dim;
            divide_row(o, sums + r * value_pad, total[r], value_dim);
          }
      }
    }
  }
}

}  // namespace

// Heads of an odd size have no pairs of dimensions.
template <class T, class F>
inline void choose(int key_dim, F f) {
  if constexpr (DOTS && std::is_same_v<T, bf16>)
    if (key_dim % 2 == 0) return f(std::true_type{});
  f(std::false_type{});
}

#define FOR_TYPE(name, T)                                                                                             \
  extern "C" void train_forward_##name(                                                                               \
      const void* q, const void* k, const void* v, void* out, float* top, float* total, const int* spans, int count,  \
      const int64_t* at, int heads, int kv_heads, int key_dim, int value_dim, int rows, float scale, int window,      \
      const float* sinks, int threads) {                                                                              \
    Layout layout = {at[0], at[1], at[2], at[3], at[4], at[5]};                                                       \
    choose<T>(key_dim, [&](auto dot) {                                                                                \
      train_forward<T, dot>((const T*)q, (const T*)k, (const T*)v, (T*)out, top, total, spans, count, layout, heads,  \
                            kv_heads, key_dim, value_dim, rows, scale, window, sinks, threads);                       \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" void train_backward_##name(                                                                              \
      const void* q, const void* k, const void* v, const void* out, const void* grad, const float* top,               \
      const float* total, void* dq, void* dk, void* dv, const int* spans, int count, const int64_t* at, int heads,    \
      int kv_heads, int key_dim, int value_dim, int rows, float scale, int window, int threads) {                     \
    Layout layout = {at[0], at[1], at[2], at[3], at[4], at[5]};                                                       \
    choose<T>(key_dim, [&](auto dot) {                                                                                \
      train_backward<T, dot>((const T*)q, (const T*)k, (const T*)v, (const T*)out, (const T*)grad, top, total,        \
                             (T*)dq, (T*)dk, (T*)dv, spans, count, layout, at[6], at[7], heads, kv_heads, key_dim,    \
                             value_dim, rows, scale, window, threads);                                                \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" void paged_##name(const void* q, const void* k, const void* v, void* out, void* key_pages,               \
                               void* value_pages, const int* chunks, int count, const int* pages, const int64_t* at,  \
                               int heads, int kv_heads, int key_dim, int value_dim, float scale, int window,          \
                               const float* sinks, int threads) {                                                     \
    Layout layout = {at[0], at[1], at[2], at[3], at[4], at[5]};                                                       \
    choose<T>(key_dim, [&](auto dot) {                                                                                \
      paged<T, dot>((const T*)q, (const T*)k, (const T*)v, (T*)out, (T*)key_pages, (T*)value_pages, chunks, count,    \
                    pages, layout, heads, kv_heads, key_dim, value_dim, scale, window, sinks, threads);               \
    });                                                                                                               \
  }

FOR_TYPE(fp32, float)
FOR_TYPE(bf16, bf16)
