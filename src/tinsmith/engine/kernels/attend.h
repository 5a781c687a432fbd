// Causal attention on a CPU whose result for a query depends on that query and its keys alone: what training
// (attention.cpp) and sampling (program.cpp) share.
//
// Every product is a chain of multiply-adds in one fixed order per element: a score over the head's dimension, an
// output over the keys in order of their position. How many rows share a call, and which, changes no bit. So a query
// comes out the same in a training pass, a chunk of a prompt and a decode step.
//
// Keys stand in pages of PAGE positions, transposed ([dim][PAGE]), so that a vector register holds the
// same dimension of neighbouring keys; values stand as they are ([PAGE][dim], dim padded to VALUE_PAD).
// Elements are fp32 or bf16, sums and softmax fp32. Where the processor multiplies bf16 by itself (DOT), keys
// stand in pairs of dimensions ([dim / 2][PAGE][2]) and values in pairs of positions ([PAGE / 2][dim][2]); weights
// and the scores' gradients are then rounded to bf16 before they are multiplied, as transformers rounds the weights.

#pragma once

#include <cstdlib>
#include <type_traits>
#include <vector>

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

// Scores of `count` rows against the first `width` keys of a page: scaled, NEVER where a row does not see the key.
template <class T, bool DOT>
void score(float* s, const Row<DOT>* q, int key_dim, const T* keys, const int* position, int first_key, int count,
           float scale, int window, int width = PAGE) {
  if constexpr (DOT) dot_product(s, PAGE, q, key_dim / 2, 1, keys, PAGE, count, width, key_dim / 2, false);
  else product(s, PAGE, q, key_dim, 1, keys, PAGE, count, width, key_dim, false);
  for (int r = 0; r < count; r++) {
    int seen_to = position[r] - first_key;                       // the last key that it sees
    int seen_from = window > 0 ? seen_to - window + 1 : INT32_MIN;  // the first one
    float* row = s + r * PAGE;
    bool whole = seen_to >= PAGE - 1 && seen_from <= 0;
    for (int i = 0; i < width / W; i++) {
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

// Give a key that nobody sees no weight.
template <bool DOT>
inline void clear(float* row, bf16* weights, int key) {
  if constexpr (DOT) weights[key] = bf16{0};
  else row[key] = 0.0f;
}

// Have so many numbers come nearer.
template <class T>
inline void fetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / (int)sizeof(T)) _mm_prefetch((const char*)(from + i), _MM_HINT_T0);
}

// Attention of up to TILE rows over pages [first, last). out: [count][value_pad] sums, not yet divided;
// top and total: [count], the maximum and the sum of the exponentials, sinks included. `tail`: how many keys of the
// last page any of the rows sees; what lies behind them would add zeros, and is not looked at.
template <class T, bool DOT>
void attend(float* out, float* top, float* total, const Row<DOT>* q, const int* position, const float* sink,
            const T* const* keys, const T* const* values, int first, int last, int count, int key_dim, int value_pad,
            float scale, int window, int tail = PAGE) {
  alignas(64) float s[TILE * PAGE];
  alignas(64) float sums[TILE * W];
  alignas(64) bf16 weights[DOT ? TILE * PAGE : 1];
  memset(out, 0, sizeof(float) * count * value_pad);
  memset(sums, 0, sizeof(float) * count * W);
  for (int r = 0; r < count; r++) {
    top[r] = sink ? sink[r] : NEVER;
    if (sink) sums[r * W] = 1.0f;
  }
  for (int page = first; page < last; page++) {
    // Of a page that is not whole, whole vectors of keys; and of values one pair more than is seen, because a
    // product with zeros is not nothing where a sum is smaller than what the processor keeps.
    const int seen = page + 1 < last ? PAGE : tail, width = padded(seen, W), parts = width / W;
    const int deep = std::min(PAGE, padded(seen, 2) + 2);
    fetch(values[page], (int64_t)value_pad * deep);
    score<T, DOT>(s, q, key_dim, keys[page], position, page * PAGE, count, scale, window, width);
    for (int r = 0; r < count; r++) {
      float* row = s + r * PAGE;
      if (deep > width) for (int i = width; i < deep; i++) clear<DOT>(row, weights + r * PAGE, i);
      V most = load(row);
      for (int i = 1; i < parts; i++) most = maximum(most, load(row + i * W));
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
      for (int i = 0; i < parts; i++) {
        V p = exponential(sub(load(row + i * W), spread(highest)));
        sum = add(sum, p);
        if constexpr (DOT) store(weights + r * PAGE + i * W, p);
        else store(row + i * W, p);
      }
      store(sums + r * W, sum);
    }
    if (page + 1 < last) fetch(keys[page + 1], (int64_t)key_dim * PAGE);
    if constexpr (DOT)
      dot_product(out, value_pad, weights, PAGE / 2, 1, values[page], value_pad, count, value_pad, deep / 2, true);
    else product(out, value_pad, s, PAGE, 1, values[page], value_pad, count, value_pad, deep, true);
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
    for (int d = 0; d < dim; d++) to[2 * d] = from ? from[d] : T{0};
  } else {
    T* to = page + (int64_t)place * pad;
    for (int d = 0; d < dim; d++) to[d] = from ? from[d] : T{0};
  }
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

// Attention of the new tokens of sequences over their pages, as tasks that threads may take in any order once `put`
// has been done where it is needed. chunks: (row, length, position, where its page numbers begin in `pages`) of each.
template <class T, bool DOT>
struct Paged {
  const T *q, *k, *v;
  T *out, *key_pages, *value_pages;
  const int *chunks, *pages;
  int count;
  Layout at;
  int heads, kv_heads, key_dim, value_dim;
  float scale;
  int window;
  const float* sinks;

  struct Tile { int chunk, from; };  // of a chunk, the positions from `from` on
  std::vector<Tile> tiles = {};
  std::vector<int> long_ones = {};  // chunks of several tiles
  int most = 0;  // pages of a sequence

  int group() const { return heads / kv_heads; }
  int together() const { return std::max(1, TILE / group()); }  // positions of a chunk whose heads make a tile
  int value_pad() const { return padded(value_dim, VALUE_PAD); }

  void prepare() {
    tiles.clear(), long_ones.clear(), most = 0;
    for (int i = 0; i < count; i++) {
      const int* c = chunks + 4 * i;
      for (int from = 0; from < c[1]; from += together()) tiles.push_back({i, from});
      if (c[1] > together()) long_ones.push_back(i);
      most = std::max(most, (c[2] + c[1] - 1) / PAGE + 1);
    }
  }

  // A chunk of one tile is written by whoever works on that; one of several before any of them is worked on.
  int64_t puts() const { return (int64_t)long_ones.size() * kv_heads; }
  void put(int64_t task) const { put(chunks + 4 * long_ones[task / kv_heads], (int)(task % kv_heads)); }

  void put(const int* c, int h) const {
    const int64_t key_page = (int64_t)key_dim * PAGE, value_page = (int64_t)value_pad() * PAGE;
    for (int j = 0; j < c[1]; j++) {
      const int position = c[2] + j, place = position % PAGE;
      const int64_t page = (int64_t)pages[c[3] + position / PAGE] * kv_heads + h;
      T* values = value_pages + page * value_page;
      put_key<DOT>(key_pages + page * key_page, k + h * at.k_head + (int64_t)(c[0] + j) * at.k_row, place, key_dim);
      put_value<DOT>(values, v + h * at.v_head + (int64_t)(c[0] + j) * at.v_row, place, value_dim, value_pad());
      // What `attend` multiplies by zero must be a number, whatever the page has held before.
      if (j + 1 == c[1])
        for (int next = place + 1; next < std::min(PAGE, padded(place + 1, 2) + 2); next++)
          put_value<DOT>(values, (const T*)nullptr, next, value_dim, value_pad());
    }
  }

  int64_t tasks() const { return (int64_t)tiles.size() * kv_heads; }

  struct Scratch {
    Room<Row<DOT>> rows;
    Room<float> sums;
    Room<const T*> keys, values;
    explicit Scratch(const Paged& p)
        : rows(TILE * p.key_dim), sums(TILE * p.value_pad()), keys(p.most), values(p.most) {}
  };

  void run(int64_t task, const Scratch& room) const {
    const Tile t = tiles[task / kv_heads];
    const int* c = chunks + 4 * t.chunk;
    const int own = (int)(task % kv_heads), positions = std::min(together(), c[1] - t.from), low = c[2] + t.from;
    const int first = first_page(low, window), last = (low + positions - 1) / PAGE + 1;
    const int64_t key_page = (int64_t)key_dim * PAGE, value_page = (int64_t)value_pad() * PAGE;
    if (c[1] <= together()) put(c, own);
    for (int p = first; p < last; p++) {
      const int64_t page = (int64_t)pages[c[3] + p] * kv_heads + own;
      room.keys[p] = key_pages + page * key_page;
      room.values[p] = value_pages + page * value_page;
    }
    for (int g0 = 0; g0 < group(); g0 += TILE) {  // one tile, unless a group has more heads than a tile rows
      const int heads_here = std::min(TILE, group() - g0), rows_here = positions * heads_here;
      int position[TILE];
      float sink[TILE], top[TILE], total[TILE];
      for (int j = 0; j < positions; j++)
        for (int g = 0; g < heads_here; g++) {
          const int r = j * heads_here + g, h = own * group() + g0 + g;
          position[r] = low + j;
          if (sinks) sink[r] = sinks[h];
          gather(room.rows.data + (int64_t)r * key_dim, q + h * at.q_head + (int64_t)(c[0] + t.from + j) * at.q_row, 0, 1,
                 key_dim, key_dim);
        }
      attend<T, DOT>(room.sums, top, total, room.rows, position, sinks ? sink : nullptr, room.keys, room.values, first,
                     last, rows_here, key_dim, value_pad(), scale, window, (low + positions - 1) % PAGE + 1);
      for (int j = 0; j < positions; j++)
        for (int g = 0; g < heads_here; g++) {
          const int r = j * heads_here + g;
          T* o = out + ((int64_t)(c[0] + t.from + j) * heads + own * group() + g0 + g) * value_dim;
          divide_row(o, room.sums + r * value_pad(), total[r], value_dim);
        }
    }
  }
};

// Heads of an odd size have no pairs of dimensions.
template <class T, class F>
inline void choose(int key_dim, F f) {
  if constexpr (DOTS && std::is_same_v<T, bf16>)
    if (key_dim % 2 == 0) return f(std::true_type{});
  f(std::false_type{});
}

}  // namespace
