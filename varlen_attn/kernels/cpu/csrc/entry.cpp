// The functions that Python calls, and the choice of instruction set and of matrix products when the library is loaded.

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "attention.h"

// oneDNN's blocked products as libtorch exports them (ATen/native/CPUBlas.h). Declared here and not included, because that header needs
// all of ATen; weak, so that a libtorch without them is found out by a null pointer (libtorch is linked whether or not it is needed).
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
__attribute__((weak)) void brgemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float*, const float*, float*, bool);
__attribute__((weak)) void brgemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const c10::BFloat16*, const c10::BFloat16*, float*,
                                  bool);
__attribute__((weak)) void brgemm_release(bool);
}  // namespace at::native::cpublas

namespace varlen {

#define VARLEN_DECLARE(name) \
  namespace name {           \
  extern const Level level;  \
  }
VARLEN_DECLARE(baseline)
#if defined(VARLEN_X86)
VARLEN_DECLARE(avx2)
VARLEN_DECLARE(avx512)
#endif

namespace {

using FloatFunction = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float*, const float*, float*, bool);
using HalfFunction = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const c10::BFloat16*, const c10::BFloat16*, float*, bool);

void brgemm_f32(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a, const float* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
}

void brgemm_bf16(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* a, const uint16_t* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const c10::BFloat16*>(a), reinterpret_cast<const c10::BFloat16*>(b), c,
                              true);
}

void release(bool half) { at::native::cpublas::brgemm_release(half); }

// Whether a product runs here and gives what it should: an exported symbol is no promise that this CPU can.
template <class T>
bool works(void (*product)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const T*, const T*, float*), T one) {
  T a[16 * 16], b[16 * 16];
  float c[16 * 16];
  std::fill(a, a + 256, one), std::fill(b, b + 256, one), std::fill(c, c + 256, 1.0f);
  try {
    product(16, 16, 16, 16, 16, 16, true, a, b, c);
    release(!std::is_same_v<T, float>);
  } catch (...) {
    return false;
  }
  for (float x : c)
    if (x != 17.0f) return false;
  return true;
}

struct Choice {
  Gemm gemm{nullptr, nullptr, nullptr};
  const Level* levels[3]{&baseline::level, nullptr, nullptr};
  int64_t best = 0;

  Choice() {
#if defined(VARLEN_X86)
    levels[1] = &avx2::level, levels[2] = &avx512::level;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("movbe"))
      best = 1;
    if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
      best = 2;
#endif
    const bool exported = static_cast<FloatFunction>(at::native::cpublas::brgemm) && at::native::cpublas::brgemm_release;
    if (exported && works<float>(brgemm_f32, 1.0f)) gemm.f32 = brgemm_f32, gemm.release = release;
#if defined(VARLEN_X86)
    // Without instructions for it, a product in bfloat16 is slower than one in float32.
    if (gemm.f32 && static_cast<HalfFunction>(at::native::cpublas::brgemm) && __builtin_cpu_supports("avx512bf16") &&
        works<uint16_t>(brgemm_bf16, 0x3f80))
      gemm.bf16 = brgemm_bf16;
#endif
  }
};

const Choice& choice() {
  static const Choice made;
  return made;
}

thread_local std::string last_error;

// Offsets that reach beyond the tensors would be read and written beyond: never, whatever was promised about them.
const char* wrong_offsets(const int32_t* offsets, int64_t num_seqs, int64_t rows, bool slack) {
  if (num_seqs < 0 || !offsets) return "offsets must have an entry";
  if (offsets[0] != 0) return "offsets must start at 0";
  for (int64_t s = 0; s < num_seqs; s++)
    if (offsets[s + 1] < offsets[s]) return "offsets must not decrease";
  if (offsets[num_seqs] > rows) return "offsets must not end beyond the packed rows";
  return offsets[num_seqs] < rows && !slack ? "offsets must not end before the packed rows" : nullptr;
}

// Sizes and sides that the kernel's arithmetic is not made for, and tensors without memory.
bool fits(const Args& a) {
  const bool sizes = a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0 && a.dim > 0 && a.dim % 16 == 0 && a.value_dim > 0 && a.value_dim % 16 == 0;
  const bool sides = std::min(a.low, a.high) >= -kUnlimited && std::max(a.low, a.high) <= kUnlimited;
  return sizes && sides && (a.rows_q == 0 || a.q) && (a.rows_k == 0 || (a.k && a.v));
}

int run(const Args* given, bool backward) {
  try {
    Args copy = *given;
    const Args* args = &copy;
    // Offsets of its own, which nobody writes to once they are checked.
    std::vector<int32_t> offsets;
    if (args->num_seqs >= 0 && args->cu_q && args->cu_k) {
      const int64_t count = args->num_seqs + 1;
      offsets.reserve(2 * count);
      offsets.assign(args->cu_q, args->cu_q + count), offsets.insert(offsets.end(), args->cu_k, args->cu_k + count);
      copy.cu_q = offsets.data(), copy.cu_k = offsets.data() + count;
    }
    for (const char* wrong : {wrong_offsets(args->cu_q, args->num_seqs, args->rows_q, args->slack_q), wrong_offsets(args->cu_k, args->num_seqs, args->rows_k, args->slack_k)})
      if (wrong) return last_error = wrong, 2;
    if (!fits(*args)) throw std::invalid_argument("sizes must be multiples of 16, heads of key/value heads, and tensors have memory");
    const Choice& chosen = choice();
    const int64_t at = args->level < 0 || args->level > chosen.best ? chosen.best : args->level;
    const Level& level = *chosen.levels[at];
    (backward ? level.backward : level.forward)(*args, chosen.gemm);
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "unknown exception";
  }
  return 1;
}

}  // namespace
}  // namespace varlen

extern "C" {
#pragma GCC visibility push(default)

int varlen_forward(const varlen::Args* args) { return varlen::run(args, false); }
int varlen_backward(const varlen::Args* args) { return varlen::run(args, true); }
const char* varlen_last_error() { return varlen::last_error.c_str(); }
int64_t varlen_args_size() { return sizeof(varlen::Args); }
int64_t varlen_level() { return varlen::choice().best; }

// What multiplies matrices: 0 the kernel's own code, 1 libtorch's for float32, 3 libtorch's for float32 and bfloat16.
int64_t varlen_products() { return (varlen::choice().gemm.f32 ? 1 : 0) + (varlen::choice().gemm.bf16 ? 2 : 0); }

#pragma GCC visibility pop
}
