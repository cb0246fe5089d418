// Products of so few rows with weights in four bits that memory decides how long they take: inputs
// become integers of 16 bits, which are multiplied in pairs with levels as they are.

#pragma once

#include <memory>

#include "levels.h"

namespace {

// The step of a group's integers is decided by its largest number: their sum with levels is below
// 2^24, which a float holds.
constexpr float kMostInput = 32767.0f;
constexpr float kLeastInput = 1e-30f;  // smaller ones become zero

// Where the inputs of all rows are.
struct Pairs {
  Pair* pairs;  // [width / 2, rows]
  float* sums;  // of inputs, [groups, rows]
  float* steps;  // of integers, [groups, rows]
};

inline Sums plus_levels(Sums sums, __m512i levels, __m512i pairs) {
  return (Sums)_mm512_dpwssd_epi32((__m512i)sums, levels, pairs);
}

// Write a group of inputs as integers, and their step and the sum of step * integer: that of inputs
// themselves would let errors count by levels, which are larger than weights around zero.
inline void to_integers(const Bfloat16* inputs, Bfloat16* out, float* sum, float* step) {
  const __m512 one = expanded(inputs), two = expanded(inputs + kLanes);
  const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(one), _mm512_abs_ps(two)));
  const __m512 factor = _mm512_set1_ps(most > kLeastInput ? kMostInput / most : 0.0f);
  const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(one, factor));
  const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(two, factor));
  store(_mm512_cvtepi32_epi16(first), out);
  store(_mm512_cvtepi32_epi16(second), out + kLanes);
  *step = most / kMostInput;
  const __m512 integers = _mm512_cvtepi32_ps(_mm512_add_epi32(first, second));
  // Zero, or no number where an input is none.
  const __m512 nothing = _mm512_mul_ps(_mm512_add_ps(one, two), _mm512_setzero_ps());
  *sum = _mm512_reduce_add_ps(_mm512_fmadd_ps(integers, _mm512_set1_ps(*step), nothing));
}

// Write a group of rows [rows, width] as pairs of integers side by side, and its sums and steps.
void write_pairs(const Bfloat16* inputs, Index rows, Index width, Index group, const Pairs& to) {
  alignas(64) Bfloat16 integers[kExactRows][kGroup];
  const Bfloat16* places[kLanes];
  for (Index i = 0; i < kLanes; ++i) places[i] = integers[std::min(i, rows - 1)];
  for (Index row = 0; row < rows; ++row)
    to_integers(inputs + row * width + group * kGroup, integers[row], to.sums + group * rows + row,
                to.steps + group * rows + row);
  const auto mask = static_cast<__mmask16>((1 << rows) - 1);
  transpose(places, to.pairs + group * kGroup / 2 * rows, rows, mask);
}

// The levels of the vectors from kFirst to kEnd of two inputs, in pairs; their outputs are in an
// order of their own.
template <int kFirst, int kEnd>
inline void take_levels(const std::uint8_t* place, __m512i* levels) {
  const __m512i nibble = _mm512_set1_epi16(0x000f);
  const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place));
  const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place) + 1);
  const __m512i bytes[] = {_mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(one, two)),
                           _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(one, two))};
  each<kEnd - kFirst>([&](auto i) {
    levels[i] = kFirst + i < 2 ? _mm512_and_si512(bytes[i % 2], nibble)
                               : _mm512_srli_epi16(bytes[i % 2], 4);
  });
}

// The total of a row with a group's sums, whose `sum` and `step` of inputs are given.
inline __m512 plus_group(__m512 total, Sums sums, const Scales& scales, float sum, float step) {
  const __m512 product = _mm512_mul_ps(floats(sums), _mm512_set1_ps(step));
  total = _mm512_fmadd_ps(scales.scale, product, total);
  return _mm512_fmadd_ps(scales.shift, _mm512_set1_ps(sum), total);
}

// The product of kCount rows with the outputs of the vectors from kFirst to kEnd, an even number.
template <int kCount, int kFirst, int kEnd>
void pair_block(const Pairs& inputs, const Columns& columns, Bfloat16* out) {
  constexpr int kVectors = kEnd - kFirst;
  const Index groups = columns.width / kGroup, outputs = columns.outputs;
  alignas(64) float totals[kCount][kVectors][kLanes] = {};
  for (Index group = 0; group < groups; ++group) {
    Sums parts[kCount][kVectors];
    each<kCount>([&](auto row) {
      each<kVectors>([&](auto i) { parts[row][i] = no_sums(); });
    });
#pragma GCC unroll 4
    for (Index k = group * kGroup / 2; k < (group + 1) * kGroup / 2; ++k) {
      const std::uint8_t* place = columns.packed + k * kColumns;
      _mm_prefetch(place + kAhead, _MM_HINT_T0);
      __m512i levels[kVectors];
      take_levels<kFirst, kEnd>(place, levels);
      each<kCount>([&](auto row) {
        const __m512i pair = repeated(inputs.pairs[k * kCount + row]);
        each<kVectors>([&](auto i) {
          parts[row][i] = plus_levels(parts[row][i], levels[i], pair);
        });
      });
    }
    const Bfloat16* pairs = columns.scales + group * outputs * 2;
    each<kVectors>([&](auto i) {
      const Scales scales = take_scales(pairs, kFirst + i);
      each<kCount>([&](auto row) {
        const Index at = group * kCount + row;
        _mm512_store_ps(totals[row][i],
                        plus_group(_mm512_load_ps(totals[row][i]), parts[row][i], scales,
                                   inputs.sums[at], inputs.steps[at]));
      });
    });
  }
  for (int row = 0; row < kCount; ++row)
    for (int i = 0; i < kVectors; i += 2)
      write_outputs(totals[row][i], out + row * outputs + (kFirst + i) * kLanes);
}

using PairBlock = void (*)(const Pairs&, const Columns&, Bfloat16*);
template <int kFirst, int kEnd>
constexpr PairBlock kPairBlocks[kExactRows] = {
    pair_block<1, kFirst, kEnd>, pair_block<2, kFirst, kEnd>, pair_block<3, kFirst, kEnd>};

void few_rows_product(const Bfloat16* inputs, const std::uint8_t* packed, const Bfloat16* scales,
                      Bfloat16* out, Index rows, Index outputs, Index width) {
  const Index groups = width / kGroup;
  const std::unique_ptr<Pair[]> pairs(new Pair[rows * width / 2]);
  const std::unique_ptr<float[]> sums(new float[rows * groups * 2]);
  const Pairs all{pairs.get(), sums.get(), sums.get() + rows * groups};
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (Index group = 0; group < groups; ++group) write_pairs(inputs, rows, width, group, all);
    each_column(outputs, [&](Index column, auto vectors) {
      const Columns columns{packed + column * width / 2, scales + column * 2, width, outputs};
      kPairBlocks<vectors.first, vectors.end>[rows - 1](all, columns, out + column);
    });
  }
}

}  // namespace
