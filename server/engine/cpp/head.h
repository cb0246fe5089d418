// The product of a head whose weights are in eight bits.

#pragma once

#include "numbers.h"

namespace {

constexpr Index kOutputs = 4;  // computed side by side, so that sums do not wait for each other

#ifdef __AVX512VNNI__

constexpr Index kBytes = 64;  // levels that are multiplied at one time
constexpr Index kMostTogether = 4;  // rows that share one pass over the levels
#ifdef AMX
constexpr Index kEightBitRows = 16;  // for more, torch's products of bfloat16 tiles are faster
#else
constexpr Index kEightBitRows = kAnyRows;
#endif

// Rows of bfloat16 numbers as integers of 16 bits, of one step a row: 6 times as exact, for numbers
// that are not much smaller than their row's largest. An integer is 256 * high + low, both of 8
// bits, for products of 8 bits, whose other factor has no sign: 128 is added to levels and taken
// back with the sums of high and low.
struct Integers {
  Index padded;  // width
  std::vector<std::int8_t> high, low;  // [rows, padded]
  std::vector<float> steps;            // [rows]
  std::vector<std::int32_t> shifts;    // [rows, 2]: 128 times the sums of high and low

  Integers(const Bfloat16* numbers, Index rows, Index width)
      : padded((width + kBytes - 1) / kBytes * kBytes), high(rows * padded), low(rows * padded),
        steps(rows), shifts(rows * 2) {
    for (Index row = 0; row < rows; ++row) fill(numbers + row * width, row, width);
  }

 private:
  void fill(const Bfloat16* numbers, Index row, Index width) {
    float most = 0;
#pragma omp simd reduction(max : most)
    for (Index i = 0; i < width; ++i) most = std::max(most, std::abs(expanded(numbers[i])));
    steps[row] = most / 32512;  // 127 * 256
    const float factor = most > 0 ? 1 / steps[row] : 0;
    std::int32_t highs = 0, lows = 0;
#pragma omp simd reduction(+ : highs, lows)
    for (Index i = 0; i < width; ++i) {
      const auto whole = static_cast<std::int32_t>(std::nearbyint(expanded(numbers[i]) * factor));
      const auto lower = static_cast<std::int8_t>(whole);
      const auto upper = static_cast<std::int8_t>((whole - lower) >> 8);
      low[row * padded + i] = lower;
      high[row * padded + i] = upper;
      lows += lower;
      highs += upper;
    }
    shifts[row * 2] = 128 * highs;
    shifts[row * 2 + 1] = 128 * lows;
  }
};

// The sums of 16 vectors, in order.
inline __m512i sums_of(const __m512i* vectors) {
  __m512i sums[kLanes];
  for (int i = 0; i < 8; ++i) {
    const __m512i a = vectors[2 * i], b = vectors[2 * i + 1];
    sums[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = sums[2 * i], b = sums[2 * i + 1];
    sums[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  for (int count = 2; count; count /= 2)
    for (int i = 0; i < count; ++i) {
      const __m512i a = sums[2 * i], b = sums[2 * i + 1];
      sums[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88),
                                 _mm512_shuffle_i32x4(a, b, 0xDD));
    }
  return sums[0];
}

// The products [kOut, kCount], in the first lanes, given their sums of high integers in the first
// eight lanes and of low ones in the others.
template <int kCount, int kOut>
inline __m512 products_of(const Integers& inputs, Index row, __m512i sums,
                          const Bfloat16* scales) {
  alignas(32) std::int32_t row_of[8], output_of[8];
  for (int i = 0; i < 8; ++i) row_of[i] = i % kCount, output_of[i] = i / kCount % kOut;
  const __m256i rows = _mm256_load_si256(reinterpret_cast<const __m256i*>(row_of));
  const __m256i its = _mm256_load_si256(reinterpret_cast<const __m256i*>(output_of));
  const __m256i highs = _mm256_slli_epi32(rows, 1);
  const __m256i lows = _mm256_add_epi32(highs, _mm256_set1_epi32(1));
  const __m256i shifts =
      _mm256_maskz_loadu_epi32((1 << 2 * kCount) - 1, &inputs.shifts[row * 2]);
  const __m256 steps = _mm256_maskz_loadu_ps((1 << kCount) - 1, &inputs.steps[row]);
  const __m128i bits = _mm_maskz_loadu_epi16((1 << kOut) - 1, scales);
  const __m256 all = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  const auto less = [=](__m256i its_sums, __m256i place) {
    return _mm256_cvtepi32_ps(
        _mm256_sub_epi32(its_sums, _mm256_permutexvar_epi32(place, shifts)));
  };
  const __m256 above = less(_mm512_castsi512_si256(sums), highs);
  const __m256 below = less(_mm512_extracti64x4_epi64(sums, 1), lows);
  const __m256 total = _mm256_fmadd_ps(_mm256_set1_ps(256), above, below);
  const __m256 stepped = _mm256_mul_ps(total, _mm256_permutexvar_ps(rows, steps));
  return _mm512_castps256_ps512(_mm256_mul_ps(stepped, _mm256_permutexvar_ps(its, all)));
}

// The products of kCount rows, from `row` on, with kOut outputs.
template <int kCount, int kOut>
void eight_bit_block(const Integers& inputs, Index row, Index width, const std::int8_t* levels,
                     const Bfloat16* scales, Index outputs, Bfloat16* out) {
  static_assert(kCount * kOut <= 8);
  const __m512i sign = _mm512_set1_epi8(-128);
  const std::int8_t* high = &inputs.high[row * inputs.padded];
  const std::int8_t* low = &inputs.low[row * inputs.padded];
  __m512i highs[kCount][kOut], lows[kCount][kOut];
  for (int r = 0; r < kCount; ++r)
    for (int o = 0; o < kOut; ++o) highs[r][o] = lows[r][o] = _mm512_setzero_si512();
  for (Index i = 0; i < width; i += kBytes) {
    const __mmask64 mask = width - i < kBytes ? (__mmask64{1} << (width - i)) - 1 : ~__mmask64{0};
    __m512i factors[kOut];
#pragma GCC unroll 4
    for (int o = 0; o < kOut; ++o) {
      const std::int8_t* place = levels + o * width + i;
      _mm_prefetch(place + kAhead, _MM_HINT_T1);
      factors[o] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, place), sign);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const __m512i first = _mm512_loadu_si512(high + r * inputs.padded + i);
      const __m512i second = _mm512_loadu_si512(low + r * inputs.padded + i);
#pragma GCC unroll 4
      for (int o = 0; o < kOut; ++o) {
        highs[r][o] = _mm512_dpbusd_epi32(highs[r][o], factors[o], first);
        lows[r][o] = _mm512_dpbusd_epi32(lows[r][o], factors[o], second);
      }
    }
  }
  __m512i sums[2][8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const bool is = i < kCount * kOut;
    sums[0][i] = is ? highs[i % kCount][i / kCount % kOut] : _mm512_setzero_si512();
    sums[1][i] = is ? lows[i % kCount][i / kCount % kOut] : _mm512_setzero_si512();
  }
  Bfloat16 products[kLanes];
  store(rounded(products_of<kCount, kOut>(inputs, row, sums_of(sums[0]), scales)), products);
  for (int r = 0; r < kCount; ++r)
    for (int o = 0; o < kOut; ++o) out[(row + r) * outputs + o] = products[o * kCount + r];
}

void eight_bit_outputs(const Integers& inputs, Index rows, Index width, const std::int8_t* levels,
                       const Bfloat16* scales, Index outputs, Bfloat16* out) {
  Index blocks = (rows + kMostTogether - 1) / kMostTogether;
  for (Index row = 0, count; row < rows; row += count, --blocks) {
    count = (rows - row + blocks - 1) / blocks;
    const auto call = [&](auto block, int each) {
      for (Index o = 0; o < kOutputs; o += each)
        block(inputs, row, width, levels + o * width, scales + o, outputs, out + o);
    };
    if (count == 1) call(eight_bit_block<1, 4>, 4);
    if (count == 2) call(eight_bit_block<2, 4>, 4);
    if (count == 3) call(eight_bit_block<3, 2>, 2);
    if (count == 4) call(eight_bit_block<4, 2>, 2);
  }
}

#else

constexpr Index kEightBitRows = 4;

// Rows of numbers [rows, width].
struct Floats {
  std::vector<float> numbers;

  Floats(const Bfloat16* from, Index rows, Index width) : numbers(rows * width) {
    expand(from, width, rows, width, numbers.data());
  }
};
using Integers = Floats;

void eight_bit_outputs(const Floats& inputs, Index rows, Index width, const std::int8_t* levels,
                       const Bfloat16* scales, Index outputs, Bfloat16* out) {
  for (Index row = 0; row < rows; ++row) {
    const float* input = &inputs.numbers[row * width];
    __m512 sums[kOutputs];
    for (Index o = 0; o < kOutputs; ++o) sums[o] = _mm512_setzero_ps();
    for (Index i = 0; i < width; i += kLanes) {
      const __m512 x = _mm512_loadu_ps(input + i);
      for (Index o = 0; o < kOutputs; ++o) {
        const std::int8_t* place = levels + o * width + i;
        _mm_prefetch(place + kAhead, _MM_HINT_T0);
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(place));
        sums[o] = _mm512_fmadd_ps(x, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), sums[o]);
      }
    }
    for (Index o = 0; o < kOutputs; ++o)
      out[row * outputs + o] = rounded(_mm512_reduce_add_ps(sums[o]) * expanded(scales[o]));
  }
}

#endif

}  // namespace

// The rows up to which it is faster than torch's functions.
extern "C" const Index eight_bit_rows = kEightBitRows;

// out [rows, outputs] = inputs [rows, width] * levels [outputs, width]^T * scales [outputs], where
// outputs come in multiples of kOutputs and width, below 2^16, in multiples of kLanes.
extern "C" void eight_bit_product(const Bfloat16* inputs, const std::int8_t* levels,
                                  const Bfloat16* scales, Bfloat16* out, Index rows, Index outputs,
                                  Index width) {
  const Integers numbers(inputs, rows, width);
#pragma omp parallel for schedule(static)
  for (Index output = 0; output < outputs; output += kOutputs)
    eight_bit_outputs(numbers, rows, width, levels + output * width, scales + output, outputs,
                      out + output);
}
