// Numbers in bfloat16, one by one and by sixteens, and powers of two.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace {

using Bfloat16 = std::uint16_t;
using Index = std::int64_t;

constexpr Index kAhead = 4608;  // bytes that are asked for before they are needed
constexpr Index kAnyRows = Index{1} << 40;
constexpr Index kLanes = 16;

inline float expanded(Bfloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline Bfloat16 rounded(float number) {  // to nearest, ties to even
  std::uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  if (number != number) return 0x7fc0;
  return static_cast<Bfloat16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// 2^f for |f| <= 0.5, from f^6 on, with a relative error below 2e-7: Cephes' polynomial.
constexpr float kPower[] = {1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f,
                            5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f,
                            1.0f};
constexpr int kPowers = sizeof kPower / sizeof kPower[0];
constexpr float kLeast = -126.0f;  // below, 2^x is no normal number

// 2^x, for x <= 0.
inline float power_of_two(float x) {
  x = std::max(x, kLeast);
  const float whole = static_cast<float>(static_cast<std::int32_t>(x - 0.5f));
  const float f = x - whole;
  float p = kPower[0];
#pragma GCC unroll 8
  for (int i = 1; i < kPowers; ++i) p = p * f + kPower[i];
  const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<std::int32_t>(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// 2^x for x <= 0, as above.
inline __m512 powers_of_two(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(kLeast));
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(kPower[0]);
  for (int i = 1; i < kPowers; ++i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kPower[i]));
  return _mm512_scalef_ps(p, whole);
}

// Of 16 numbers.
inline __m512 expanded(const Bfloat16* place) {
  const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

inline __m256i rounded(__m512 numbers) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(numbers);
#else
  const __m512i bits = _mm512_castps_si512(numbers), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i sum =
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_none = _mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q);
  const __m512i upper =
      _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), is_none, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(upper);
#endif
}

inline void store(__m256i numbers, Bfloat16* place) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), numbers);
}

// For vectors that begin where a cache line does: loads and stores of 64 bytes would cross lines.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <class Other>
  LineAllocator(const LineAllocator<Other>&) {}

  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), kLine));
  }
  void deallocate(T* place, std::size_t) { ::operator delete(place, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};

template <class T>
using Lines = std::vector<T, LineAllocator<T>>;

template <class Do, int... kNumbers>
[[gnu::always_inline]] inline void each_of(Do& one, std::integer_sequence<int, kNumbers...>) {
  (one(std::integral_constant<int, kNumbers>{}), ...);
}

// Do it for 0 to kCount - 1, constants: where arrays of vectors are indexed by them alone, each
// vector has a register. Loops that the compiler unrolls leave them in memory.
template <int kCount, class Do>
[[gnu::always_inline]] inline void each(Do one) {
  each_of(one, std::make_integer_sequence<int, kCount>{});
}

void expand(const Bfloat16* from, Index stride, Index rows, Index width, float* to) {
  for (Index row = 0; row < rows; ++row) {
#pragma omp simd
    for (Index i = 0; i < width; ++i) to[row * width + i] = expanded(from[row * stride + i]);
  }
}

}  // namespace
