// An optimizer's step over flat buffers of fp32, in one pass over memory, and the norm of a gradient.

#include <vector>

#include "vector.h"

namespace {

constexpr int64_t CHUNK = 1 << 14;  // numbers whose squares are added by themselves, whatever the threads

double chunk_of_squares(const float* x, int64_t n) {
  double lanes[W] = {};
  int64_t i = 0;
  for (; i + W <= n; i += W)
    for (int l = 0; l < W; l++) lanes[l] += (double)x[i + l] * x[i + l];
  for (int l = 0; i + l < n; l++) lanes[l] += (double)x[i + l] * x[i + l];
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}

}  // namespace

extern "C" {

// In fp64, chunk after chunk. Squares of finite fp32 numbers do not overflow there: the sum is finite if they are.
double sum_of_squares(const float* x, int64_t n, int threads) {
  const int64_t chunks = (n + CHUNK - 1) / CHUNK;
  std::vector<double> sums(chunks);
#pragma omp parallel for schedule(static) num_threads(threads) if (chunks > 1)
  for (int64_t c = 0; c < chunks; c++) sums[c] = chunk_of_squares(x + c * CHUNK, std::min(CHUNK, n - c * CHUNK));
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

// torch.optim.AdamW: p = p * decay - rate * m / (sqrt(v) / correction + eps), with m and v the moments of
// scale * gradient.
void adamw(float* params, const float* gradient, float* first, float* second, int64_t n, float scale, float decay,
           float beta1, float beta2, float eps, float rate, float correction, int threads) {
  const int64_t chunks = (n + CHUNK - 1) / CHUNK;
  const V by = spread(scale), keep = spread(decay), b1 = spread(1.0f - beta1), b2 = spread(beta2);
  const V rest = spread(1.0f - beta2), small = spread(eps), step = spread(-rate), over = spread(correction);
#pragma omp parallel for schedule(static) num_threads(threads) if (chunks > 1)
  for (int64_t c = 0; c < chunks; c++) {
    const int64_t at = c * CHUNK;
    each(std::min(CHUNK, n - at), [&](int64_t i, int64_t count) {
      const int64_t j = at + i;
      V g = mul(take(gradient + j, count), by), m = take(first + j, count), v = take(second + j, count);
      m = fma(sub(g, m), b1, m);
      v = fma(mul(g, g), rest, mul(v, b2));
      V p = mul(take(params + j, count), keep);
      p = fma(step, divide(m, add(divide(root(v), over), small)), p);
      give(params + j, p, count), give(first + j, m, count), give(second + j, v, count);
    });
  }
}

}  // extern "C"
