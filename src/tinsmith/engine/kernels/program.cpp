// A model's way from embedded tokens to final hidden states as a list of instructions, and from there to the tokens that
// are drawn, carried out without a word of Python between them. What each does is what the kernel of its name does.
// Instructions that take each row by itself are one phase as long as they follow each other: whoever takes some rows
// takes them through all of those.

#include "linear.h"

#if TINSMITH_PAIRS

#include <omp.h>
#include <optional>

#include "attend.h"
#include "team.h"

extern "C" {
void norm_forward_bf16(const void*, const void*, void*, float*, int64_t, int64_t, int64_t, float, int, int);
void gate_forward_bf16(const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int);
void rotate_bf16(const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                 int64_t, int64_t, int, int);
void normalizers_bf16(const void*, float*, float*, int64_t, int64_t, int64_t, int);
void normalizers_fp32(const void*, float*, float*, int64_t, int64_t, int64_t, int);
void draw_bf16(const void*, const float*, const double*, const int64_t*, const double*, int64_t*, int64_t, int64_t,
               int64_t, int);
void draw_fp32(const void*, const float*, const double*, const int64_t*, const double*, int64_t*, int64_t, int64_t,
               int64_t, int);
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

struct Draws {  // the tokens that are drawn behind the last instruction
  const u16* hidden;
  int64_t ld;
  const int64_t* rows;  // of `hidden`, those whose logits are wanted
  int64_t count;        // of them
  u16* gathered;        // room for them, or null where they are the first rows in order
  Product* head;        // x is set here; y are the logits
  const Segment* segments;  // of the wanted rows
  int64_t segment_count;
  int64_t draws;
  const int64_t* source;  // of each draw, its row of logits
  const float* temperatures;
  const double* u;
  const int64_t* top_k;
  const double* top_p;
  int64_t* tokens;
  float* logprobs;
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

// q, k, v, out, pages of keys and values, strides, heads, heads of keys, their sizes, scale, window, sinks
template <bool DOT>
Paged<bf16, DOT> attention(const int64_t* op, const Step& step) {
  const Layout at = {op[7], op[8], op[9], op[10], op[11], op[12]};
  return {(const bf16*)op[1], (const bf16*)op[2], (const bf16*)op[3], (bf16*)op[4], (bf16*)op[5], (bf16*)op[6],
          step.chunks, step.pages, (int)step.chunk_count, at, (int)op[13], (int)op[14], (int)op[15], (int)op[16],
          number(op[17]), (int)op[18], (const float*)op[19]};
}

// What is done between one waiting of the threads for each other and the next.
struct Stage {
  const int64_t* code;
  int64_t count;  // of instructions, all of which take each row by itself, or one
  Linears linears = {};
  std::optional<Paged<bf16, true>> dots = {};  // attention, by either kind of product
  std::optional<Paged<bf16, false>> plain = {};
};

constexpr int64_t PHASES = 2;  // of a stage at most

template <bool DOT>
void attend_together(const Paged<bf16, DOT>& call, Phases& phases, int64_t phase, int thread) {
  phases.share(phase, call.puts(), thread, [&](int64_t task, int64_t) { call.put(task); });
  const typename Paged<bf16, DOT>::Scratch room(call);
  phases.share(phase + 1, call.tasks(), thread, [&](int64_t task, int64_t) { call.run(task, room); });
}

void work(const std::vector<Stage>& stages, const Step& step, Phases& phases, int thread) {
  // Rows are shared out in pieces small enough that none has to wait long for the last.
  const int64_t pieces = std::min<int64_t>(step.rows, step.threads == 1 ? 1 : 2 * step.threads);
  for (size_t i = 0; i < stages.size(); i++) {
    const Stage& stage = stages[i];
    const int64_t phase = (int64_t)i * PHASES;
    if (stage.dots) {
      attend_together(*stage.dots, phases, phase, thread);
    } else if (stage.plain) {
      attend_together(*stage.plain, phases, phase, thread);
    } else if (stage.code[0] == LINEAR) {
      phases.share(phase, stage.linears.chain_tasks(), thread,
                   [&](int64_t task, int64_t next) { stage.linears.chain(task, next); });
      phases.share(phase + 1, stage.linears.tiles(), thread,
                   [&](int64_t task, int64_t next) { stage.linears.run(task, next); });
    } else {
      phases.share(phase, pieces, thread, [&](int64_t piece, int64_t) {
        for (int64_t k = 0; k < stage.count; k++)
          some_rows(stage.code + k * FIELDS, step.rows * piece / pieces, step.rows * (piece + 1) / pieces);
      });
    }
  }
}

// A token of the logits at its temperature; a greedy one of those at 1. As sampling.py has it: logits that must be
// divided are divided in fp32.
void draw(const Draws& d, int64_t i, std::vector<float>& scaled) {
  const int64_t width = d.head->n;
  const u16* logits = d.head->y + d.source[i] * d.head->ldy;
  const float t = d.temperatures[i];
  float top, total, x;
  if (t == 0 || t == 1) {
    normalizers_bf16(logits, &top, &total, 1, width, width, 1);
    draw_bf16(logits, &top, d.u + i, d.top_k + i, d.top_p + i, d.tokens + i, 1, width, width, 1);
    x = value(((const bf16*)logits)[d.tokens[i]]);
  } else {
    scaled.resize(width);
    const V by = spread(t);
    each(width, [&](int64_t j, int64_t n) { give(&scaled[j], divide(take((const bf16*)logits + j, n), by), n); });
    normalizers_fp32(scaled.data(), &top, &total, 1, width, width, 1);
    draw_fp32(scaled.data(), &top, d.u + i, d.top_k + i, d.top_p + i, d.tokens + i, 1, width, width, 1);
    x = scaled[d.tokens[i]];
  }
  d.logprobs[i] = (x - top) - total;
}

constexpr int64_t DRAW_PHASES = 4;

void draw_together(const Draws& d, const Linears& head, Phases& phases, int64_t phase, int thread) {
  if (d.gathered)
    phases.share(phase, d.count, thread, [&](int64_t i, int64_t) {
      std::copy_n(d.hidden + d.rows[i] * d.ld, d.head->k, d.gathered + i * d.head->k);
    });
  phases.share(phase + 1, head.chain_tasks(), thread, [&](int64_t task, int64_t next) { head.chain(task, next); });
  phases.share(phase + 2, head.tiles(), thread, [&](int64_t task, int64_t next) { head.run(task, next); });
  std::vector<float> scaled;
  phases.share(phase + 3, d.draws, thread, [&](int64_t i, int64_t) { draw(d, i, scaled); });
}

std::vector<Stage> stages_of(const int64_t* code, int64_t count, const Step& step) {
  std::vector<Stage> stages;
  for (int64_t i = 0; i < count; i++) {
    const int64_t* op = code + i * FIELDS;
    const bool by_row = op[0] != LINEAR && op[0] != ATTENTION;
    if (by_row && !stages.empty() && stages.back().code[0] != LINEAR && stages.back().code[0] != ATTENTION) {
      stages.back().count++;
      continue;
    }
    stages.push_back({op, 1});
    Stage& stage = stages.back();
    if (op[0] == LINEAR) {
      stage.linears = {(const Product*)op[1], op[2], step.rows, (const Segment*)step.segments, step.segment_count};
      stage.linears.prepare();
    } else if (op[0] == ATTENTION) {
      choose<bf16>((int)op[15], [&](auto dot) {
        if constexpr (dot) stage.dots = attention<true>(op, step), stage.dots->prepare();
        else stage.plain = attention<false>(op, step), stage.plain->prepare();
      });
    }
  }
  return stages;
}

}  // namespace

// draws: null where none are wanted, or not yet.
extern "C" void program_run(const int64_t* code, int64_t count, const Step* step, const Draws* draws) {
  std::vector<Stage> stages = stages_of(code, count, *step);
  Linears head = {};
  if (draws) {
    draws->head->x = draws->gathered ? draws->gathered : draws->hidden;
    draws->head->ldx = draws->gathered ? draws->head->k : draws->ld;
    head = {draws->head, 1, draws->count, draws->segments, draws->segment_count};
    head.prepare();
  }
  int64_t size = head.size;
  for (const Stage& stage : stages) size = std::max(size, stage.linears.size);
  std::vector<u16> scratch(size);
  for (Stage& stage : stages) stage.linears.use(scratch.data());
  head.use(scratch.data());
  const int64_t behind = (int64_t)stages.size() * PHASES;
  Phases phases(behind + DRAW_PHASES, (int)step->threads);
#pragma omp parallel num_threads((int)step->threads)
  {
    const int thread = omp_get_thread_num();
    work(stages, *step, phases, thread);
    if (draws) draw_together(*draws, head, phases, behind, thread);
  }
}

#endif
