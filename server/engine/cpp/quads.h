// Rows as groups of integers of 8 bits, which instructions multiply by fours.
//
// A group of inputs is middle + step * integer, where the middle is that of its least and its
// largest number: outliers, which are of one sign in most groups, cost half of what they would
// around zero.

#pragma once

#include "levels.h"

namespace {

constexpr int kQuads = kGroup / 4;  // fours of inputs in a group
constexpr float kMostInteger = 127.0f;
constexpr float kLeastStep = 1e-30f;  // with a smaller one, all of a group are its middle

using Quad = std::uint32_t;  // four integers of 8 bits

// Where the rows of a pass are.
struct Quads {
  Quad* quads;  // [groups, kQuads, rows]
  float* steps;  // [groups, 3, rows]: step, middle, and the sum of middle + step * integer
};

// What lanes of vectors hold: a group of up to 16 rows, or two groups of up to 8.
struct Lanes {
  __mmask16 mask;
  Quad* quads;
  float* steps;
};

// Write groups of rows, which the lanes of `numbers` hold.
template <int kGroups>
inline void write_groups(const __m512* numbers, Index rows, const Lanes* lanes) {
  __m512 least = numbers[0], most = numbers[0], nothing[4] = {};
  for (int i = 0; i < kGroup; i += 4)
    each<4>([&](auto j) {
      least = _mm512_min_ps(least, numbers[i + j]);
      most = _mm512_max_ps(most, numbers[i + j]);
      // Zero, or, once, no number.
      nothing[j] = _mm512_fmadd_ps(numbers[i + j], _mm512_setzero_ps(), nothing[j]);
    });
  const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.0f);
  const __m512 middle = _mm512_mul_ps(_mm512_add_ps(least, most), half);
  const __m512 step =
      _mm512_mul_ps(_mm512_sub_ps(most, least), _mm512_set1_ps(0.5f / kMostInteger));
  const __mmask16 differ = _mm512_cmp_ps_mask(step, _mm512_set1_ps(kLeastStep), _CMP_GE_OQ);
  const __m512 factor = _mm512_maskz_div_ps(differ, one, step);
  const __m512i byte = _mm512_set1_epi32(0xff);
  __m512i sum = _mm512_setzero_si512();
  for (int quad = 0; quad < kQuads; ++quad) {
    __m512i integers[4];
    each<4>([&](auto i) {
      const __m512 distance = _mm512_sub_ps(numbers[quad * 4 + i], middle);
      integers[i] = _mm512_cvtps_epi32(_mm512_mul_ps(distance, factor));
      sum = _mm512_add_epi32(sum, integers[i]);
      if (i < 3) integers[i] = _mm512_and_si512(integers[i], byte);
      integers[i] = _mm512_slli_epi32(integers[i], 8 * i);
    });
    const __m512i low = _mm512_or_si512(integers[0], integers[1]);
    const __m512i high = _mm512_or_si512(integers[2], integers[3]);
    each<kGroups>([&](auto i) {
      _mm512_mask_storeu_epi32(lanes[i].quads + quad * rows, lanes[i].mask,
                               _mm512_or_si512(low, high));
    });
  }
  const __m512 nothings =
      _mm512_add_ps(_mm512_add_ps(nothing[0], nothing[1]), _mm512_add_ps(nothing[2], nothing[3]));
  const __m512 middles = _mm512_fmadd_ps(middle, _mm512_set1_ps(kGroup), nothings);
  const __m512 sums = _mm512_fmadd_ps(step, _mm512_cvtepi32_ps(sum), middles);
  each<kGroups>([&](auto i) {
    _mm512_mask_storeu_ps(lanes[i].steps, lanes[i].mask, step);
    _mm512_mask_storeu_ps(lanes[i].steps + rows, lanes[i].mask, middle);
    _mm512_mask_storeu_ps(lanes[i].steps + 2 * rows, lanes[i].mask, sums);
  });
}

// Write kGroups groups of rows [rows, width] from a group on, kLanes / kGroups rows at most.
template <int kGroups>
inline void write_quads(const Bfloat16* inputs, Index rows, Index width, Index group,
                        const Quads& to) {
  constexpr int kApart = kLanes / kGroups;
  const Bfloat16* places[kLanes];
  for (Index i = 0; i < kLanes; ++i)
    places[i] = inputs + std::min(i % kApart, rows - 1) * width + (group + i / kApart) * kGroup;
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  __m512 numbers[kGroup];
  transpose(places, [&](int column, __m512i pairs) {
    numbers[2 * column] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    numbers[2 * column + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
  });
  Lanes lanes[kGroups];
  for (int i = 0; i < kGroups; ++i)
    lanes[i] = {static_cast<__mmask16>(((1 << rows) - 1) << (i * kApart)),
                to.quads + (group + i) * kQuads * rows - i * kApart,
                to.steps + (group + i) * 3 * rows - i * kApart};
  write_groups<kGroups>(numbers, rows, lanes);
}

// Write the groups from `begin` to `end` of up to 16 rows.
void write_quads(const Bfloat16* inputs, Index rows, Index width, Index begin, Index end,
                 const Quads& to) {
  for (; rows <= kLanes / 2 && begin + 1 < end; begin += 2)
    write_quads<2>(inputs, rows, width, begin, to);
  for (; begin < end; ++begin) write_quads<1>(inputs, rows, width, begin, to);
}

}  // namespace
