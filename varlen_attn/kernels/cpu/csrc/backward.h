// The backward, on transposed scores (keys x queries): no score is ever transposed in memory. They are the left operand of the products for
// dK and dV, and the right one of that for dQ, which comes out transposed. One task a sequence and key/value head.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "operands.h"
#include "tasks.h"

namespace varlen::VARLEN_LEVEL {
namespace {

// kKeysBack keys meet kRowsBack queries.
constexpr int64_t kKeysBack = 64, kRowsBack = 256;

template <class In, class T>
struct Backward {
  const Args& a;
  const Products product;
  const int64_t group = a.heads / a.kv_heads;

  static constexpr bool kInPlace = std::is_same_v<T, float>;

  struct State {
    Scratch memory;
    T *queries_t, *grads_t, *queries, *grads, *weights, *dscores, *dscores_pairs, *keys_t, *keys, *values;
    float *scores, *dweights, *dk, *dv, *dq_t, *lse, *delta, *room;
    uint32_t *drop_queries;
    struct Block {  // of queries: where its operands stand
      Right queries, grads;
    } *blocks;
  };

  State prepare() const {
    State s;
    int64_t rows = 16, keys = 16;
    for (int64_t i = 0; i < a.num_seqs; i++) {
      const Span span(a, i);
      rows = std::max(rows, span.len_q), keys = std::max(keys, span.len_k);
    }
    rows = round_up(rows, 16), keys = round_up(keys, 16);
    const int64_t block = std::min(rows, kRowsBack), dims = std::max(a.dim, a.value_dim);
    const int64_t all_keys = group > 1 ? keys : kKeysBack;  // with one head a key/value head, gradients leave block by block
    for (int pass = 0; pass < 2; pass++) {
      if (pass && !s.memory.allocate()) break;
      s.queries_t = s.memory.template take<T>(rows * a.dim);
      s.grads_t = s.memory.template take<T>(rows * a.value_dim);
      s.queries = s.memory.template take<T>(rows * a.dim);
      s.grads = s.memory.template take<T>(rows * a.value_dim);
      s.weights = s.memory.template take<T>(kInPlace ? 0 : kKeysBack * block);
      s.dscores = s.memory.template take<T>(kInPlace ? 0 : kKeysBack * block);
      s.dscores_pairs = s.memory.template take<T>(kInPlace ? 0 : kKeysBack * block);
      s.keys_t = s.memory.template take<T>(kKeysBack * a.dim);
      s.keys = s.memory.template take<T>(kKeysBack * a.dim);
      s.values = s.memory.template take<T>(kKeysBack * a.value_dim);
      s.scores = s.memory.template take<float>(kKeysBack * block);
      s.dweights = s.memory.template take<float>(kKeysBack * block);
      s.dk = s.memory.template take<float>(all_keys * a.dim);
      s.dv = s.memory.template take<float>(all_keys * a.value_dim);
      s.dq_t = s.memory.template take<float>(rows * a.dim);
      s.lse = s.memory.template take<float>(rows);
      s.delta = s.memory.template take<float>(rows);
      s.room = s.memory.template take<float>(std::max(block, kKeysBack) * dims);
      s.drop_queries = s.memory.template take<uint32_t>(rows);
      s.blocks = s.memory.template take<typename State::Block>(rows / kRowsBack + 1);
    }
    return s;
  }

  void operator()(State& s, const Task& task) const {
    const Span span(a, task.seq);
    const int64_t end = (task.head + task.heads) * group;
    for (int64_t head = task.head * group; head < end; head++) {
      if (task.heads > 1 && head + 1 < end) {
        const int64_t next = head + 1, kv_head = next / group;
        prefetch(static_cast<const In*>(a.q) + span.q0 * a.q_row + next * a.q_head, a.q_row, span.len_q, a.dim);
        prefetch(static_cast<const In*>(a.grad) + span.q0 * a.grad_row + next * a.grad_head, a.grad_row, span.len_q, a.value_dim);
        prefetch(static_cast<const In*>(a.out) + (span.q0 * a.heads + next) * a.value_dim, a.heads * a.value_dim, span.len_q, a.value_dim);
        prefetch(static_cast<const In*>(a.k) + span.k0 * a.k_row + kv_head * a.k_head, a.k_row, span.len_k, a.dim);
        prefetch(static_cast<const In*>(a.v) + span.k0 * a.v_row + kv_head * a.v_head, a.v_row, span.len_k, a.value_dim);
      }
      one_head(s, span, task.seq, head);
    }
  }

  void one_head(State& s, const Span& span, int64_t seq, int64_t head) const {
    const int64_t kv_head = head / group, member = head % group;
    const In* k = static_cast<const In*>(a.k) + span.k0 * a.k_row + kv_head * a.k_head;
    const In* v = static_cast<const In*>(a.v) + span.k0 * a.v_row + kv_head * a.v_head;
    pack_queries(s, span, head);
    if (a.sinks) sink_gradient(s, span, seq, head);
    const Dropout dropout(a, seq, head);
    if (a.dropout_p > 0)
      for (int64_t i = 0; i < span.len_q; i++) s.drop_queries[i] = dropout.query(i);
    std::fill(s.dq_t, s.dq_t + round_up(span.len_q, 16) * a.dim, 0.0f);
    for (int64_t j = 0; j < span.len_k; j += kKeysBack) {
      const int64_t keys = std::min(kKeysBack, span.len_k - j), padded = round_up(keys, 16);
      float *dk = s.dk + (group > 1 ? j * a.dim : 0), *dv = s.dv + (group > 1 ? j * a.value_dim : 0);
      bool touched = member > 0;
      if (!touched) std::fill(dk, dk + keys * a.dim, 0.0f), std::fill(dv, dv + keys * a.value_dim, 0.0f);
      const int64_t from = clamp(j - a.high - span.shift, 0, span.len_q), to = clamp(j + keys - a.low - span.shift, from, span.len_q);
      if (from < to) {
        const Left<In, T> left_k(k + j * a.k_row, a.k_row, keys, a.dim, s.keys, padded, a.rows_k - span.k0 - j);
        const Left<In, T> left_v(v + j * a.v_row, a.v_row, keys, a.value_dim, s.values, padded, a.rows_k - span.k0 - j);
        plain_transposed(k + j * a.k_row, a.k_row, keys, a.dim, s.keys_t, padded, s.room);
        for (int64_t i = from / kRowsBack * kRowsBack; i < to; i += kRowsBack) {
          const int64_t rows = round_up(std::min(kRowsBack, span.len_q - i), 16);
          // The queries of the block that see some of the keys, in whole vectors.
          const int64_t left = clamp(from - i, 0, rows) / 16 * 16, width = round_up(clamp(to - i, 0, rows), 16) - left;
          const typename State::Block& block = s.blocks[i / kRowsBack];
          const int64_t written = round_up(keys, 8);  // beyond, `derive` writes zeros
          product(written, width, a.dim, left_k.ld, rows, width, false, left_k.data, s.queries_t + i * a.dim + left * kColumn<T>, s.scores);
          product(written, width, a.value_dim, left_v.ld, rows, width, false, left_v.data, s.grads_t + i * a.value_dim + left * kColumn<T>, s.dweights);
          derive(s, span, head, dropout, i + left, width, j, keys, padded);
          const T *weights, *dscores, *pairs;
          if constexpr (kInPlace) weights = s.scores, dscores = s.dweights, pairs = s.dweights;
          else weights = s.weights, dscores = s.dscores, pairs = s.dscores_pairs;
          const T *grads = static_cast<const T*>(block.grads.data) + left * block.grads.ld;
          const T *queries = static_cast<const T*>(block.queries.data) + left * block.queries.ld;
          product(keys, a.value_dim, width, width, block.grads.ld, a.value_dim, true, weights, grads, dv);
          product(keys, a.dim, width, width, block.queries.ld, a.dim, true, dscores, queries, dk);
          product(a.dim, width, padded, padded, width, rows, true, s.keys_t, pairs, s.dq_t + i * a.dim + left);
        }
      }
      if (member == group - 1) write_keys(span, kv_head, j, keys, dk, dv);
    }
    write_queries(s, span, head);
  }

  // Queries and gradients of one head as both kinds of right operand; log-sum-exp with sinks, and delta = rowsum(grad * out).
  void pack_queries(State& s, const Span& span, int64_t head) const {
    const In* q = static_cast<const In*>(a.q) + span.q0 * a.q_row + head * a.q_head;
    const In* grad = static_cast<const In*>(a.grad) + span.q0 * a.grad_row + head * a.grad_head;
    const In* out = static_cast<const In*>(a.out) + (span.q0 * a.heads + head) * a.value_dim;
    for (int64_t r = 0; r < span.len_q; r++) {
      const In *g = grad + r * a.grad_row, *o = out + r * a.heads * a.value_dim;
      float* __restrict products = s.room;
      for (int64_t c = 0, end = a.value_dim; c < end; c++) products[c] = widen(g[c]) * widen(o[c]);
      s.delta[r] = sum_of(products, a.value_dim);
      const float lse = a.lse[head * a.rows_q + span.q0 + r];
      s.lse[r] = a.sinks && lse != kMinusInf ? log_add(lse, a.sinks[head]) : lse;
    }
    const int64_t padded_rows = round_up(span.len_q, 16);
    std::fill(s.delta + span.len_q, s.delta + padded_rows, 0.0f);
    std::fill(s.lse + span.len_q, s.lse + padded_rows, kPlusInf);
    for (int64_t i = 0; i < span.len_q; i += kRowsBack) {
      const int64_t rows = std::min(kRowsBack, span.len_q - i), width = round_up(rows, 16);
      pack_transposed(q + i * a.q_row, a.q_row, rows, a.dim, s.queries_t + i * a.dim, width, s.room);
      pack_transposed(grad + i * a.grad_row, a.grad_row, rows, a.value_dim, s.grads_t + i * a.value_dim, width, s.room);
      const float* lse_of_rows = s.lse + i;
      s.blocks[i / kRowsBack] = {pack_rows(q + i * a.q_row, a.q_row, rows, a.dim, s.queries + i * a.dim, width, lse_of_rows),
                                 pack_rows(grad + i * a.grad_row, a.grad_row, rows, a.value_dim, s.grads + i * a.value_dim, width, lse_of_rows)};
    }
  }

  static float log_add(float x, float y) {
    const float most = std::max(x, y);
    return most + std::log(std::exp(x - most) + std::exp(y - most));
  }

  void sink_gradient(State& s, const Span& span, int64_t seq, int64_t head) const {
    double sum = 0.0;
    for (int64_t r = 0; r < span.len_q; r++)
      if (s.lse[r] != kMinusInf) sum -= std::exp(a.sinks[head] - s.lse[r]) * s.delta[r];
    a.dsinks[seq * a.heads + head] = static_cast<float>(sum);
  }

  // From transposed scores and weight gradients: weights (after dropout), score gradients, and for bfloat16 these in pairs of rows too.
  void derive(State& s, const Span& span, int64_t head, const Dropout& dropout, int64_t i, int64_t width, int64_t j, int64_t keys, int64_t padded) const {
    const float scale = static_cast<float>(a.scale), cap = static_cast<float>(a.softcap);
    const float *lse = s.lse + i, *delta = s.delta + i;
    const int32_t columns = static_cast<int32_t>(width);
    for (int64_t r = 0; r < padded; r++) {
      float *__restrict x = s.scores + r * width, *__restrict dx = s.dweights + r * width;
      if (r >= keys) {
        std::fill(x, x + width, 0.0f), std::fill(dx, dx + width, 0.0f);
      } else {
        const int64_t key = j + r;
        const int32_t low = static_cast<int32_t>(clamp(key - a.high - span.shift - i, 0, width));
        const int32_t high = static_cast<int32_t>(clamp(std::min(key - a.low - span.shift + 1, span.len_q) - i, low, width));
        if (cap > 0 || a.slopes || a.dropout_p > 0) {
          // A loop for each kind: one loop for all would compute all of them.
          const auto changed = cap > 0 ? (a.dropout_p > 0 ? &Backward::derive_changed<true, true> : &Backward::derive_changed<true, false>)
                                       : (a.dropout_p > 0 ? &Backward::derive_changed<false, true> : &Backward::derive_changed<false, false>);
          (this->*changed)(s, span, head, dropout, i, columns, key, low, high, x, dx, scale, cap);
        } else {
          for (int32_t c = 0; c < columns; c++) {
            x[c] = exp_of_negative(std::min(x[c] * scale - lse[c], 0.0f));
            dx[c] = x[c] * (dx[c] - delta[c]) * scale;
          }
          for (float* all : {x, dx}) std::fill(all, all + low, 0.0f), std::fill(all + high, all + width, 0.0f);
        }
      }
      if constexpr (!kInPlace)
        for (int32_t c = 0; c < columns; c++) {
          s.weights[r * width + c] = narrow<T>(x[c]);
          s.dscores[r * width + c] = narrow<T>(dx[c]);
        }
    }
    if constexpr (!kInPlace) pack_rows(s.dscores, width, padded, width, s.dscores_pairs, padded);
  }

  template <bool Capped, bool Drops>
  void derive_changed(State& s, const Span& span, int64_t head, const Dropout& dropout, int64_t i, int32_t columns, int64_t key, int32_t low,
                      int32_t high, float* __restrict x, float* __restrict dx, float scale, float cap) const {
    const float slope = a.slopes ? a.slopes[head] : 0.0f;
    const int32_t origin = static_cast<int32_t>(key - (span.len_k - span.len_q) - i);
    const uint32_t drop_key = Dropout::key(key), threshold = dropout.threshold;
    const float drop_scale = dropout.scale;
    const float *lse = s.lse + i, *delta = s.delta + i;
    const uint32_t* drop_queries = s.drop_queries + i;
    for (int32_t c = 0; c < columns; c++) {
      float score = rounded_product(x[c], scale), steep = scale;
      if constexpr (Capped) {
        const Tanh t = tanh_of(score / cap);
        score = rounded_product(t.value, cap), steep = scale * t.slope;
      }
      score -= slope * static_cast<float>(std::abs(c - origin));
      const bool seen = c >= low && c < high;
      const float e = exp_of(std::min(score - lse[c], 0.0f));
      const float p = seen ? e : 0.0f;
      const float kept = !Drops ? 1.0f : mix(drop_queries[c] + drop_key) >= threshold ? drop_scale : 0.0f;
      const float d = p * (dx[c] * kept - delta[c]) * steep;
      x[c] = p * kept;
      dx[c] = seen ? d : 0.0f;
    }
  }

  void write_keys(const Span& span, int64_t kv_head, int64_t j, int64_t keys, const float* dk, const float* dv) const {
    for (int64_t r = 0; r < keys; r++) {
      const int64_t row = (span.k0 + j + r) * a.kv_heads + kv_head;
      narrow_row(dk + r * a.dim, a.dim, static_cast<In*>(a.dk) + row * a.dim);
      narrow_row(dv + r * a.value_dim, a.value_dim, static_cast<In*>(a.dv) + row * a.value_dim);
    }
  }

  void write_queries(State& s, const Span& span, int64_t head) const {
    for (int64_t i = 0; i < span.len_q; i += kRowsBack) {
      const int64_t rows = std::min(kRowsBack, span.len_q - i), width = round_up(rows, 16);
      for (int64_t r0 = 0; r0 < rows; r0 += 16) {  // (dim, 16) to (16, dim) at a time
        const int64_t count = std::min<int64_t>(16, rows - r0);
        float* turned = s.room;
        transpose32(reinterpret_cast<const uint32_t*>(s.dq_t + i * a.dim + r0), width, a.dim, count, reinterpret_cast<uint32_t*>(turned), a.dim, a.dim);
        for (int64_t r = 0; r < count; r++) {
          if (s.lse[i + r0 + r] == kMinusInf) std::fill(turned + r * a.dim, turned + (r + 1) * a.dim, 0.0f);  // sees no key: 0 * NaN is NaN
          narrow_row(turned + r * a.dim, a.dim, static_cast<In*>(a.dq) + ((span.q0 + i + r0 + r) * a.heads + head) * a.dim);
        }
      }
    }
  }
};

}  // namespace
}  // namespace varlen::VARLEN_LEVEL
