// Attention of packed sequences: one parallel region over (sequence, head, block of queries), longest sequences first.
//
// FlashAttention-2's algorithm (Dao 2023, arXiv:2307.08691): scores by blocks, softmax online, the backward computes them again from
// the log-sum-exp. The backward works on transposed scores (keys x queries), so that no score is ever transposed in memory: they are
// the left operand of the products for dK and dV, and the right one of that for dQ, which comes out transposed.
//
// Compiled once for each instruction set with VARLEN_LEVEL as its namespace: plain loops that the compiler turns into vector code.
// A block's shape depends on its own sequence alone, so a result is bitwise the same whatever else is in the batch (but for dropout, which is
// drawn by the place in the batch).

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "attention.h"

namespace varlen::VARLEN_LEVEL {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr float kPlusInf = std::numeric_limits<float>::infinity();

// Right operands that are packed transposed are addressed by column, and in bfloat16 a column of a pair of rows is two numbers.
template <class T>
constexpr int64_t kColumn = sizeof(T) == 2 ? 2 : 1;

// Blocks. Forward: kRows queries meet kKeys keys at a time, and one task is kChunk queries, for which keys are packed once.
// Backward: kKeysBack keys meet kRowsBack queries.
constexpr int64_t kRows = 64, kKeys = 256, kChunk = 512;
constexpr int64_t kKeysBack = 64, kRowsBack = 256;

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGap = 64;
#else
constexpr size_t kGap = 0;
#endif

// Scheduling. A sequence with at most kSmall pairs of query and key may take several heads in one task.
constexpr int64_t kTasksPerThread = 8, kSmall = 160 * 160;

inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return std::max(low, std::min(x, high)); }
constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// ------------------------------------------------------------------ numbers

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(BF16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
// By integers, because not every compiler has a type for it. The exponent is rebiased by a product, which also serves numbers below the
// smallest normal one, infinities and NaN.
inline float widen(F16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  const float scaled = std::bit_cast<float>(rest << 13) * std::bit_cast<float>(0x77800000u);  // 2^112
  const uint32_t magnitude = rest >= 0x7c00u ? 0x7f800000u | (rest & 0x3ffu) << 13 : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(sign | magnitude);
}

template <class T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline BF16 narrow<BF16>(float x) {  // to nearest, ties to even
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}
template <>
inline F16 narrow<F16>(float x) {  // to nearest, ties to even: a sum with a large number leaves the bits that stay
  const uint32_t u = std::bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  const uint32_t low = magnitude < 0x38800000u ? 0x38800000u : magnitude & 0x7f800000u;  // the exponent, at least that of 2^-14
  const float big = std::bit_cast<float>(low + (13u << 23));  // one unit in its last place is one of the result's
  const uint32_t kept = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + big) - std::bit_cast<uint32_t>(big);
  const uint32_t normal = ((low - 0x38800000u) >> 13) + kept;
  const uint32_t finite = magnitude >= 0x477ff000u ? 0x7c00u : normal;
  return {static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : finite))};
}

// exp to about one unit in the last place: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients).
inline float exp_of(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.0f ? 88.0f : x;
  float n = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, and leaves it in the low bits
  const uint32_t power = std::bit_cast<uint32_t>(n);
  n -= 12582912.0f;
  float r = x - n * 0.693359375f;
  r += n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * std::bit_cast<float>((power << 23) + 0x3f800000u);
}

// tanh, exact to float32's relative precision also near 0, where 1 - 2 / (e^2x + 1) would cancel.
inline float tanh_of(float x) {
  const float e = exp_of(2.0f * (x < -20.0f ? -20.0f : x > 20.0f ? 20.0f : x));
  const float far = 1.0f - 2.0f / (e + 1.0f);
  const float s = x * x;
  const float near = x * (1.0f + s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f))));
  return s < 0.04f ? near : far;
}

// ------------------------------------------------------------------ dropout

// A mixing function of 32 bits with full avalanche (Wellons' "lowbias32").
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Whether a weight stays is a function of seed, sequence, head, query and key, so the backward draws what the forward drew.
struct Dropout {
  uint32_t stream, threshold;
  float scale;
  Dropout(const Args& a, int64_t seq, int64_t head) {
    const uint64_t seed = static_cast<uint64_t>(a.seed);
    stream = mix(static_cast<uint32_t>(seed) ^ mix(static_cast<uint32_t>(seed >> 32) ^ mix(static_cast<uint32_t>(seq * a.heads + head) + 0x9e3779b9u)));
    threshold = static_cast<uint32_t>(std::min(a.dropout_p * 4294967296.0, 4294967295.0));
    scale = a.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - a.dropout_p)) : 0.0f;
  }
  uint32_t query(int64_t i) const { return mix(stream + static_cast<uint32_t>(i)); }
  static uint32_t key(int64_t j) { return mix(static_cast<uint32_t>(j) ^ 0x85ebca6bu); }
  float factor(uint32_t query, uint32_t key) const { return mix(query + key) >= threshold ? scale : 0.0f; }
};

// ------------------------------------------------------------------ matrix product, where libtorch has none for this CPU

#if defined(__AVX512F__)
typedef float Vec __attribute__((vector_size(64), aligned(4)));
#elif defined(__AVX2__)
typedef float Vec __attribute__((vector_size(32), aligned(4)));
#else
typedef float Vec __attribute__((vector_size(16), aligned(4)));
#endif
constexpr int64_t kWidth = sizeof(Vec) / sizeof(float);

template <int R, int C>
void gemm_tile(int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a, const float* b, float* c) {
  Vec sum[R][C];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < C; v++) sum[r][v] = add ? *reinterpret_cast<const Vec*>(c + r * ldc + v * kWidth) : Vec{};
  for (int64_t i = 0; i < k; i++) {
    Vec row[C];
    for (int v = 0; v < C; v++) row[v] = *reinterpret_cast<const Vec*>(b + i * ldb + v * kWidth);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < C; v++) sum[r][v] += a[r * lda + i] * row[v];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < C; v++) *reinterpret_cast<Vec*>(c + r * ldc + v * kWidth) = sum[r][v];
}

template <int R>
void gemm_rows(int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a, const float* b, float* c) {
  int64_t j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth) gemm_tile<R, 2>(k, lda, ldb, ldc, add, a, b + j, c + j);
  for (; j < n; j += kWidth) gemm_tile<R, 1>(k, lda, ldb, ldc, add, a, b + j, c + j);
}

void gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a, const float* b, float* c) {
  int64_t i = 0;
  for (; i + 6 <= m; i += 6) gemm_rows<6>(n, k, lda, ldb, ldc, add, a + i * lda, b, c + i * ldc);
  for (; i < m; i++) gemm_rows<1>(n, k, lda, ldb, ldc, add, a + i * lda, b, c + i * ldc);
}

// The product by the type of its operands.
struct Products {
  GemmFloat f32;
  GemmHalf bf16;
  void operator()(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a, const float* b, float* c) const {
    f32(m, n, k, lda, ldb, ldc, add, a, b, c);
  }
  void operator()(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const BF16* a, const BF16* b, float* c) const {
    bf16(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const uint16_t*>(a), reinterpret_cast<const uint16_t*>(b), c);
  }
};

// ------------------------------------------------------------------ packing: operands from rows of a tensor

// dst[c][r] = src[r][c] in units of 32 bits, for r < rows (0 up to `padded`) and c < cols.
void transpose32(const uint32_t* src, int64_t ld, int64_t rows, int64_t cols, uint32_t* dst, int64_t ldd, int64_t padded) {
#if defined(__AVX512F__)
  for (int64_t r0 = 0; r0 < padded; r0 += 16) {
    for (int64_t c0 = 0; c0 < cols; c0 += 16) {
      const int64_t wide = std::min<int64_t>(16, cols - c0);
      const __mmask16 mask = static_cast<__mmask16>((1u << wide) - 1);
      __m512i x[16], y[16];
      for (int64_t r = 0; r < 16; r++)
        x[r] = r0 + r < rows ? _mm512_maskz_loadu_epi32(mask, src + (r0 + r) * ld + c0) : _mm512_setzero_si512();
      for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
      }
      for (int i = 0; i < 16; i += 4)
        for (int h = 0; h < 2; h++) {
          x[i + 2 * h] = _mm512_unpacklo_epi64(y[i + h], y[i + 2 + h]);
          x[i + 2 * h + 1] = _mm512_unpackhi_epi64(y[i + h], y[i + 2 + h]);
        }
      for (int i = 0; i < 16; i += 8)
        for (int h = 0; h < 4; h++) {
          y[i + h] = _mm512_shuffle_i32x4(x[i + h], x[i + 4 + h], 0x88);
          y[i + 4 + h] = _mm512_shuffle_i32x4(x[i + h], x[i + 4 + h], 0xdd);
        }
      for (int h = 0; h < 8; h++) {
        x[h] = _mm512_shuffle_i32x4(y[h], y[8 + h], 0x88);
        x[8 + h] = _mm512_shuffle_i32x4(y[h], y[8 + h], 0xdd);
      }
      for (int64_t c = 0; c < wide; c++) _mm512_storeu_si512(dst + (c0 + c) * ldd + r0, x[c]);
    }
  }
#else
  for (int64_t r0 = 0; r0 < padded; r0 += 16)
    for (int64_t c = 0; c < cols; c++)
      for (int64_t r = r0; r < r0 + 16; r++) dst[c * ldd + r] = r < rows ? src[r * ld + c] : 0;
#endif
}

template <class In>
void widen_rows(const In* src, int64_t ld, int64_t rows, int64_t dim, float* dst) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < dim; c++) dst[r * dim + c] = widen(src[r * ld + c]);
}

// The right operand (dim, padded) from (rows, dim): scores want the keys so. Columns beyond `rows` are 0. `room`: padded * dim floats.
void pack_transposed(const float* src, int64_t ld, int64_t rows, int64_t dim, float* dst, int64_t padded, float*) {
  transpose32(reinterpret_cast<const uint32_t*>(src), ld, rows, dim, reinterpret_cast<uint32_t*>(dst), padded, padded);
}
void pack_transposed(const BF16* src, int64_t ld, int64_t rows, int64_t dim, BF16* dst, int64_t padded, float*) {
  transpose32(reinterpret_cast<const uint32_t*>(src), ld / 2, rows, dim / 2, reinterpret_cast<uint32_t*>(dst), padded, padded);
}
template <class In>
void pack_transposed(const In* src, int64_t ld, int64_t rows, int64_t dim, float* dst, int64_t padded, float* room) {
  widen_rows(src, ld, rows, dim, room);
  pack_transposed(room, dim, rows, dim, dst, padded, nullptr);
}

// The right operand (padded, dim) from (rows, dim), and its row stride; rows beyond are 0. Whole blocks of float32 are used in place.
// `lse`, if there is one, tells rows that see no key: they are 0 too, because their weights are, and 0 times what stands there may be NaN.
struct Right {
  const void* data;
  int64_t ld;
};
bool is_blind(const float* lse, int64_t r) { return lse && lse[r] == kMinusInf; }

template <class In>
Right copy_rows(const In* src, int64_t ld, int64_t rows, int64_t dim, float* dst, int64_t padded, const float* lse) {
  for (int64_t r = 0; r < padded; r++) {
    if (r < rows && !is_blind(lse, r))
      for (int64_t c = 0; c < dim; c++) dst[r * dim + c] = widen(src[r * ld + c]);
    else
      std::fill(dst + r * dim, dst + (r + 1) * dim, 0.0f);
  }
  return {dst, dim};
}
template <class In>
Right pack_rows(const In* src, int64_t ld, int64_t rows, int64_t dim, float* dst, int64_t padded, const float* lse = nullptr) {
  if constexpr (std::is_same_v<In, float>)
    if (rows == padded && !(lse && std::any_of(lse, lse + rows, [](float x) { return x == kMinusInf; }))) return {src, ld};
  return copy_rows(src, ld, rows, dim, dst, padded, lse);
}
Right pack_rows(const BF16* src, int64_t ld, int64_t rows, int64_t dim, BF16* dst, int64_t padded, const float* lse = nullptr) {
  uint32_t* pairs = reinterpret_cast<uint32_t*>(dst);
  for (int64_t r = 0; r < padded; r += 2) {
    const BF16 *one = src + r * ld, *two = one + ld;
    uint32_t* to = pairs + r / 2 * dim;
    const bool first = r < rows && !is_blind(lse, r), second = r + 1 < rows && !is_blind(lse, r + 1);
    if (first && second)
      for (int64_t c = 0; c < dim; c++) to[c] = one[c].bits | uint32_t{two[c].bits} << 16;
    else
      for (int64_t c = 0; c < dim; c++) to[c] = (first ? one[c].bits : 0u) | (second ? uint32_t{two[c].bits} << 16 : 0u);
  }
  return {dst, dim};
}

// The left operand: `padded` rows, in place where that many may be read (`readable`): what is computed of rows beyond is not used.
template <class In, class T>
struct Left {
  const T* data;
  int64_t ld;
  Left(const In* src, int64_t stride, int64_t rows, int64_t dim, T* room, int64_t padded, int64_t readable) {
    if constexpr (std::is_same_v<In, T>) {
      if (padded <= readable) {
        data = src, ld = stride;
        return;
      }
      for (int64_t r = 0; r < rows; r++) std::memcpy(static_cast<void*>(room + r * dim), src + r * stride, dim * sizeof(T));
    } else {
      widen_rows(src, stride, rows, dim, room);
    }
    std::memset(static_cast<void*>(room + rows * dim), 0, (padded - rows) * dim * sizeof(T));
    data = room, ld = dim;
  }
};

// The left operand (dim, padded) from (rows, dim).
void plain_transposed(const float* src, int64_t ld, int64_t rows, int64_t dim, float* dst, int64_t padded, float*) {
  pack_transposed(src, ld, rows, dim, dst, padded, nullptr);
}
void plain_transposed(const BF16* src, int64_t ld, int64_t rows, int64_t dim, BF16* dst, int64_t padded, float* room) {
  uint32_t* pairs = reinterpret_cast<uint32_t*>(room);  // (dim / 2, padded) of two values each, which are then put below each other
  transpose32(reinterpret_cast<const uint32_t*>(src), ld / 2, rows, dim / 2, pairs, padded, padded);
  for (int64_t c = 0; c < dim / 2; c++)
    for (int64_t r = 0; r < padded; r++) {
      dst[2 * c * padded + r].bits = static_cast<uint16_t>(pairs[c * padded + r]);
      dst[(2 * c + 1) * padded + r].bits = static_cast<uint16_t>(pairs[c * padded + r] >> 16);
    }
}
template <class In>
void plain_transposed(const In* src, int64_t ld, int64_t rows, int64_t dim, float* dst, int64_t padded, float* room) {
  pack_transposed(src, ld, rows, dim, dst, padded, room);
}

// ------------------------------------------------------------------ memory and tasks

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

// ------------------------------------------------------------------ forward

template <class In, class T>
struct Forward {
  const Args& a;
  const Products product;
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
      rows = std::max(rows, std::min(kChunk, span.len_q)), keys = std::max(keys, std::min(kKeys, round_up(span.len_k, 16)));
    }
    rows = round_up(rows, kRows);
    for (int pass = 0; pass < 2; pass++) {
      if (pass) s.memory.allocate();
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
    const int64_t kv_head = head / (a.heads / a.kv_heads), last = std::min(first + kChunk, span.len_q);
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
      float most = kMinusInf;
      if (low == 0 && high == padded) {
#pragma omp simd reduction(max : most)
        for (int32_t c = 0; c < static_cast<int32_t>(padded); c++) most = std::max(most, x[c]);
      } else {
#pragma omp simd reduction(max : most)
        for (int32_t c = 0; c < static_cast<int32_t>(padded); c++) most = std::max(most, c >= low && c < high ? x[c] : kMinusInf);
      }
      float &most_so_far = s.most[i + r], &total = s.total[i + r];
      const float before = most_so_far;
      if (most > before) most_so_far = most;
      if (most_so_far == kMinusInf) {  // nothing seen yet, or nothing but NaN, which no maximum shows: weights 0, not exp(-inf + inf)
        for (int32_t c = low; c < high; c++) total += x[c] != x[c] ? x[c] : 0.0f;
        std::fill(x, x + padded, 0.0f);
      } else {
        const float base = most_so_far;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int32_t c = 0; c < static_cast<int32_t>(padded); c++) {
          const float e = exp_of((x[c] - base) * scale);  // the largest is exactly exp(0), however large it is
          x[c] = c >= low && c < high ? e : 0.0f;
          sum += x[c];
        }
        const float fade = before == kMinusInf ? 0.0f : std::exp((before - base) * scale);
        total = total * fade + sum;
        if (rescale && fade != 1.0f) {
          float* sums = s.sums + (i + r) * a.value_dim;
          for (int64_t c = 0; c < a.value_dim; c++) sums[c] *= fade;
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
      for (int64_t c = 0; c < padded; c++) x[c] = cap * tanh_of(x[c] * scale / cap);
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
      const float* sums = s.sums + r * a.value_dim;
      for (int64_t c = 0; c < a.value_dim; c++) out[c] = narrow<In>(sums[c] * factor);
    }
  }
};

// ------------------------------------------------------------------ backward

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
  };

  // One block of queries: where its operands stand.
  struct Block {
    Right queries, grads;
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
      if (pass) s.memory.allocate();
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
    std::vector<Block> blocks = pack_queries(s, span, head);
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
          const Block& block = blocks[i / kRowsBack];
          product(padded, width, a.dim, left_k.ld, rows, width, false, left_k.data, s.queries_t + i * a.dim + left * kColumn<T>, s.scores);
          product(padded, width, a.value_dim, left_v.ld, rows, width, false, left_v.data, s.grads_t + i * a.value_dim + left * kColumn<T>, s.dweights);
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
  std::vector<Block> pack_queries(State& s, const Span& span, int64_t head) const {
    const In* q = static_cast<const In*>(a.q) + span.q0 * a.q_row + head * a.q_head;
    const In* grad = static_cast<const In*>(a.grad) + span.q0 * a.grad_row + head * a.grad_head;
    const In* out = static_cast<const In*>(a.out) + (span.q0 * a.heads + head) * a.value_dim;
    for (int64_t r = 0; r < span.len_q; r++) {
      float sum = 0.0f;
      const In *g = grad + r * a.grad_row, *o = out + r * a.heads * a.value_dim;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < a.value_dim; c++) sum += widen(g[c]) * widen(o[c]);
      s.delta[r] = sum;
      const float lse = a.lse[head * a.rows_q + span.q0 + r];
      s.lse[r] = a.sinks && lse != kMinusInf ? log_add(lse, a.sinks[head]) : lse;
    }
    const int64_t padded_rows = round_up(span.len_q, 16);
    std::fill(s.delta + span.len_q, s.delta + padded_rows, 0.0f);
    std::fill(s.lse + span.len_q, s.lse + padded_rows, kPlusInf);
    std::vector<Block> blocks;
    for (int64_t i = 0; i < span.len_q; i += kRowsBack) {
      const int64_t rows = std::min(kRowsBack, span.len_q - i), width = round_up(rows, 16);
      pack_transposed(q + i * a.q_row, a.q_row, rows, a.dim, s.queries_t + i * a.dim, width, s.room);
      pack_transposed(grad + i * a.grad_row, a.grad_row, rows, a.value_dim, s.grads_t + i * a.value_dim, width, s.room);
      const float* lse_of_rows = s.lse + i;
      blocks.push_back({pack_rows(q + i * a.q_row, a.q_row, rows, a.dim, s.queries + i * a.dim, width, lse_of_rows),
                        pack_rows(grad + i * a.grad_row, a.grad_row, rows, a.value_dim, s.grads + i * a.value_dim, width, lse_of_rows)});
    }
    return blocks;
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
            const float e = exp_of(std::min(x[c] * scale - lse[c], 0.0f)), d = e * (dx[c] - delta[c]) * scale;
            x[c] = c >= low && c < high ? e : 0.0f;
            dx[c] = c >= low && c < high ? d : 0.0f;
          }
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
      float score = x[c] * scale, steep = scale;
      if constexpr (Capped) {
        const float t = tanh_of(score / cap);
        score = cap * t, steep = scale * (1.0f - t * t);
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
      In *to_k = static_cast<In*>(a.dk) + row * a.dim, *to_v = static_cast<In*>(a.dv) + row * a.value_dim;
      for (int64_t c = 0; c < a.dim; c++) to_k[c] = narrow<In>(dk[r * a.dim + c]);
      for (int64_t c = 0; c < a.value_dim; c++) to_v[c] = narrow<In>(dv[r * a.value_dim + c]);
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
          In* to = static_cast<In*>(a.dq) + ((span.q0 + i + r0 + r) * a.heads + head) * a.dim;
          for (int64_t c = 0; c < a.dim; c++) to[c] = narrow<In>(turned[r * a.dim + c]);
        }
      }
    }
  }
};

// ------------------------------------------------------------------ entry

// Rows that belong to no sequence (a layout of fixed capacity has them) are 0.
template <class In>
void clear_slack(void* data, int64_t from, int64_t to, int64_t width) {
  if (data && to > from) std::memset(static_cast<In*>(data) + from * width, 0, (to - from) * width * sizeof(In));
}

template <class In, class T>
void forward_as(const Args& a, const Gemm& gemm, const Products& products) {
  const int64_t end = a.cu_q[a.num_seqs];
  clear_slack<In>(a.out, end, a.rows_q, a.heads * a.value_dim);
  for (int64_t h = 0; h < a.heads; h++) std::fill(a.lse + h * a.rows_q + end, a.lse + (h + 1) * a.rows_q, kMinusInf);
  run_tasks(tasks_of(a, a.heads, kChunk, false), gemm, std::is_same_v<T, BF16>, Forward<In, T>{a, products});
}

template <class In, class T>
void backward_as(const Args& a, const Gemm& gemm, const Products& products) {
  clear_slack<In>(a.dq, a.cu_q[a.num_seqs], a.rows_q, a.heads * a.dim);
  clear_slack<In>(a.dk, a.cu_k[a.num_seqs], a.rows_k, a.kv_heads * a.dim);
  clear_slack<In>(a.dv, a.cu_k[a.num_seqs], a.rows_k, a.kv_heads * a.value_dim);
  run_tasks(tasks_of(a, a.kv_heads, kUnlimited, true), gemm, std::is_same_v<T, BF16>, Backward<In, T>{a, products});
}


bool in_bf16(const Args& a, const Gemm& gemm) { return gemm.bf16 && !a.portable; }

Products products_of(const Args& a, const Gemm& given) { return {given.f32 && !a.portable ? given.f32 : gemm, given.bf16}; }

void forward(const Args& a, const Gemm& gemm) {
  const Products products = products_of(a, gemm);
  if (a.dtype == kFloat32) forward_as<float, float>(a, gemm, products);
  else if (a.dtype == kFloat16) forward_as<F16, float>(a, gemm, products);
  else if (in_bf16(a, gemm)) forward_as<BF16, BF16>(a, gemm, products);
  else forward_as<BF16, float>(a, gemm, products);
}

void backward(const Args& a, const Gemm& gemm) {
  const Products products = products_of(a, gemm);
  if (a.dtype == kFloat32) backward_as<float, float>(a, gemm, products);
  else if (a.dtype == kFloat16) backward_as<F16, float>(a, gemm, products);
  else if (in_bf16(a, gemm)) backward_as<BF16, BF16>(a, gemm, products);
  else backward_as<BF16, float>(a, gemm, products);
}

}  // namespace

extern const Level level;
const Level level{forward, backward};

}  // namespace varlen::VARLEN_LEVEL
