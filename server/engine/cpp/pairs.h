// Pairs of numbers of 16 bits, which instructions multiply together.

#pragma once

#include "numbers.h"

namespace {

using Pair = std::uint32_t;

inline __m512i repeated(Pair pair) { return _mm512_set1_epi32(static_cast<int>(pair)); }

// Give `write` each column of 16 rows of 16 pairs, by its number.
template <class Write>
inline void transpose(const Bfloat16* const* rows, Write write) {
  __m512i a[kLanes], b[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) a[i] = _mm512_loadu_si512(rows[i]);
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  // a[4 * i + j] has column 4 * lane + j of rows 4 * i to 4 * i + 3 in each 128-bit lane.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xDD);
    const __m512i high_odd = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xDD);
    write(j, _mm512_shuffle_i32x4(low, high, 0x88));
    write(4 + j, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    write(8 + j, _mm512_shuffle_i32x4(low, high, 0xDD));
    write(12 + j, _mm512_shuffle_i32x4(low_odd, high_odd, 0xDD));
  }
}

// Write the first rows, those in `mask`, of 16 rows of 16 pairs as columns, `stride` pairs apart.
inline void transpose(const Bfloat16* const* rows, Pair* to, Index stride, __mmask16 mask) {
  transpose(rows, [=](int column, __m512i pairs) {
    _mm512_mask_storeu_epi32(to + column * stride, mask, pairs);
  });
}

}  // namespace
