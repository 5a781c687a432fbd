// Tokens drawn from rows of logits: each row by itself, by its own temperature, cuts and uniform number.
//
// A row's probabilities are exp(x / t - maximum), fp32, and their running sum is kept in double precision: over
// blocks of BLOCK numbers in order, and within a block over its numbers in order.

#include <numeric>
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t BLOCK = 64;
constexpr int64_t SIDE = 8;
constexpr float NEVER = -INFINITY;

struct Candidate {
  float x;
  int64_t index;
};

inline bool before(const Candidate& a, const Candidate& b) { return a.x > b.x || (a.x == b.x && a.index < b.index); }

template <class T>
struct Row {
  const T* x;
  int64_t width;
  float top;

  float exponent(int64_t i) const {
    const float e = value(x[i]) - top;
    return e <= 0 ? e : NEVER;  // where logits are no numbers, there is an order all the same
  }
  float weight(int64_t i) const { return exponential(exponent(i)); }

  // f(sum of the weights) of block after block. SIDE of them are added up side by side, as each of them is a chain.
  template <class F>
  void each_block(F f) const {
    float kept[SIDE][BLOCK];
    for (int64_t start = 0; start < width; start += SIDE * BLOCK) {
      const int64_t count = std::min(SIDE * BLOCK, width - start), whole = count / BLOCK;
      each(count, [&](int64_t i, int64_t n) {
        V e = exponential(sub(take(x + start + i, n), spread(top)));
        float* to = &kept[0][0] + i;
        if (n == W) store(to, e);
        else store_some(to, e, n);
      });
      double sums[SIDE] = {};
      if (whole == SIDE)
        for (int64_t i = 0; i < BLOCK; i++)
          for (int64_t b = 0; b < SIDE; b++) sums[b] += kept[b][i];
      else
        for (int64_t i = 0; i < count; i++) sums[i / BLOCK] += kept[i / BLOCK][i % BLOCK];
      for (int64_t b = 0; b * BLOCK < count; b++) f(sums[b]);
    }
  }

  // The first index at which the running sum exceeds u times the whole.
  int64_t draw(double u, std::vector<double>& sums) const {
    double whole = 0;
    sums.clear();
    each_block([&](double sum) { sums.push_back(whole += sum); });
    const double wanted = u * whole;
    const size_t at = std::upper_bound(sums.begin(), sums.end(), wanted) - sums.begin();
    if (at < sums.size()) {
      double sum = at ? sums[at - 1] : 0;
      const int64_t start = (int64_t)at * BLOCK;
      for (int64_t i = start; i < std::min(width, start + BLOCK); i++)
        if ((sum += weight(i)) > wanted) return i;
    }
    // Rounding has put u at the very end: the last token that has any probability.
    for (int64_t i = width - 1; i > 0; i--)
      if (weight(i) > 0) return i;
    return 0;
  }

  double whole() const {
    double all = 0;
    each_block([&](double sum) { all += sum; });
    return all;
  }

  // The likeliest tokens in order, ties by their index: `top_k` of them (all where it is 0), or, if fewer, enough for
  // `mass` of their weights together.
  void likeliest(int64_t top_k, double mass, std::vector<Candidate>& out) const {
    for (float depth = 8;; depth *= 2) {  // how far below the maximum to look
      const bool all = depth > 87;
      double sum = 0;
      out.clear();
      for (int64_t i = 0; i < width; i++)
        if (const float e = exponent(i); all || e >= -depth) {
          out.push_back({e, i});
          if (!top_k) sum += exponential(e);
        }
      if (all || (!out.empty() && (top_k ? (int64_t)out.size() >= top_k : sum >= mass))) break;
    }
    if (top_k && (int64_t)out.size() > top_k) {
      std::nth_element(out.begin(), out.begin() + top_k, out.end(), before);
      out.resize(top_k);
    }
    std::sort(out.begin(), out.end(), before);
  }

  // As `draw`, from what top_k and then, of the rest, top_p leaves.
  int64_t draw_cut(double u, int64_t top_k, double top_p, std::vector<Candidate>& some) const {
    double all = top_k ? 0 : whole();
    likeliest(top_k, top_p * all, some);
    if (top_k)
      for (const Candidate& c : some) all += exponential(c.x);
    double kept = 0;
    size_t count = 0;
    while (count < some.size() && kept < top_p * all) kept += exponential(some[count++].x);
    double sum = 0;
    size_t last = 0;
    for (size_t i = 0; i < count; i++) {
      const float e = exponential(some[i].x);
      if ((sum += e) > u * kept) return some[i].index;
      if (e > 0) last = i;
    }
    return some[last].index;
  }
};

template <class T>
int64_t draw(const Row<T>& row, double u, int64_t top_k, double top_p, std::vector<double>& sums,
             std::vector<Candidate>& some) {
  if (u < 0) {  // the likeliest one
    for (int64_t i = 0; i < row.width; i++)
      if (value(row.x[i]) == row.top) return i;
    return 0;
  }
  if (top_k > 0 || top_p < 1) return row.draw_cut(u, std::min(top_k, row.width), top_p, some);
  return row.draw(u, sums);
}

template <class T>
void draw(const T* logits, const float* top, const double* u, const int64_t* top_k, const double* top_p, int64_t* out,
          int64_t rows, int64_t width, int64_t ld, int threads) {
  const auto one = [&](int64_t r, std::vector<double>& sums, std::vector<Candidate>& some) {
    out[r] = draw(Row<T>{logits + r * ld, width, top[r]}, u[r], top_k[r], top_p[r], sums, some);
  };
  if (threads == 1 || rows == 1) {  // no team is needed: the caller may be one of a team already
    std::vector<double> sums;
    std::vector<Candidate> some;
    for (int64_t r = 0; r < rows; r++) one(r, sums, some);
    return;
  }
#pragma omp parallel num_threads((int)std::min<int64_t>(threads, rows))
  {
    std::vector<double> sums;
    std::vector<Candidate> some;
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < rows; r++) one(r, sums, some);
  }
}

}  // namespace

#define FOR_TYPE(name, T)                                                                                                \
  extern "C" void draw_##name(const void* logits, const float* top, const double* u, const int64_t* top_k,              \
                              const double* top_p, int64_t* out, int64_t rows, int64_t width, int64_t ld, int threads) { \
    draw((const T*)logits, top, u, top_k, top_p, out, rows, width, ld, threads);                                        \
  }

FOR_TYPE(fp32, float)
FOR_TYPE(bf16, bf16)
