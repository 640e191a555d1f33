// Matrix products, and their operands from rows of tensors.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "numbers.h"

namespace varlen::VARLEN_LEVEL {
namespace {

// ------------------------------------------------------------------ products, where libtorch has none for this CPU

#if defined(__AVX512F__)
typedef float Vec __attribute__((vector_size(64), aligned(4)));
#elif defined(__AVX2__)
typedef float Vec __attribute__((vector_size(32), aligned(4)));
#else
typedef float Vec __attribute__((vector_size(16), aligned(4)));
#endif
constexpr int64_t kWidth = sizeof(Vec) / sizeof(float);

// One number of `count`, a multiple of 16, that are taken sixteen at a time, beside each other: compilers take them one by one.
template <class Two>
float fold(const float* x, int64_t count, float start, const Two& two) {
  constexpr int64_t kVecs = 16 / kWidth;
  typedef float Quad __attribute__((vector_size(16)));
  Vec vecs[kVecs];
  for (int64_t v = 0; v < kVecs; v++) vecs[v] = Vec{} + start;
  for (int64_t c = 0; c < count; c += 16)
    for (int64_t v = 0; v < kVecs; v++) vecs[v] = two(*reinterpret_cast<const Vec*>(x + c + v * kWidth), vecs[v]);
  Quad quads[4];
  std::memcpy(quads, vecs, sizeof(quads));
  const Quad last = two(two(quads[0], quads[1]), two(quads[2], quads[3]));
  return two(two(last[0], last[1]), two(last[2], last[3]));
}
inline float sum_of(const float* x, int64_t count) {
  return fold(x, count, 0.0f, [](auto one, auto other) { return one + other; });
}
// But for NaN.
inline float most_of(const float* x, int64_t count) {
  return fold(x, count, kMinusInf, [](auto one, auto other) { return one > other ? one : other; });
}

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

void gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a, const float* b, float* c, bool) {
  int64_t i = 0;
  for (; i + 6 <= m; i += 6) gemm_rows<6>(n, k, lda, ldb, ldc, add, a + i * lda, b, c + i * ldc);
  for (; i < m; i++) gemm_rows<1>(n, k, lda, ldb, ldc, add, a + i * lda, b, c + i * ldc);
}

// The product by the type of its operands.
struct Products {
  Gemm<float> f32;
  Gemm<uint16_t> bf16;
  void operator()(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a, const float* b, float* c) const {
    f32(m, n, k, lda, ldb, ldc, add, a, b, c, false);
  }
  void operator()(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const BF16* a, const BF16* b, float* c) const {
    bf16(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const uint16_t*>(a), reinterpret_cast<const uint16_t*>(b), c, true);
  }
};

// ------------------------------------------------------------------ packing

// Right operands that are packed transposed are addressed by column, and in bfloat16 a column of a pair of rows is two numbers.
template <class T>
constexpr int64_t kColumn = sizeof(T) == 2 ? 2 : 1;

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
  int64_t done = 0;  // columns
#if defined(__AVX2__)
  for (; done + 8 <= cols; done += 8)
    for (int64_t r0 = 0; r0 < padded; r0 += 8) {
      __m256 x[8], y[8];
      for (int64_t r = 0; r < 8; r++)
        x[r] = r0 + r < rows ? _mm256_loadu_ps(reinterpret_cast<const float*>(src + (r0 + r) * ld + done)) : _mm256_setzero_ps();
      for (int i = 0; i < 8; i += 2) y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]), y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
      for (int i = 0; i < 8; i += 4)
        for (int h = 0; h < 2; h++) {
          x[i + 2 * h] = _mm256_shuffle_ps(y[i + h], y[i + 2 + h], 0x44);
          x[i + 2 * h + 1] = _mm256_shuffle_ps(y[i + h], y[i + 2 + h], 0xee);
        }
      float* to = reinterpret_cast<float*>(dst + done * ldd + r0);
      for (int h = 0; h < 4; h++) {
        _mm256_storeu_ps(to + h * ldd, _mm256_permute2f128_ps(x[h], x[4 + h], 0x20));
        _mm256_storeu_ps(to + (4 + h) * ldd, _mm256_permute2f128_ps(x[h], x[4 + h], 0x31));
      }
    }
#endif
  for (int64_t r0 = 0; r0 < padded; r0 += 16)
    for (int64_t c = done; c < cols; c++)
      for (int64_t r = r0; r < r0 + 16; r++) dst[c * ldd + r] = r < rows ? src[r * ld + c] : 0;
#endif
}

template <class In>
void narrow_row(const float* __restrict from, int64_t count, In* __restrict to, float factor = 1.0f) {
  for (int64_t c = 0; c < count; c++) to[c] = narrow<In>(from[c] * factor);
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

// Whether many rows, so many bytes apart, would share few places of a cache: those that a multiple of 4096 bytes lies between share one.
// Products read rows often, so a copy pays. It has the same numbers, and so has the result.
inline bool is_crowded(int64_t rows, int64_t bytes) { return rows * (bytes & -bytes) > 32 * 4096; }

// The right operand (padded, dim) from (rows, dim), and its row stride; rows beyond are 0. Whole blocks of float32 are used in place.
// `lse`, if there is one, tells rows that see no key: they are 0 too, because their weights are, and 0 times what is there may be NaN.
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
  if constexpr (std::is_same_v<In, float>) {
    const bool whole = rows == padded && !(lse && std::any_of(lse, lse + rows, [](float x) { return x == kMinusInf; }));
    if (whole && !is_crowded(rows, ld * 4)) return {src, ld};
  }
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
      if (padded <= readable && !is_crowded(rows, stride * static_cast<int64_t>(sizeof(T)))) {
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

}  // namespace
}  // namespace varlen::VARLEN_LEVEL
