// What a transformer does with every number of a row beside its matrix products: norms, gates, rotations, softmax
// over the vocabulary. A pass over a row each, where a library's own operations make five to ten.
//
// A row's result depends on that row alone: sums go over its vectors in order. Arithmetic is fp32; values are
// rounded to the element type where transformers rounds them.

#include "vector.h"

namespace {

constexpr int64_t GRAIN = 1 << 15;  // numbers below which a second thread costs more than it brings

inline int workers(int64_t numbers, int threads) {
  return (int)std::max<int64_t>(1, std::min<int64_t>(threads, numbers / GRAIN));
}

// f(row) for all rows, on so many threads. One needs no team: the caller may be one of a team already.
template <class F>
inline void each_row(int64_t rows, int threads, F f) {
  if (threads == 1) {
    for (int64_t r = 0; r < rows; r++) f(r);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; r++) f(r);
}

enum Style { ROUND_THEN_SCALE = 0, SCALE = 1, SCALE_BY_ONE_PLUS = 2 };

template <class T>
inline V scale_of(const T* weight, int64_t count, int style) {
  V w = take(weight, count);
  return style == SCALE_BY_ONE_PLUS ? add(w, spread(1.0f)) : w;
}

inline double exact_sum_of(V x) {
  float lane[W];
  double total = 0;
  store(lane, x);
  for (int i = 0; i < W; i++) total += lane[i];
  return total;
}

// y = x / sqrt(mean(x^2) + eps) * weight; keeps 1 / sqrt(...)
template <class T>
void norm_forward(const T* x, const T* weight, T* y, float* inverse, int64_t rows, int64_t width, int64_t ldx, float eps,
                  int style, int threads) {
  each_row(rows, workers(rows * width, threads), [&](int64_t r) {
    const T* in = x + r * ldx;
    T* out = y + r * width;
    V sum = zero();
    each(width, [&](int64_t i, int64_t n) {
      V v = take(in + i, n);
      sum = fma(v, v, sum);
    });
    const float inv = (float)(1.0 / std::sqrt(exact_sum_of(sum) / (double)width + (double)eps));
    if (inverse) inverse[r] = inv;
    const V by = spread(inv);
    each(width, [&](int64_t i, int64_t n) {
      V v = mul(take(in + i, n), by);
      if (style == ROUND_THEN_SCALE) v = rounded(v, in);
      give(out + i, mul(v, scale_of(weight + i, n, style)), n);
    });
  });
}

// dx = inverse * g w - x inverse^3 mean(g w x)
template <class T>
void norm_backward(const T* x, const T* weight, const T* grad, const float* inverse, T* dx, int64_t rows, int64_t width,
                   int64_t ldx, int64_t ldg, int style, int threads) {
  each_row(rows, workers(rows * width, threads), [&](int64_t r) {
    const T *in = x + r * ldx, *g = grad + r * ldg;
    T* out = dx + r * width;
    V sum = zero();
    each(width, [&](int64_t i, int64_t n) {
      sum = fma(mul(take(g + i, n), scale_of(weight + i, n, style)), take(in + i, n), sum);
    });
    const float inv = inverse[r];
    const V by = spread(inv), back = spread((float)(-(double)inv * inv * inv * (exact_sum_of(sum) / (double)width)));
    each(width, [&](int64_t i, int64_t n) {
      V v = mul(mul(take(g + i, n), scale_of(weight + i, n, style)), by);
      give(out + i, fma(take(in + i, n), back, v), n);
    });
  });
}

// 1 / (1 + exp(-x))
inline V sigmoid(V x) {
  const V one = spread(1.0f);
  V e = exponential(sub(zero(), maximum(x, sub(zero(), x))));  // exp(-|x|)
  return divide(where_below(x, zero(), e, one), add(one, e));
}

// y = silu(gate) * up
template <class T>
void gate_forward(const T* gate, const T* up, T* y, int64_t rows, int64_t width, int64_t ldg, int64_t ldu, int threads) {
  each_row(rows, workers(rows * width, threads), [&](int64_t r) {
    each(width, [&](int64_t i, int64_t n) {
      V g = take(gate + r * ldg + i, n);
      give(y + r * width + i, mul(rounded(mul(g, sigmoid(g)), y), take(up + r * ldu + i, n)), n);
    });
  });
}

template <class T>
void gate_backward(const T* gate, const T* up, const T* grad, T* dgate, T* dup, int64_t rows, int64_t width, int64_t ldg,
                   int64_t ldu, int64_t ldy, int threads) {
  each_row(rows, workers(rows * width, threads), [&](int64_t r) {
    each(width, [&](int64_t i, int64_t n) {
      V g = take(gate + r * ldg + i, n), d = take(grad + r * ldy + i, n), s = sigmoid(g);
      V silu = mul(g, s);
      // d silu / d g = s + g s (1 - s)
      V slope = fma(silu, sub(spread(1.0f), s), s);
      give(dup + r * width + i, mul(d, silu), n);
      give(dgate + r * width + i, mul(mul(d, take(up + r * ldu + i, n)), slope), n);
    });
  });
}

// One head's first `rotary` numbers turned: (x1, x2) -> (x1 c1 - x2 s1, x2 c2 + x1 s2), with (x1, x2) the halves; the
// transpose of that where `back`. The rest is copied. cos and sin of the second half stand `second` behind.
template <class T>
inline void turn(const T* x, const T* cos, const T* sin, T* y, int64_t dim, int64_t half, int64_t second, bool back) {
  each(half, [&](int64_t i, int64_t n) {
    V left = take(x + i, n), right = take(x + half + i, n);
    V c1 = take(cos + i, n), c2 = take(cos + second + i, n), s1 = take(sin + i, n), s2 = take(sin + second + i, n);
    if (back) std::swap(s1, s2), s1 = sub(zero(), s1), s2 = sub(zero(), s2);
    give(y + i, fma(left, c1, sub(zero(), mul(right, s1))), n);
    give(y + half + i, fma(right, c2, mul(left, s2)), n);
  });
  if (dim > 2 * half) std::copy(x + 2 * half, x + dim, y + 2 * half);
}

// x: [heads][rows][dim] with any strides -> y: [rows][heads][dim] dense; cos, sin: [rows][ldc]
template <class T>
void rotate(const T* x, const T* cos, const T* sin, T* y, int64_t rows, int64_t heads, int64_t dim, int64_t half,
            int64_t second, int64_t ldc, int64_t head_stride, int64_t row_stride, int back, int threads) {
  each_row(rows, workers(rows * heads * dim, threads), [&](int64_t r) {
    for (int64_t h = 0; h < heads; h++)
      turn(x + h * head_stride + r * row_stride, cos + r * ldc, sin + r * ldc, y + (r * heads + h) * dim, dim, half,
           second, back != 0);
  });
}

// Of each row: its maximum, and the logarithm of the sum of exp(x - maximum).
template <class T>
void normalizers(const T* x, float* top, float* total, int64_t rows, int64_t width, int64_t ldx, int threads) {
  each_row(rows, workers(rows * width, threads), [&](int64_t r) {
    const T* in = x + r * ldx;
    V most = spread(-INFINITY);
    each(width, [&](int64_t i, int64_t n) {
      if (n == W) most = maximum(most, load(in + i));
      else
        for (int64_t j = 0; j < n; j++) most = maximum(most, spread(value(in[i + j])));
    });
    const float highest = maximum_of(most);
    const V shift = spread(highest);
    V sum = zero();
    float rest = 0;
    each(width, [&](int64_t i, int64_t n) {
      if (n == W) sum = add(sum, exponential(sub(load(in + i), shift)));
      else
        for (int64_t j = 0; j < n; j++) rest += exponential(value(in[i + j]) - highest);
    });
    top[r] = highest;
    total[r] = std::log(sum_of(sum) + rest);
  });
}

// table = (x - top) - total
template <class T>
void log_softmax(const T* x, const float* top, const float* total, float* table, int64_t rows, int64_t width, int64_t ldx,
                 int threads) {
  each_row(rows, workers(rows * width, threads), [&](int64_t r) {
    const V shift = spread(top[r]), scale = spread(total[r]);
    each(width, [&](int64_t i, int64_t n) {
      give(table + r * width + i, sub(sub(take(x + r * ldx + i, n), shift), scale), n);
    });
  });
}

// dx = sum over j of grad[j] (onehot(chosen[j]) - softmax(x)), in place of x
template <class T>
void log_softmax_backward(T* x, const float* top, const float* total, const int64_t* chosen, const float* grad,
                          int64_t count, int64_t rows, int64_t width, int64_t ldx, int threads) {
  each_row(rows, workers(rows * width, threads), [&](int64_t r) {
    T* in = x + r * ldx;
    const int64_t* ids = chosen + r * count;
    const float* g = grad + r * count;
    float sum = 0;
    for (int64_t j = 0; j < count; j++) sum += g[j];
    const float down = -sum;
    const auto of = [&](float v) { return down * exponential((v - top[r]) - total[r]); };
    // What the chosen ones are, before they are overwritten.
    float kept[256];
    float* own = count <= 256 ? kept : new float[count];
    for (int64_t j = 0; j < count; j++) {
      own[j] = of(value(in[ids[j]]));
      for (int64_t k = 0; k < count; k++)
        if (ids[k] == ids[j]) own[j] += g[k];
    }
    const V shift = spread(top[r]), scale = spread(total[r]), by = spread(down);
    each(width, [&](int64_t i, int64_t n) {
      give(in + i, mul(by, exponential(sub(sub(take(in + i, n), shift), scale))), n);
    });
    for (int64_t j = 0; j < count; j++) put(in + ids[j], own[j]);
    if (own != kept) delete[] own;
  });
}

}  // namespace

#define FOR_TYPE(name, T)                                                                                                 \
  extern "C" void norm_forward_##name(const void* x, const void* weight, void* y, float* inverse, int64_t rows,          \
                                      int64_t width, int64_t ldx, float eps, int style, int threads) {                   \
    norm_forward((const T*)x, (const T*)weight, (T*)y, inverse, rows, width, ldx, eps, style, threads);                  \
  }                                                                                                                       \
  extern "C" void norm_backward_##name(const void* x, const void* weight, const void* grad, const float* inverse,        \
                                       void* dx, int64_t rows, int64_t width, int64_t ldx, int64_t ldg, int style,       \
                                       int threads) {                                                                    \
    norm_backward((const T*)x, (const T*)weight, (const T*)grad, inverse, (T*)dx, rows, width, ldx, ldg, style,          \
                  threads);                                                                                              \
  }                                                                                                                       \
  extern "C" void gate_forward_##name(const void* gate, const void* up, void* y, int64_t rows, int64_t width,            \
                                      int64_t ldg, int64_t ldu, int threads) {                                           \
    gate_forward((const T*)gate, (const T*)up, (T*)y, rows, width, ldg, ldu, threads);                                   \
  }                                                                                                                       \
  extern "C" void gate_backward_##name(const void* gate, const void* up, const void* grad, void* dgate, void* dup,       \
                                       int64_t rows, int64_t width, int64_t ldg, int64_t ldu, int64_t ldy,               \
                                       int threads) {                                                                    \
    gate_backward((const T*)gate, (const T*)up, (const T*)grad, (T*)dgate, (T*)dup, rows, width, ldg, ldu, ldy,          \
                  threads);                                                                                              \
  }                                                                                                                       \
  extern "C" void rotate_##name(const void* x, const void* cos, const void* sin, void* y, int64_t rows, int64_t heads,    \
                                int64_t dim, int64_t half, int64_t second, int64_t ldc, int64_t head_stride,             \
                                int64_t row_stride, int back, int threads) {                                             \
    rotate((const T*)x, (const T*)cos, (const T*)sin, (T*)y, rows, heads, dim, half, second, ldc, head_stride,           \
           row_stride, back, threads);                                                                                   \
  }                                                                                                                       \
  extern "C" void normalizers_##name(const void* x, float* top, float* total, int64_t rows, int64_t width, int64_t ldx,  \
                                     int threads) {                                                                      \
    normalizers((const T*)x, top, total, rows, width, ldx, threads);                                                     \
  }                                                                                                                       \
  extern "C" void log_softmax_##name(const void* x, const float* top, const float* total, float* table, int64_t rows,    \
                                     int64_t width, int64_t ldx, int threads) {                                          \
    log_softmax((const T*)x, top, total, table, rows, width, ldx, threads);                                              \
  }                                                                                                                       \
  extern "C" void log_softmax_backward_##name(void* x, const float* top, const float* total, const int64_t* chosen,      \
                                              const float* grad, int64_t count, int64_t rows, int64_t width,             \
                                              int64_t ldx, int threads) {                                                \
    log_softmax_backward((T*)x, top, total, chosen, grad, count, rows, width, ldx, threads);                             \
  }

FOR_TYPE(fp32, float)
FOR_TYPE(bf16, bf16)
