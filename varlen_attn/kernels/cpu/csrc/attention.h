// What the source files share: the arguments of a call, and what the kernel takes from the torch that is loaded.
//
// No header of torch is included and no library is linked but C's: the kernel gets pointers, strides and offsets, and the addresses of a few
// functions of libtorch. So one build serves every version of torch. There are no exceptions, because they would need a C++ runtime: an
// error is a text, and null is success.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace varlen {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Memory = std::unique_ptr<T[], Free>;

// Nothing in it is initialised; null where there is no memory.
template <class T>
Memory<T> allocate(int64_t count) {
  return Memory<T>(static_cast<T*>(std::aligned_alloc(64, (std::max<int64_t>(count, 1) * sizeof(T) + 127) / 64 * 64)));
}

constexpr const char* kNoMemory = "there is not enough memory";

}  // namespace

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

// What is asked of a mask ``(groups, heads, rows, columns)`` of queries and keys, whose rows are adjacent numbers of `size` bytes; in the order
// of `Library.differs`. A pair is seen, and 0, where query and key have the same number of a sequence and are near; else it is `hidden`.
struct Mask {
  const char* numbers;
  const uint8_t *of_queries, *of_keys;    // (groups, rows), (groups, columns)
  const uint8_t *counts_q, *counts_k;     // likewise, 0 where a number may be anything; or null
  int64_t group_step, head_step, row_step;  // in bytes
  int64_t groups, heads, rows, columns, size;
  int64_t hidden;       // its bits
  int64_t left, right;  // query i is near to keys i - left .. i + right
  int64_t level;        // as of Args
};

// C = A B, or C += A B. A is (m, k), B is (k, n), C is (m, n), all row by row. n and k are multiples of 16.
// For bfloat16, `pairs` is true, and B has pairs of rows interleaved: (k / 2, n, 2).
template <class T>
using Gemm = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const T* a, const T* b, float* c,
                      bool pairs);

// The functions of libtorch, in the order of `_FUNCTIONS` in build.py. Each may be null: a torch without it.
struct Torch {
  int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);  // null: one thread, no products
  int32_t (*num_threads)(uint32_t*);
  Gemm<float> f32;             // null: the kernel's own
  Gemm<uint16_t> bf16;         // null: bfloat16 is computed in float32
  void (*release)(bool half);  // gives back at the end of a thread's work what products keep; null: nothing is kept
};

// The kernel, compiled once for each instruction set.
struct Level {
  const char* (*forward)(const Args&, const Torch&);
  const char* (*backward)(const Args&, const Torch&);
  bool (*differs)(const Mask&, const Torch&);
};

}  // namespace varlen
