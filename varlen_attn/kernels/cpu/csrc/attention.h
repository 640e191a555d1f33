// What the three source files share: the arguments of a call, and the matrix products that the kernel is built on.
//
// No header of torch is included here: the kernel gets pointers, strides and offsets. So it compiles in seconds, and depends on
// no class whose layout changes between versions of torch.
#pragma once

#include <cstdint>

namespace varlen {

// The order of `dtype` in Args.
enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t kUnlimited = int64_t{1} << 40;  // a window side that cuts nothing

// One call, forward or backward. Mirrored field by field by a ctypes.Structure; every field is 8 bytes wide.
// Rows of packed tensors are `*_row` elements apart, heads `*_head`; a head's numbers are adjacent. Heads are padded by the caller
// to a multiple of 16; of bfloat16, strides and addresses are multiples of two numbers. `out`, gradients that are written and `lse` are contiguous.
struct Args {
  const void *q, *k, *v;
  void* out;        // (rows_q, heads, value_dim); read in backward
  float* lse;       // (heads, rows_q), without the sinks; read in backward
  const void* grad; // of out
  void *dq, *dk, *dv;
  float* dsinks;    // (num_seqs, heads): parts of the gradient of the sinks, to be added up
  const int32_t *cu_q, *cu_k;
  const float *slopes, *sinks;  // (heads,) or null
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head;
  int64_t num_seqs, rows_q, rows_k, heads, kv_heads, dim, value_dim;
  int64_t dtype;
  int64_t low, high;     // query i sees keys i + low + shift .. i + high + shift, both included
  int64_t bottom_right;  // shift is Lk - Lq, else 0
  int64_t seed;
  int64_t slack_q, slack_k;  // whether rows may follow the last sequence
  double scale, softcap, dropout_p;  // softcap and dropout_p: 0 is none
  int64_t level, portable;           // for tests: another instruction set than the best one, no product of libtorch
};

// C = A B, or C += A B. A is (m, k), B is (k, n), C is (m, n), all row by row. n and k are multiples of 16.
// For bfloat16, B has pairs of rows interleaved: (k / 2, n, 2).
using GemmFloat = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a,
                           const float* b, float* c);
using GemmHalf = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* a,
                          const uint16_t* b, float* c);

struct Gemm {
  GemmFloat f32;           // null: the kernel's own
  GemmHalf bf16;           // null: bfloat16 is computed in float32
  void (*release)(bool half);  // given back at the end of a thread's work; null: nothing to give back
};

// The kernel, compiled once for each instruction set.
struct Level {
  void (*forward)(const Args&, const Gemm&);
  void (*backward)(const Args&, const Gemm&);
};

}  // namespace varlen
