// Work shared by the threads of a team, phase after phase.
//
// A phase is a number of tasks that any thread may take. A thread begins with its own part of them and goes on with
// what others have not begun; the next phase begins when all are done, not when all threads have come. So a thread
// that the system has taken off its core holds up nothing but the task in its hands, and one that comes late finds
// the phases that are over.

#pragma once

#include <atomic>
#include <cstdint>
#include <ctime>
#include <immintrin.h>
#include <memory>

namespace {

class Phases {
 public:
  Phases(int64_t count, int threads)
      : threads_(threads), numbers_(new std::atomic<int64_t>[count * (threads + 1)]()) {}

  // Do `tasks` tasks with the others: f(task, next), `next` being the task that most likely follows, or -1.
  template <class F>
  void share(int64_t phase, int64_t tasks, int thread, F f) {
    std::atomic<int64_t>*taken = numbers_.get() + phase * (threads_ + 1), &done = taken[threads_];
    if (done.load(std::memory_order_acquire) == tasks) return;
    int64_t mine = 0;
    for (int i = 0; i < threads_; i++) {
      const int part = (thread + i) % threads_;
      const int64_t first = tasks * part / threads_, last = tasks * (part + 1) / threads_;
      for (int64_t task; (task = first + taken[part].fetch_add(1, std::memory_order_relaxed)) < last; mine++)
        f(task, task + 1 < last ? task + 1 : -1);
    }
    if (mine) done.fetch_add(mine, std::memory_order_release);
    for (int spins = 0; done.load(std::memory_order_acquire) != tasks; spins++)
      if (spins < SPINS) _mm_pause();
      else rest();
  }

 private:
  static constexpr int SPINS = 2000;  // some tens of microseconds

  static void rest() {  // somebody else needs the core, perhaps the thread that is waited for
    const timespec moment = {0, 20000};
    nanosleep(&moment, nullptr);
  }

  int threads_;
  std::unique_ptr<std::atomic<int64_t>[]> numbers_;  // of each phase: taken of each thread's part, and done of all
};

}  // namespace
