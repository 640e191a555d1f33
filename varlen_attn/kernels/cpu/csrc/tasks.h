// Scratch memory, and tasks shared out among threads.
#pragma once

#include <algorithm>
#include <atomic>

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
  bool allocate() {
    memory_ = varlen::allocate<char>(used_);
    base_ = memory_.get(), used_ = 0;
    return base_;
  }
  explicit operator bool() const { return base_; }

 private:
  Memory<char> memory_;
  char* base_ = nullptr;
  size_t used_ = 0;
};

inline int64_t threads(const Torch& torch) {
  uint32_t count = 1;
  return torch.parallel_for && torch.num_threads && torch.num_threads(&count) == 0 ? count : 1;
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
struct Tasks {
  Memory<Task> all;  // null: no memory
  int64_t count = 0;

  Tasks(const Args& a, int64_t heads, int64_t step, bool with_keys_only, int64_t threads) {
    struct Sequence {  // a type of this instruction set: the linker keeps one sort of each type for all of them
      int64_t cost;
      int32_t index;
      bool operator<(const Sequence& other) const { return cost != other.cost ? cost > other.cost : index < other.index; }
    };
    const Memory<Sequence> order = allocate<Sequence>(a.num_seqs);
    if (!order) return;
    int64_t size = 0, chunks = 0;
    for (int64_t s = 0; s < a.num_seqs; s++) {
      const Span span(a, s);
      if (!span.len_q && !(with_keys_only && span.len_k)) continue;
      order[size++] = {(span.len_q + 8) * (span.len_k + 8), static_cast<int32_t>(s)};
      chunks += 1 + span.len_q / step;
    }
    std::sort(order.get(), order.get() + size);
    all = allocate<Task>(chunks * heads);
    if (!all) return;
    const int64_t most = clamp(size * heads / (kTasksPerThread * threads), 1, heads);
    for (int64_t i = 0; i < size; i++) {
      const auto [cost, s] = order[i];
      const int64_t together = cost > kSmall ? 1 : most;
      for (int64_t head = 0; head < heads; head += together)
        for (int64_t first = 0; first == 0 || first < a.cu_q[s + 1] - a.cu_q[s]; first += step)
          all[count++] = {s, static_cast<int32_t>(head), static_cast<int32_t>(std::min(together, heads - head)), static_cast<int32_t>(first)};
    }
  }
};

// Every thread takes the next task until none is left. What a product throws passes through here, and becomes a status of `parallel_for`.
template <class Work>
const char* run_tasks(const Tasks& tasks, const Torch& torch, int64_t threads, bool half, const Work& work) {
  if (!tasks.all) return kNoMemory;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  auto loop = [&] {
    auto state = work.prepare();
    if (!state.memory) next = tasks.count, failed = true;
    for (int64_t i = next++; i < tasks.count; i = next++) work(state, tasks.all[i]);
    if (torch.release) torch.release(half);
  };
  using Loop = decltype(loop);
  if (!torch.parallel_for)
    loop();
  else if (torch.parallel_for(0, std::min(threads, tasks.count), 1, [](int64_t, int64_t, void* all) { (*static_cast<Loop*>(all))(); }, &loop))
    return "a matrix product of libtorch failed";
  return failed ? kNoMemory : nullptr;
}

}  // namespace
}  // namespace varlen::VARLEN_LEVEL
