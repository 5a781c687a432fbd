// The model's own products by themselves, and how weights are packed for them; see linear.h.

#include "linear.h"

#include <omp.h>

#include "team.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

#if TINSMITH_PAIRS

namespace {

// pairs of rows of x [n][k] as columns of `to` [k/2][stride], for 16 rows or fewer
void pack_columns(const u32* x, int64_t rows, int64_t pairs, u32* to, int64_t stride) {
  const __m512i step = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set1_epi32((int)pairs));
  const __mmask16 mask = lanes_of(rows);
  for (int64_t i = 0; i < pairs; i++)
    _mm512_storeu_si512(to + i * stride, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, step, x + i, 4));
}

}  // namespace

extern "C" {

// y = x W^T + b for each of the products, and the adapters of the segments on their rows.
void linear(const Product* list, int64_t count, int64_t rows, const Segment* segments, int64_t segment_count,
            int threads) {
  Linears all = {list, count, rows, segments, segment_count};
  all.prepare();
  std::vector<u16> scratch(all.size);
  all.use(scratch.data());
  Phases phases(2, threads);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    phases.share(0, all.chain_tasks(), thread, [&](int64_t task, int64_t next) { all.chain(task, next); });
    phases.share(1, all.tiles(), thread, [&](int64_t task, int64_t next) { all.run(task, next); });
  }
}

// Matrices [n][k] of bf16 as pairs in columns, `width` of them together: [n / width][k/2][width], with zeros where
// there are no rows. The jobs: (matrix, where to, n, k, width), width a multiple of LANES.
void linear_pack(const int64_t* jobs, int64_t count, int threads) {
#pragma omp parallel num_threads(threads)
  for (int64_t j = 0; j < count; j++) {
    const u32* from = (const u32*)jobs[5 * j];
    u32* to = (u32*)jobs[5 * j + 1];
    const int64_t n = jobs[5 * j + 2], pairs = jobs[5 * j + 3] / 2, width = jobs[5 * j + 4];
    const int64_t padded = (n + width - 1) / width * width;
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < padded; row += LANES)
      pack_columns(from + row * pairs, n - row, pairs, to + row / width * width * pairs + row % width, width);
  }
}

// Ask for large pages below [start, start + size): fewer of them stand between the weights and the caches.
void linear_advise(char* start, int64_t size) {
#ifdef __linux__
  const int64_t page = 4096;
  char* first = (char*)(((int64_t)start + page - 1) / page * page);
  if (first + page <= start + size) madvise(first, (start + size - first) / page * page, MADV_HUGEPAGE);
#endif
}

}  // extern "C"

#endif
