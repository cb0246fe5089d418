// Weights in four bits, as torch packs them: a level q and its group's scale and zero are the
// weight (q - 8) * scale + zero, which is q * scale + shift.

#pragma once

#include <omp.h>

#include "pairs.h"

namespace {

constexpr Index kGroup = 32;    // inputs that share a scale and a zero
constexpr Index kExactRows = 3;  // rows up to which inputs have 16 bits: memory is the bound
constexpr Index kColumns = 64;  // outputs that torch packs together, in four vectors

// Not __m512i, whose conversions to what instructions take keep GCC 12 from adding in place.
using Sums = std::int32_t __attribute__((vector_size(64)));

inline Sums no_sums() { return Sums{}; }

inline __m512 floats(Sums sums) { return _mm512_cvtepi32_ps((__m512i)sums); }

// The first or second halves of two vectors. Pairing the bytes of two inputs within 128 bits leaves
// outputs 0 to 7 and 16 to 23 in one vector, 8 to 15 and 24 to 31 in the next.
inline __m512 halves(__m512 a, __m512 b, bool second) {
  return second ? _mm512_shuffle_f32x4(a, b, 0xEE) : _mm512_shuffle_f32x4(a, b, 0x44);
}

// Where the weights of kColumns outputs are.
struct Columns {
  const std::uint8_t* packed;  // [width, kColumns / 2]
  const Bfloat16* scales;      // [groups, outputs, 2], of scale and zero
  Index width, outputs;
};

// What the sums of 16 outputs and of inputs are multiplied with.
struct Scales {
  __m512 scale, shift;
};

// Of vector `vector`, whose group's pairs of scale and zero are at `pairs`.
inline Scales take_scales(const Bfloat16* pairs, int vector) {
  const Bfloat16* two = pairs + vector / 2 * kColumns;
  _mm_prefetch(two + 2 * kColumns + vector % 2 * kColumns / 2, _MM_HINT_T0);
  const __m512i both = _mm512_castps_si512(
      halves(_mm512_loadu_ps(two), _mm512_loadu_ps(two + kColumns / 2), vector % 2));
  const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  const __m512 zero = _mm512_castsi512_ps(_mm512_andnot_si512(_mm512_set1_epi32(0xffff), both));
  return {scale, _mm512_fnmadd_ps(_mm512_set1_ps(8.0f), scale, zero)};
}

// Write the totals of two vectors, [2, kLanes].
inline void write_outputs(const float* totals, Bfloat16* out) {
  const __m512 one = _mm512_load_ps(totals), two = _mm512_load_ps(totals + kLanes);
  store(rounded(halves(one, two, false)), out);
  store(rounded(halves(one, two, true)), out + kLanes);
}

// Those from kFirst to kEnd of the four vectors of kColumns outputs.
template <int kFirst, int kEnd>
struct Vectors {
  static constexpr int first = kFirst, end = kEnd;
};

// Do it for the columns that start at multiples of kColumns and are this thread's, whose first and
// last may be half a column.
template <class Do>
inline void each_column(Index outputs, Do one) {
  const Index halves = outputs / kColumns * 2, threads = omp_get_num_threads();
  const Index thread = omp_get_thread_num(), end = halves * (thread + 1) / threads;
  for (Index half = halves * thread / threads; half < end; half += half % 2 ? 1 : 2) {
    const Index column = half / 2 * kColumns;
    if (half % 2)
      one(column, Vectors<2, 4>{});
    else if (half + 1 < end)
      one(column, Vectors<0, 4>{});
    else
      one(column, Vectors<0, 2>{});
  }
}

}  // namespace
