// A model's way from embedded tokens to final hidden states as a list of instructions, carried out without a word of
// Python between them. What each does is what the kernel of its name does; rows go to the same thread from one
// row's instruction to the next, so that threads wait for each other only around products and attention.

#include "product.h"

#if TINSMITH_PAIRS

#include <omp.h>
#include <vector>

#include "vector.h"

extern "C" {
void linear_team(const void*, int64_t, int64_t, const void*, int64_t, uint16_t*, int, int);
int64_t linear_scratch(const void*, int64_t, const void*, int64_t);
void norm_forward_bf16(const void*, const void*, void*, float*, int64_t, int64_t, int64_t, float, int, int);
void gate_forward_bf16(const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int);
void rotate_bf16(const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                 int64_t, int64_t, int, int);
void paged_bf16(const void*, const void*, const void*, void*, void*, void*, const int*, int, const int*, const int64_t*,
                int, int, int, int, float, int, const float*, int);
}

namespace {

constexpr int FIELDS = 20;  // of an instruction: what it is, and its operands; addresses, and counts of elements

enum Kind { LINEAR, ATTENTION, NORM, GATE, ROTATE, ADD };

struct Step {  // what differs from one step to the next
  int64_t rows;
  const int* chunks;
  int64_t chunk_count;
  const int* pages;
  const void* segments;
  int64_t segment_count;
  int64_t threads;
};

inline float number(int64_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline const u16* at(int64_t address, int64_t elements) { return (const u16*)address + elements; }
inline u16* to(int64_t address, int64_t elements) { return (u16*)address + elements; }

// Rows [first, last) of an instruction that takes each row by itself.
void some_rows(const int64_t* op, int64_t first, int64_t last) {
  const int64_t count = last - first;
  switch (op[0]) {
    case NORM: {  // x, weight, y, norms of a row, their width, between them, between rows, eps, style
      const int64_t each = op[4], width = op[5], inner = op[6], outer = op[7];
      const void* weight = (const void*)op[2];
      u16* y = to(op[3], first * each * width);
      if (outer == each * inner)
        return norm_forward_bf16(at(op[1], first * outer), weight, y, nullptr, count * each, width, inner, number(op[8]),
                                 (int)op[9], 1);
      for (int64_t r = 0; r < count; r++)
        norm_forward_bf16(at(op[1], (first + r) * outer), weight, y + r * each * width, nullptr, each, width, inner,
                          number(op[8]), (int)op[9], 1);
      return;
    }
    case GATE: {  // gate, up, y, width, between rows of each
      const int64_t width = op[4];
      return gate_forward_bf16(at(op[1], first * op[5]), at(op[2], first * op[6]), to(op[3], first * width), count, width,
                               op[5], op[6], 1);
    }
    case ROTATE: {  // x, cos, sin, y, heads, dim, half, second, width of cos, between heads, between rows
      return rotate_bf16(at(op[1], first * op[11]), at(op[2], first * op[9]), at(op[3], first * op[9]),
                         to(op[4], first * op[5] * op[6]), count, op[5], op[6], op[7], op[8], op[9], op[10], op[11], 0, 1);
    }
    case ADD: {  // x, y, sum, width
      const int64_t start = first * op[4], n = count * op[4];
      const bf16 *x = (const bf16*)at(op[1], start), *y = (const bf16*)at(op[2], start);
      bf16* sum = (bf16*)to(op[3], start);
      each(n, [&](int64_t i, int64_t some) { give(sum + i, add(take(x + i, some), take(y + i, some)), some); });
      return;
    }
  }
}

void attention(const int64_t* op, const Step& step) {  // q, k, v, out, pages of keys and values, strides, dims, ...
  paged_bf16((const void*)op[1], (const void*)op[2], (const void*)op[3], (void*)op[4], (void*)op[5], (void*)op[6],
             step.chunks, (int)step.chunk_count, step.pages, op + 7, (int)op[13], (int)op[14], (int)op[15], (int)op[16],
             number(op[17]), (int)op[18], (const float*)op[19], (int)step.threads);
}

// Instructions without attention among them, by all threads of a team.
void between(const int64_t* code, int64_t count, const Step& step, u16* scratch) {
  const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
  const int64_t first = step.rows * thread / threads, last = step.rows * (thread + 1) / threads;
  bool apart = false;  // whether threads have gone on without waiting
  for (int64_t i = 0; i < count; i++) {
    const int64_t* op = code + i * FIELDS;
    if (op[0] != LINEAR) {
      if (first < last) some_rows(op, first, last);
      apart = true;
      continue;
    }
    if (apart) {
#pragma omp barrier
    }
    linear_team((const void*)op[1], op[2], step.rows, step.segments, step.segment_count, scratch, thread, threads);
    apart = false;
  }
}

}  // namespace

extern "C" void program_run(const int64_t* code, int64_t count, const Step* step) {
  int64_t need = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t* op = code + i * FIELDS;
    if (op[0] == LINEAR)
      need = std::max(need, linear_scratch((const void*)op[1], op[2], step->segments, step->segment_count));
  }
  std::vector<u16> scratch(need);
  for (int64_t i = 0; i < count;) {
    if (code[i * FIELDS] == ATTENTION) {
      attention(code + i++ * FIELDS, *step);
      continue;
    }
    int64_t stop = i;
    while (stop < count && code[stop * FIELDS] != ATTENTION) stop++;
#pragma omp parallel num_threads((int)step->threads)
    between(code + i * FIELDS, stop - i, *step, scratch.data());
    i = stop;
  }
}

#endif
