// The arguments of the compiled kernel, as C programs of the tests pass them: `varlen::Args` of attention.h.
#pragma once

#include <stdint.h>

typedef struct {
  const void *q, *k, *v;
  void* out;
  float* lse;
  const void* grad;
  void *dq, *dk, *dv;
  float* dsinks;
  const int32_t *cu_q, *cu_k;
  const float *slopes, *sinks;
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head;
  int64_t num_seqs, rows_q, rows_k, heads, kv_heads, dim, value_dim, dtype, low, high, bottom_right, seed, slack_q, slack_k;
  double scale, softcap, dropout_p;
  int64_t level, portable;
} Args;
