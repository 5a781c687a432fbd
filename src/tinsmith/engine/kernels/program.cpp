// A model's way from embedded tokens to final hidden states as a list of instructions, carried out without a word of
// Python between them. What each does is what the kernel of its name does. Instructions that take each row by itself
// are one phase as long as they follow each other: whoever takes some rows takes them through all of those.

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
      phases.share(phase, stage.linears.chain_tasks(), thread, [&](int64_t task, int64_t) { stage.linears.chain(task); });
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

extern "C" void program_run(const int64_t* code, int64_t count, const Step* step) {
  std::vector<Stage> stages = stages_of(code, count, *step);
  int64_t size = 0;
  for (const Stage& stage : stages) size = std::max(size, stage.linears.size);
  std::vector<u16> scratch(size);
  for (Stage& stage : stages) stage.linears.use(scratch.data());
  Phases phases((int64_t)stages.size() * PHASES, (int)step->threads);
#pragma omp parallel num_threads((int)step->threads)
  work(stages, *step, phases, omp_get_thread_num());
}

#endif
