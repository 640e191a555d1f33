// Whether a mask of attention hides exactly what it is thought to hide, by the bits of its numbers: one pass, which ends where one differs.
#pragma once

#include <atomic>

#include "attention.h"

namespace varlen::VARLEN_LEVEL {
namespace {

// W is an unsigned integer as wide as a number of the mask. Without memory for two rows nothing is known, and the mask may differ.
template <class W>
bool differs_as(const Mask& mask, const Torch& torch) {
  std::atomic<bool> found{false};
  auto part = [&](int64_t begin, int64_t end) {
    const Mask m = mask;  // nothing that is written can be a part of it
    const Memory<W> rows = allocate<W>(2 * m.columns);
    W *const wanted = rows.get(), *const counts = wanted + m.columns;
    if (!wanted) found = true;
    for (int64_t group = begin; group < end && !found; group++) {
      const uint8_t* const seqs = m.of_keys + group * m.columns;
      for (int64_t j = 0; j < m.columns; j++) counts[j] = m.counts_k && !m.counts_k[group * m.columns + j] ? W{0} : static_cast<W>(-1);
      for (int64_t i = 0; i < m.rows && !found; i++) {
        if (m.counts_q && !m.counts_q[group * m.rows + i]) continue;
        const uint8_t seq = m.of_queries[group * m.rows + i];
        const W hidden = static_cast<W>(m.hidden);
        std::fill(wanted, wanted + m.columns, hidden);
        for (int64_t j = std::max<int64_t>(i - m.left, 0); j < std::min(i + m.right + 1, m.columns); j++) wanted[j] = seqs[j] == seq ? W{0} : hidden;
        for (int64_t head = 0; head < m.heads; head++) {
          const W* const numbers = reinterpret_cast<const W*>(m.numbers + group * m.group_step + head * m.head_step + i * m.row_step);
          W bits = 0;
#pragma omp simd reduction(| : bits)
          for (int64_t j = 0; j < m.columns; j++) bits |= (numbers[j] ^ wanted[j]) & counts[j];
          if (bits) found = true;
        }
      }
    }
  };
  using Part = decltype(part);
  const int64_t grain = 1 + (1 << 16) / (mask.heads * mask.rows * mask.columns + 1);
  if (!torch.parallel_for || torch.parallel_for(0, mask.groups, grain, [](int64_t begin, int64_t end, void* all) { (*static_cast<Part*>(all))(begin, end); }, &part))
    part(0, mask.groups);
  return found;
}

bool differs(const Mask& m, const Torch& torch) {
  if (m.size == 1) return differs_as<uint8_t>(m, torch);
  if (m.size == 2) return differs_as<uint16_t>(m, torch);
  return m.size == 4 ? differs_as<uint32_t>(m, torch) : differs_as<uint64_t>(m, torch);
}

}  // namespace
}  // namespace varlen::VARLEN_LEVEL
