// Attention of training, over packed sequences, and the sampler's calls from Python; see attend.h.

#include "attend.h"

namespace {

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

// New keys and values into their pages, then attention over the pages.
template <class T, bool DOT>
void paged(Paged<T, DOT>& call, int threads) {
  call.prepare();
#pragma omp parallel num_threads(threads)
  {
    if (call.puts()) {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < call.puts(); task++) call.put(task);
    }
    const typename Paged<T, DOT>::Scratch room(call);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < call.tasks(); task++) call.run(task, room);
  }
}

}  // namespace

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
      Paged<T, dot> call = {(const T*)q, (const T*)k, (const T*)v, (T*)out, (T*)key_pages, (T*)value_pages,           \
                            chunks, pages, count, layout, heads, kv_heads, key_dim, value_dim, scale, window, sinks}; \
      paged(call, threads);                                                                                           \
    });                                                                                                               \
  }

FOR_TYPE(fp32, float)
FOR_TYPE(bf16, bf16)
