// Scratch memory, and tasks shared out among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "numbers.h"

namespace varlen::VARLEN_LEVEL {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGap = 64;
#else
constexpr size_t kGap = 0;
#endif

// Scheduling. A sequence with at most kSmall pairs of query and key may take several heads in one task.
constexpr int64_t kTasksPerThread = 8, kSmall = 160 * 160;

// Scratch of one thread, cut from one allocation; nothing in it is initialised.
class Scratch {
 public:
  template <class T>
  T* take(int64_t count) {
    const size_t start = used_, end = start + std::max<int64_t>(count, 1) * sizeof(T);
    used_ = round_up(end, 64) + kGap;
#if defined(__SANITIZE_ADDRESS__)
    if (base_) __asan_poison_memory_region(base_ + end, used_ - end);  // or it could not see one part run into the next
#endif
    return reinterpret_cast<T*>(base_ + start);  // before `allocate`: only counted
  }
  void allocate() {
    memory_.reset(static_cast<char*>(std::aligned_alloc(64, round_up(used_ + 64, 64))));
    if (!memory_) throw std::bad_alloc();
    base_ = memory_.get(), used_ = 0;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  char* base_ = nullptr;
  size_t used_ = 0;
};

inline int64_t threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Some heads of one sequence, from one of its queries on.
struct Task {
  int32_t seq, head, heads, first;
};

// Rows of one head, asked for ahead of time: they are `ld` apart, and no hardware foresees that.
template <class In>
void prefetch(const In* src, int64_t ld, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < dim; c += 64 / static_cast<int64_t>(sizeof(In))) __builtin_prefetch(src + r * ld + c, 0, 2);
}

// What a task needs to know of its sequence.
struct Span {
  int64_t q0, len_q, k0, len_k, shift;
  Span(const Args& a, int64_t seq) {
    q0 = a.cu_q[seq], len_q = a.cu_q[seq + 1] - q0;
    k0 = a.cu_k[seq], len_k = a.cu_k[seq + 1] - k0;
    shift = a.bottom_right ? len_k - len_q : 0;
  }
};

// Tasks of `step` queries, those of the costliest sequences first: what is left at the end is small. Short sequences take several heads
// at once, so that one head's rows are fetched while the one before is computed.
std::vector<Task> tasks_of(const Args& a, int64_t heads, int64_t step, bool with_keys_only) {
  std::vector<std::pair<int64_t, int32_t>> order;
  for (int64_t s = 0; s < a.num_seqs; s++) {
    const Span span(a, s);
    if (span.len_q || (with_keys_only && span.len_k)) order.emplace_back(-(span.len_q + 8) * (span.len_k + 8), static_cast<int32_t>(s));
  }
  std::sort(order.begin(), order.end());
  const int64_t enough = kTasksPerThread * threads();
  const int64_t most = clamp(static_cast<int64_t>(order.size()) * heads / enough, 1, heads);
  std::vector<Task> tasks;
  for (const auto& [cost, s] : order) {
    const int64_t together = -cost > kSmall ? 1 : most;
    for (int64_t head = 0; head < heads; head += together)
      for (int64_t first = 0; first == 0 || first < a.cu_q[s + 1] - a.cu_q[s]; first += step)
        tasks.push_back({s, static_cast<int32_t>(head), static_cast<int32_t>(std::min(together, heads - head)), static_cast<int32_t>(first)});
  }
  return tasks;
}

// Every thread takes the next task until none is left. An exception of one is thrown by the caller's thread.
template <class Work>
void run_tasks(const std::vector<Task>& tasks, const Gemm& gemm, bool half, const Work& work) {
  std::atomic<size_t> next{0};
  std::exception_ptr failure;
  auto loop = [&] {
    try {
      auto state = work.prepare();
      for (size_t i = next++; i < tasks.size(); i = next++) work(state, tasks[i]);
    } catch (...) {
#pragma omp critical(varlen_failure)
      failure = std::current_exception();
      next = tasks.size();
    }
    if (gemm.release) gemm.release(half);
  };
#pragma omp parallel if (tasks.size() > 1 && threads() > 1)
  loop();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace
}  // namespace varlen::VARLEN_LEVEL
