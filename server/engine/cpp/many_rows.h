// Products of many rows with weights in four bits: inputs become integers of 8 bits, which are
// multiplied by fours with levels that are laid out once for many rows.
//
// A group of inputs is middle + step * integer, where the middle is that of its least and its
// largest number: outliers, which are of one sign in most groups, cost half of what they would
// around zero. The sum of inputs is that of what they became, else errors would count by levels.
//   sum x * (level * scale + shift) = scale * step * sum integer * level + shift * sum x
//                                     + middle * scale * sum level

#pragma once

#include <memory>

#include "levels.h"

namespace {

constexpr Index kExactRows = 64;  // rows up to which integers of 16 bits are worth their time
constexpr int kQuads = kGroup / 4;  // fours of inputs in a group
constexpr Index kLaidGroups = 12;  // whose levels are laid out at one time, in 12 kB
constexpr Index kLaidRows = 12;  // rows that share one pass over them
constexpr Index kPartPasses = 16;  // passes that share what is laid out
constexpr float kMostInteger = 127.0f;
constexpr float kLeastStep = 1e-30f;  // with a smaller one, all of a group are its middle

using Quad = std::uint32_t;  // four integers of 8 bits

// Where the rows of a pass are.
struct Quads {
  Quad* quads;  // [groups, kQuads, rows]
  float* steps;  // [groups, 3, rows]: step, middle, and the sum of middle + step * integer
};

// Write a group of each of up to 16 rows, which the lanes of `numbers` hold.
inline void write_group(const __m512* numbers, Index rows, Quad* quads, float* steps) {
  const auto mask = static_cast<__mmask16>((1 << rows) - 1);
  __m512 least = numbers[0], most = numbers[0], nothing = _mm512_setzero_ps();
  for (int i = 0; i < kGroup; ++i) {
    least = _mm512_min_ps(least, numbers[i]);
    most = _mm512_max_ps(most, numbers[i]);
    nothing = _mm512_fmadd_ps(numbers[i], _mm512_setzero_ps(), nothing);  // or, once, no number
  }
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
    _mm512_mask_storeu_epi32(quads + quad * rows, mask, _mm512_or_si512(low, high));
  }
  const __m512 middles = _mm512_fmadd_ps(middle, _mm512_set1_ps(kGroup), nothing);
  _mm512_mask_storeu_ps(steps, mask, step);
  _mm512_mask_storeu_ps(steps + rows, mask, middle);
  _mm512_mask_storeu_ps(steps + 2 * rows, mask,
                        _mm512_fmadd_ps(step, _mm512_cvtepi32_ps(sum), middles));
}

// Write up to 16 rows [rows, width].
void write_quads(const Bfloat16* inputs, Index rows, Index width, const Quads& to) {
  const Bfloat16* places[kLanes];
  for (Index i = 0; i < kLanes; ++i) places[i] = inputs + std::min(i, rows - 1) * width;
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (Index group = 0; group < width / kGroup; ++group) {
    __m512 numbers[kGroup];
    transpose(places, [&](int column, __m512i pairs) {
      numbers[2 * column] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      numbers[2 * column + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
    });
    write_group(numbers, rows, to.quads + group * kQuads * rows, to.steps + group * 3 * rows);
    for (const Bfloat16*& place : places) place += kGroup;
  }
}

// The levels of four inputs and two vectors of outputs, in their order of take_levels.
template <int kFirst>
inline void take_quads(const std::uint8_t* place, __m512i* levels) {
  const auto line = [=](int i) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place) + i);
  };
  const auto joined = [](__m256i pairs, __m256i more) {
    const __m512i low = _mm512_castsi256_si512(_mm256_unpacklo_epi16(pairs, more));
    const __m512i both = _mm512_inserti64x4(low, _mm256_unpackhi_epi16(pairs, more), 1);
    const __m512i bytes = _mm512_shuffle_i64x2(both, both, 0xD8);
    return _mm512_and_si512(kFirst ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
  };
  const __m256i a = line(0), b = line(1), c = line(2), d = line(3);
  levels[0] = joined(_mm256_unpacklo_epi8(a, b), _mm256_unpacklo_epi8(c, d));
  levels[1] = joined(_mm256_unpackhi_epi8(a, b), _mm256_unpackhi_epi8(c, d));
}

inline Sums plus_quads(Sums sums, __m512i levels, __m512i quads) {
  return (Sums)_mm512_dpbusd_epi32((__m512i)sums, levels, quads);
}

// The levels of some groups of two vectors of outputs, and what their sums are multiplied with.
struct Laid {
  __m512i levels[kLaidGroups][kQuads][2];
  Scales scales[kLaidGroups][2];
  __m512 sums[kLaidGroups][2];  // of levels times scale

  template <int kFirst>
  void fill(const Columns& columns, Index first, Index groups) {
    for (Index group = 0; group < groups; ++group) {
      const std::uint8_t* packed = columns.packed + (first + group) * kGroup * kColumns / 2;
      Sums all[2] = {};
      for (Index quad = 0; quad < kQuads; ++quad) {
        take_quads<kFirst>(packed + quad * 2 * kColumns, levels[group][quad]);
        for (int i = 0; i < 2; ++i)
          all[i] = plus_quads(all[i], levels[group][quad][i], _mm512_set1_epi8(1));
      }
      for (int i = 0; i < 2; ++i) {
        scales[group][i] =
            take_scales(columns.scales + (first + group) * columns.outputs * 2, kFirst + i);
        sums[group][i] = _mm512_mul_ps(floats(all[i]), scales[group][i].scale);
      }
    }
  }
};

// Add the products of kCount rows with what is laid out to their totals, [kCount, 2, kLanes]. All
// that it calls is inlined: sums given to a function would be in memory.
template <int kCount>
[[gnu::flatten]] void laid_block(const Quad* quads, const float* steps, Index groups,
                                 const Laid& laid, float* totals) {
  for (Index group = 0; group < groups; ++group, steps += 3 * kCount) {
    Sums parts[kCount][2];
    each<kCount>([&](auto row) { parts[row][0] = parts[row][1] = no_sums(); });
    for (Index k = 0; k < kQuads; ++k, quads += kCount) {
      const __m512i one = laid.levels[group][k][0], two = laid.levels[group][k][1];
      each<kCount>([&](auto row) {
        const __m512i quad = repeated(quads[row]);
        parts[row][0] = plus_quads(parts[row][0], one, quad);
        parts[row][1] = plus_quads(parts[row][1], two, quad);
      });
    }
    each<2>([&](auto i) {
      const Scales scales = laid.scales[group][i];
      const __m512 sums = laid.sums[group][i];
      each<kCount>([&](auto row) {
        float* place = totals + (row * 2 + i) * kLanes;
        const auto of_row = [&](int which) { return _mm512_set1_ps(steps[which * kCount + row]); };
        const __m512 product = _mm512_mul_ps(floats(parts[row][i]), of_row(0));
        __m512 total = _mm512_fmadd_ps(scales.scale, product, _mm512_load_ps(place));
        total = _mm512_fmadd_ps(sums, of_row(1), total);
        _mm512_store_ps(place, _mm512_fmadd_ps(scales.shift, of_row(2), total));
      });
      // What rows have is read again for the second vector: there are no registers to keep it in.
      asm volatile("" ::: "memory");
    });
  }
}

using LaidBlock = void (*)(const Quad*, const float*, Index, const Laid&, float*);
constexpr LaidBlock kLaidBlocks[kLaidRows] = {
    laid_block<1>, laid_block<2>, laid_block<3>, laid_block<4>,  laid_block<5>,  laid_block<6>,
    laid_block<7>, laid_block<8>, laid_block<9>, laid_block<10>, laid_block<11>, laid_block<12>};

// Rows as passes share them, and the product.
class ManyRows {
 public:
  ManyRows(const Bfloat16* inputs, Index rows, const Columns& columns, Bfloat16* out)
      : count((rows + kLaidRows - 1) / kLaidRows), rows_(rows), inputs_(inputs), all_(columns),
        out_(out), quads_(new Quad[rows * columns.width / 4]),
        steps_(new float[rows * columns.width / kGroup * 3]) {}

  const Index count;  // of passes

  void write(Index pass) const {
    write_quads(inputs_ + first_row(pass) * all_.width, rows(pass), all_.width, at(pass, 0));
  }

  // Compute the two vectors of outputs from `column` + kFirst * kLanes on for some passes.
  template <int kFirst>
  void multiply(Index begin, Index end, Index column) const {
    const Columns columns{all_.packed + column * all_.width / 2, all_.scales + column * 2,
                          all_.width, all_.outputs};
    const Index groups = all_.width / kGroup, parts = (groups + kLaidGroups - 1) / kLaidGroups;
    Laid laid;
    alignas(64) float totals[kPartPasses][kLaidRows][2][kLanes] = {};
    for (Index part = 0; part < parts; ++part) {
      const Index first = part * groups / parts, its = (part + 1) * groups / parts - first;
      laid.fill<kFirst>(columns, first, its);
      for (Index pass = begin; pass < end; ++pass) {
        const Quads from = at(pass, first);
        kLaidBlocks[rows(pass) - 1](from.quads, from.steps, its, laid, totals[pass - begin][0][0]);
      }
    }
    for (Index pass = begin; pass < end; ++pass)
      for (Index row = 0; row < rows(pass); ++row)
        write_outputs(totals[pass - begin][row][0],
                      out_ + (first_row(pass) + row) * all_.outputs + column + kFirst * kLanes);
  }

 private:
  Index first_row(Index pass) const { return pass * rows_ / count; }
  Index rows(Index pass) const { return first_row(pass + 1) - first_row(pass); }

  // Where a pass has its rows from a group on.
  Quads at(Index pass, Index group) const {
    const Index groups = all_.width / kGroup;
    const Index place = first_row(pass) * groups + group * rows(pass);
    return {quads_.get() + place * kQuads, steps_.get() + place * 3};
  }

  Index rows_;
  const Bfloat16* inputs_;
  Columns all_;
  Bfloat16* out_;
  std::unique_ptr<Quad[]> quads_;
  std::unique_ptr<float[]> steps_;
};

void many_rows_product(const Bfloat16* inputs, const std::uint8_t* packed, const Bfloat16* scales,
                       Bfloat16* out, Index rows, Index outputs, Index width) {
  const ManyRows many(inputs, rows, {packed, scales, width, outputs}, out);
  const Index parts = (many.count + kPartPasses - 1) / kPartPasses;
  const Index halves = outputs / kColumns * 2;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (Index pass = 0; pass < many.count; ++pass) many.write(pass);
#pragma omp for schedule(dynamic)
    for (Index item = 0; item < halves * parts; ++item) {
      const Index part = item / halves, half = item % halves, column = half / 2 * kColumns;
      const Index begin = part * many.count / parts, end = (part + 1) * many.count / parts;
      if (half % 2)
        many.multiply<2>(begin, end, column);
      else
        many.multiply<0>(begin, end, column);
    }
  }
}

}  // namespace
