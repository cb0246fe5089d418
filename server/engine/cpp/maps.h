// What stands in a dropped sublayer's place, with maps in eight bits.

#pragma once

#include "norms.h"

namespace {

constexpr Index kTile = 32;  // outputs of a map whose levels lie side by side
constexpr Index kMostRows = 12;  // that share one pass over a map: 24 sums in registers
constexpr Index kFewWeights = 1 << 15;  // of a map, below which a second thread costs more

// A linear map: levels [outputs / kTile, inputs, kTile], scales [outputs].
struct Map {
  const std::int8_t* levels;
  const float* scales;
  Index inputs, outputs;
};

// hidden + multiplier * (bias + up(down(norm(hidden)))).
struct Substitute {
  const float* gain;  // RMSNorm's; no norm: null
  float epsilon, multiplier;
  Map down, up;  // of full rank: down has no levels
  const float* bias;
};

// What a map multiplies, [inputs / kTogether, rows, kTogether], kTogether inputs in an instruction.
#ifdef __AVX512BF16__

using Number = Bfloat16;
using Levels = __m512bh;
constexpr Index kTogether = 2;

inline Number number(float value) { return rounded(value); }

inline __m512i level_bits(const std::int8_t* place) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(place));
  return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}

// The levels of kLanes outputs. One of eight bits is a bfloat16 number exactly: the lower half of
// its float is zero.
inline Levels levels_at(const std::int8_t* place) {
  const __m512i first = _mm512_srli_epi32(level_bits(place), 16);
  return (__m512bh)_mm512_or_si512(first, level_bits(place + kTile));
}

inline __m512 add_products(__m512 sum, Levels levels, const Number* numbers) {
  std::int32_t pair;
  std::memcpy(&pair, numbers, sizeof pair);
  return _mm512_dpbf16_ps(sum, levels, (__m512bh)_mm512_set1_epi32(pair));
}

#else

using Number = float;
using Levels = __m512;
constexpr Index kTogether = 1;

inline Number number(float value) { return value; }

inline Levels levels_at(const std::int8_t* place) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(place));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

inline __m512 add_products(__m512 sum, Levels levels, const Number* numbers) {
  return _mm512_fmadd_ps(levels, _mm512_set1_ps(*numbers), sum);
}

#endif

// Write a row's inputs from `first` to first + kTile where its sums look for them.
void lay(const float* numbers, Index first, Index row, Index rows, Number* out) {
  Number line[kTile];
#pragma omp simd
  for (Index i = 0; i < kTile; ++i) line[i] = number(numbers[i]);
  for (Index i = 0; i < kTile; i += kTogether)
    std::memcpy(out + (first + i) * rows + row * kTogether, line + i, kTogether * sizeof(Number));
}

// The sums of one tile of outputs and kCount rows.
template <int kCount>
void tile_sums(const Number* inputs, const Map& map, Index tile, float (*out)[kTile]) {
  constexpr int kParts = kCount < 3 ? 4 / kCount : 1;  // of a sum, so that none waits for itself
  __m512 sums[kParts][kCount][2];
  for (auto& part : sums)
    for (auto& row : part) row[0] = row[1] = _mm512_setzero_ps();
  const std::int8_t* levels = map.levels + tile * map.inputs * kTile;
  for (Index k = 0; k < map.inputs; k += kParts * kTogether) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const std::int8_t* place = levels + (k + part * kTogether) * kTile;
      const Number* numbers = inputs + (k + part * kTogether) * kCount;
      _mm_prefetch(place + kAhead, _MM_HINT_T0);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Levels weights = levels_at(place + i * kLanes);
#pragma GCC unroll 12
        for (int row = 0; row < kCount; ++row)
          sums[part][row][i] =
              add_products(sums[part][row][i], weights, numbers + row * kTogether);
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 scales = _mm512_loadu_ps(map.scales + tile * kTile + i * kLanes);
    for (int row = 0; row < kCount; ++row) {
      __m512 sum = sums[0][row][i];
      for (int part = 1; part < kParts; ++part) sum = _mm512_add_ps(sum, sums[part][row][i]);
      _mm512_storeu_ps(out[row] + i * kLanes, _mm512_mul_ps(sum, scales));
    }
  }
}

using TileSums = void (*)(const Number*, const Map&, Index, float (*)[kTile]);
constexpr TileSums kTileSums[] = {
    tile_sums<1>, tile_sums<2>, tile_sums<3>, tile_sums<4>,  tile_sums<5>,  tile_sums<6>,
    tile_sums<7>, tile_sums<8>, tile_sums<9>, tile_sums<10>, tile_sums<11>, tile_sums<12>};

// Lay the norm of a row [width].
void normalise(const Bfloat16* hidden, const Substitute& s, Index width, Index row, Index rows,
               Number* out) {
  const float factor = norm_factor(hidden, width, s.epsilon);
  float normed[kTile];
  for (Index first = 0; first < width; first += kTile) {
#pragma omp simd
    for (Index i = 0; i < kTile; ++i)
      normed[i] = expanded(hidden[first + i]) * (s.gain ? s.gain[first + i] * factor : 1.0f);
    lay(normed, first, row, rows, out);
  }
}

// Write one tile of the residual stream of `rows` rows, [rows, width].
void add_tile(const float (*sums)[kTile], const Substitute& s, Index tile, Index rows, Index width,
              const Bfloat16* hidden, Bfloat16* out) {
  const float* bias = s.bias + tile * kTile;
  for (Index row = 0; row < rows; ++row) {
    const Index at = row * width + tile * kTile;
#pragma omp simd
    for (Index i = 0; i < kTile; ++i)
      out[at + i] = rounded(expanded(hidden[at + i]) + s.multiplier * (sums[row][i] + bias[i]));
  }
}

}  // namespace

// What leaves a dropped sublayer in whose place a substitute stands, [rows, width], for up to
// kMostRows rows; hidden and out are contiguous. All sizes of maps are multiples of kTile.
extern "C" void substitute_rows(const Bfloat16* hidden, Bfloat16* out, Index rows,
                                const Substitute* substitute) {
  const Substitute& s = *substitute;
  const Index width = s.up.outputs, rank = s.down.levels ? s.down.outputs : 0;
  std::vector<Number> normed(width * rows), shortened(rank * rows);
  for (Index row = 0; row < rows; ++row)
    normalise(hidden + row * width, s, width, row, rows, normed.data());
  const Number* given = rank ? shortened.data() : normed.data();
  const TileSums tile_sums = kTileSums[rows - 1];
#pragma omp parallel if (s.up.inputs * width >= kFewWeights)
  {
    float sums[kMostRows][kTile];
#pragma omp for schedule(static)
    for (Index tile = 0; tile < rank / kTile; ++tile) {
      tile_sums(normed.data(), s.down, tile, sums);
      for (Index row = 0; row < rows; ++row)
        lay(sums[row], tile * kTile, row, rows, shortened.data());
    }
#pragma omp for schedule(static)
    for (Index tile = 0; tile < width / kTile; ++tile) {
      tile_sums(given, s.up, tile, sums);
      add_tile(sums, s, tile, rows, width, hidden, out);
    }
  }
}
