// Attention of packed sequences: one parallel region over (sequence, head, block of queries), longest sequences first.
//
// FlashAttention-2's algorithm (Dao 2023, arXiv:2307.08691): scores by blocks, softmax online, the backward computes them again from
// the log-sum-exp.
//
// Compiled once for each instruction set with VARLEN_LEVEL as its namespace: plain loops that the compiler turns into vector code.
// A block's shape depends on its own sequence alone, so a result is bitwise the same whatever else is in the batch (but for dropout, which is
// drawn by the place in the batch).

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "backward.h"
#include "forward.h"
#include "masks.h"

namespace varlen::VARLEN_LEVEL {
namespace {

// Rows that belong to no sequence (a layout of fixed capacity has them) are 0.
template <class In>
void clear_slack(void* data, int64_t from, int64_t to, int64_t width) {
  if (data && to > from) std::memset(static_cast<In*>(data) + from * width, 0, (to - from) * width * sizeof(In));
}

// Of how many queries a task is: fewer where there are not tasks enough for the threads. Rows and keys meet in the same blocks then, but for
// a window, whose first key follows from the first query.
int64_t chunk_of(const Args& a, int64_t threads) {
  int64_t chunk = kChunk;
  const auto tasks = [&a](int64_t step) {
    int64_t count = 0;
    for (int64_t s = 0; s < a.num_seqs; s++) count += (a.cu_q[s + 1] - a.cu_q[s] + step - 1) / step * a.heads;
    return count;
  };
  if (threads > 1 && a.low == -kUnlimited)
    while (chunk > kRows && tasks(chunk) < 2 * threads) chunk /= 2;
  return chunk;
}

template <class In, class T>
const char* forward_as(const Args& a, const Torch& torch, const Products& products) {
  const int64_t end = a.cu_q[a.num_seqs];
  clear_slack<In>(a.out, end, a.rows_q, a.heads * a.value_dim);
  for (int64_t h = 0; h < a.heads; h++) std::fill(a.lse + h * a.rows_q + end, a.lse + (h + 1) * a.rows_q, kMinusInf);
  const int64_t count = threads(torch), chunk = chunk_of(a, count);
  return run_tasks(Tasks(a, a.heads, chunk, false, count), torch, count, std::is_same_v<T, BF16>, Forward<In, T>{a, products, chunk});
}

template <class In, class T>
const char* backward_as(const Args& a, const Torch& torch, const Products& products) {
  clear_slack<In>(a.dq, a.cu_q[a.num_seqs], a.rows_q, a.heads * a.dim);
  clear_slack<In>(a.dk, a.cu_k[a.num_seqs], a.rows_k, a.kv_heads * a.dim);
  clear_slack<In>(a.dv, a.cu_k[a.num_seqs], a.rows_k, a.kv_heads * a.value_dim);
  const int64_t count = threads(torch);
  return run_tasks(Tasks(a, a.kv_heads, kUnlimited, true, count), torch, count, std::is_same_v<T, BF16>, Backward<In, T>{a, products});
}

bool in_bf16(const Args& a, const Torch& torch) { return torch.bf16 && !a.portable; }

Products products_of(const Args& a, const Torch& given) { return {given.f32 && !a.portable ? given.f32 : gemm, given.bf16}; }

const char* forward(const Args& a, const Torch& torch) {
  const Products products = products_of(a, torch);
  if (a.dtype == kFloat32) return forward_as<float, float>(a, torch, products);
  if (a.dtype == kFloat16) return forward_as<F16, float>(a, torch, products);
  return in_bf16(a, torch) ? forward_as<BF16, BF16>(a, torch, products) : forward_as<BF16, float>(a, torch, products);
}

const char* backward(const Args& a, const Torch& torch) {
  const Products products = products_of(a, torch);
  if (a.dtype == kFloat32) return backward_as<float, float>(a, torch, products);
  if (a.dtype == kFloat16) return backward_as<F16, float>(a, torch, products);
  return in_bf16(a, torch) ? backward_as<BF16, BF16>(a, torch, products) : backward_as<BF16, float>(a, torch, products);
}

}  // namespace

extern const Level level;
const Level level{forward, backward, differs};

}  // namespace varlen::VARLEN_LEVEL
