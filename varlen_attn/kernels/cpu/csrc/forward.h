// The forward: scores by blocks, softmax online, one task a head and chunk of queries.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "operands.h"
#include "tasks.h"

namespace varlen::VARLEN_LEVEL {
namespace {

// kRows queries meet kKeys keys at a time, and one task is at most kChunk queries, for which keys are packed once.
constexpr int64_t kRows = 64, kKeys = 256, kChunk = 512;

template <class In, class T>
struct Forward {
  const Args& a;
  const Products product;
  const int64_t chunk = kChunk;
  const float* sinks = a.sinks;

  struct State {
    Scratch memory;
    T *keys, *values, *queries, *weights;
    float *scores, *sums, *most, *total, *room;
    uint32_t* drop_keys;
  };

  static constexpr bool kInPlace = std::is_same_v<T, float>;  // scores become weights where they stand

  State prepare() const {
    State s;
    int64_t rows = 1, keys = 16;
    for (int64_t i = 0; i < a.num_seqs; i++) {
      const Span span(a, i);
      rows = std::max(rows, std::min(chunk, span.len_q)), keys = std::max(keys, std::min(kKeys, round_up(span.len_k, 16)));
    }
    rows = round_up(rows, kRows);
    for (int pass = 0; pass < 2; pass++) {
      if (pass && !s.memory.allocate()) break;
      s.keys = s.memory.template take<T>(keys * a.dim);
      s.values = s.memory.template take<T>(keys * a.value_dim);
      s.queries = s.memory.template take<T>(rows * a.dim);
      s.weights = s.memory.template take<T>(kInPlace ? 0 : kRows * keys);
      s.scores = s.memory.template take<float>(kRows * keys);
      s.sums = s.memory.template take<float>(rows * a.value_dim);
      s.most = s.memory.template take<float>(rows);
      s.total = s.memory.template take<float>(rows);
      s.room = s.memory.template take<float>(std::is_same_v<In, T> ? 0 : keys * a.dim);
      s.drop_keys = s.memory.template take<uint32_t>(keys);
    }
    return s;
  }

  void operator()(State& s, const Task& task) const {
    const Span span(a, task.seq);
    for (int64_t head = task.head; head < task.head + task.heads; head++) {
      if (head + 1 < task.head + task.heads) {
        const int64_t next = head + 1, kv_head = next / (a.heads / a.kv_heads);
        prefetch(static_cast<const In*>(a.q) + span.q0 * a.q_row + next * a.q_head, a.q_row, span.len_q, a.dim);
        prefetch(static_cast<const In*>(a.k) + span.k0 * a.k_row + kv_head * a.k_head, a.k_row, span.len_k, a.dim);
        prefetch(static_cast<const In*>(a.v) + span.k0 * a.v_row + kv_head * a.v_head, a.v_row, span.len_k, a.value_dim);
      }
      one_head(s, span, task.seq, head, task.first);
    }
  }

  void one_head(State& s, const Span& span, int64_t seq, int64_t head, int64_t first) const {
    const int64_t kv_head = head / (a.heads / a.kv_heads), last = std::min(first + chunk, span.len_q);
    const In* q = static_cast<const In*>(a.q) + (span.q0 + first) * a.q_row + head * a.q_head;
    const In* k = static_cast<const In*>(a.k) + span.k0 * a.k_row + kv_head * a.k_head;
    const In* v = static_cast<const In*>(a.v) + span.k0 * a.v_row + kv_head * a.v_head;
    const int64_t rows = last - first, padded_rows = round_up(rows, 8);
    const Left<In, T> queries(q, a.q_row, rows, a.dim, s.queries, padded_rows, a.rows_q - span.q0 - first);
    const int64_t from = clamp(first + a.low + span.shift, 0, span.len_k), to = clamp(last + a.high + span.shift, from, span.len_k);
    std::fill(s.most, s.most + rows, kMinusInf);
    std::fill(s.total, s.total + rows, 0.0f);
    bool touched[kChunk / kRows] = {};
    for (int64_t n = from; n < to; n += kKeys) {
      const int64_t keys = std::min(kKeys, to - n), padded = round_up(keys, 16);
      pack_transposed(k + n * a.k_row, a.k_row, keys, a.dim, s.keys, padded, s.room);
      const Right values = pack_rows(v + n * a.v_row, a.v_row, keys, a.value_dim, s.values, padded);
      for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t block = std::min(kRows, rows - i), i0 = first + i;
        // The columns that some row of the block sees, in whole vectors.
        const int64_t left = clamp(i0 + a.low + span.shift - n, 0, keys) / 16 * 16;
        const int64_t right = clamp(i0 + block + a.high + span.shift - n, 0, keys), width = round_up(right - left, 16);
        if (left >= right) continue;
        const int64_t padded_block = round_up(block, 8);
        product(padded_block, width, a.dim, queries.ld, padded, width, false, queries.data + i * queries.ld, s.keys + left * kColumn<T>, s.scores);
        softmax(s, span, seq, head, i0, i, block, n + left, right - left, width, touched[i / kRows]);
        const T* weights;
        if constexpr (kInPlace) weights = s.scores; else weights = s.weights;
        product(padded_block, a.value_dim, width, width, values.ld, a.value_dim, touched[i / kRows], weights,
                static_cast<const T*>(values.data) + left * values.ld, s.sums + i * a.value_dim);
        touched[i / kRows] = true;
      }
    }
    finish(s, span, head, first, rows, touched);
  }

  // Whether scores are more than products times a positive number; then they are made first, and their unit is 1.
  bool is_changed() const { return a.softcap > 0 || a.slopes || !(a.scale > 0); }
  float unit() const { return is_changed() ? 1.0f : static_cast<float>(a.scale); }

  // Scores of one block become weights; sums of the rows so far are scaled to the new maximum.
  void softmax(State& s, const Span& span, int64_t seq, int64_t head, int64_t i0, int64_t i, int64_t block, int64_t n, int64_t keys, int64_t padded,
               bool rescale) const {
    const float slope = a.slopes ? a.slopes[head] : 0.0f;
    const bool changed = is_changed();
    const float scale = unit();
    const bool drops = a.dropout_p > 0;
    const Dropout dropout(a, seq, head);
    if (drops)
      for (int64_t c = 0; c < padded; c++) s.drop_keys[c] = Dropout::key(n + c);
    for (int64_t r = 0; r < block; r++) {
      const int64_t row = i0 + r;
      const int32_t low = static_cast<int32_t>(clamp(row + a.low + span.shift - n, 0, keys));
      const int32_t high = static_cast<int32_t>(clamp(row + a.high + span.shift + 1 - n, low, keys));
      float* x = s.scores + r * padded;
      if (changed) change(x, padded, slope, static_cast<int32_t>(row + span.len_k - span.len_q - n));
      // What is hidden is at both ends: loops over all columns, and the ends put right before and after, take less than masks.
      std::fill(x, x + low, kMinusInf), std::fill(x + high, x + padded, kMinusInf);
      const float most = most_of(x, padded);
      float &most_so_far = s.most[i + r], &total = s.total[i + r];
      const float before = most_so_far;
      if (most > before) most_so_far = most;
      if (most_so_far == kMinusInf) {  // nothing seen yet, or nothing but NaN, which no maximum shows: weights 0, not exp(-inf + inf)
        for (int32_t c = low; c < high; c++) total += x[c] != x[c] ? x[c] : 0.0f;
        std::fill(x, x + padded, 0.0f);
      } else {
        const float base = most_so_far;
        // The largest is exactly exp(0), however large it is.
        for (int32_t c = 0; c < static_cast<int32_t>(padded); c++) x[c] = exp_of_negative((x[c] - base) * scale);
        std::fill(x, x + low, 0.0f), std::fill(x + high, x + padded, 0.0f);
        const float fade = before == kMinusInf ? 0.0f : std::exp((before - base) * scale);
        total = total * fade + sum_of(x, padded);
        if (rescale && fade != 1.0f) {
          float* sums = s.sums + (i + r) * a.value_dim;
          for (int64_t c = 0, end = a.value_dim; c < end; c++) sums[c] *= fade;
        }
      }
      if (drops) {
        const uint32_t query = dropout.query(row);
        for (int64_t c = 0; c < padded; c++) x[c] *= dropout.factor(query, s.drop_keys[c]);
      }
      if constexpr (!kInPlace)
        for (int64_t c = 0; c < padded; c++) s.weights[r * padded + c] = narrow<T>(x[c]);
    }
    // Rows beyond the block: their sums are never read, but what they are made of must be numbers that were written.
    for (int64_t r = block; r < round_up(block, 8); r++) {
      std::fill(s.scores + r * padded, s.scores + (r + 1) * padded, 0.0f);
      if constexpr (!kInPlace) std::memset(static_cast<void*>(s.weights + r * padded), 0, padded * sizeof(T));
    }
  }

  // Scale, softcap and ALiBi. `origin`: the column at distance 0.
  void change(float* x, int64_t padded, float slope, int32_t origin) const {
    const float scale = static_cast<float>(a.scale), cap = static_cast<float>(a.softcap);
    if (cap > 0)
      for (int64_t c = 0; c < padded; c++) x[c] = rounded_product(tanh_of(x[c] * scale / cap).value, cap);
    else
      for (int64_t c = 0; c < padded; c++) x[c] *= scale;
    if (a.slopes)
      for (int32_t c = 0; c < static_cast<int32_t>(padded); c++) x[c] -= slope * static_cast<float>(std::abs(origin - c));
  }

  void finish(State& s, const Span& span, int64_t head, int64_t first, int64_t rows, const bool* touched) const {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = span.q0 + first + r;
      In* out = static_cast<In*>(a.out) + (row * a.heads + head) * a.value_dim;
      const float total = s.total[r], most = s.most[r] * unit();
      const bool blind = total == 0;  // and not NaN
      a.lse[head * a.rows_q + row] = blind ? kMinusInf : most + std::log(total);
      if (blind || !touched[r / kRows]) {
        for (int64_t c = 0; c < a.value_dim; c++) out[c] = narrow<In>(0.0f);
        continue;
      }
      const float factor = 1.0f / (sinks ? total + std::exp(sinks[head] - most) : total);
      narrow_row(s.sums + r * a.value_dim, a.value_dim, out, factor);
    }
  }
};

}  // namespace
}  // namespace varlen::VARLEN_LEVEL
