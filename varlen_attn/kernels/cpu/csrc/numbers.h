// Numbers of three dtypes, exp and tanh, and what dropout draws: plain loops over them become vector code.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>

#include "attention.h"

namespace varlen::VARLEN_LEVEL {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr float kPlusInf = std::numeric_limits<float>::infinity();

inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return std::max(low, std::min(x, high)); }
constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

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

// exp of numbers up to 0, to about one unit in the last place: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients).
inline float exp_of_negative(float x) {
  constexpr float shift = 12582912.0f + 127.0f;  // adding 1.5 * 2^23 rounds to an integer, and leaves it in the low bits; 127 is the exponent of 1
  x = x < -87.3f ? -87.3f : x;
  float n = x * 1.44269504f + shift;
  const uint32_t power = std::bit_cast<uint32_t>(n);
  n -= shift;
  float r = x - n * 0.693359375f;
  r += n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * std::bit_cast<float>(power << 23);
}

inline float exp_of(float x) { return exp_of_negative(x > 88.0f ? 88.0f : x); }

// tanh and its derivative, to 2 and 3 units in the last place for every float: a polynomial up to |x| = 0.625 (Cephes' coefficients),
// and 1 - 2 / (e^2|x| + 1) beyond, where nothing cancels. 1 - tanh^2 would leave few bits of the derivative where tanh is close to 1.
struct Tanh {
  float value, slope;
};

inline Tanh tanh_of(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits & 0x80000000u;
  const float rest = 2.0f / (exp_of(2.0f * std::bit_cast<float>(bits ^ sign)) + 1.0f);
  const float far = std::bit_cast<float>(std::bit_cast<uint32_t>(1.0f - rest) | sign);
  const float s = x * x;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float near = x + x * (s * p);
  const bool small = s < 0.390625f;
  return {small ? near : far, small ? 1.0f - near * near : rest * (2.0f - rest)};
}

// A product that is rounded by itself: the sign comes last, so that no compiler contracts the product with the sum that follows it.
inline float rounded_product(float x, float factor) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits & 0x80000000u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(std::bit_cast<float>(bits ^ sign) * factor) ^ sign);
}

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

}  // namespace
}  // namespace varlen::VARLEN_LEVEL
