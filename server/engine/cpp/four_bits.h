// Products of layers whose weights are in four bits, as torch packs them, for processors that
// multiply pairs of 16 bits: of bfloat16 numbers, or else of integers. Called by the compiled
// functions of ahead.py through torch's stable C interface, and by native.py.

#pragma once

#include <memory>

#include "pairs.h"

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)

namespace {

constexpr Index kGroup = 32;  // inputs that share a scale and a zero
constexpr Index kColumns = 64;  // outputs that torch packs together, in four vectors
constexpr Index kRows = 8;  // rows that share one pass over half of the vectors
constexpr Index kFewRows = 6;  // rows that share one pass over all of them

// Rows of inputs that share a pass.
struct Shared {
  const Pair* pairs;  // [width / 2, rows]
  const float* sums;  // of inputs, [groups, rows]
  const float* steps;  // of integers, [groups, rows]
};

// Where a pass finds its rows.
struct Room {
  Pair* pairs;
  float *sums, *steps;
};

// Multiplied with the pairs of inputs of a row is a level q put into a number of 16 bits with a
// base, which is taken back with the sum of the inputs:
//   sum x * ((q - 8) * scale + zero) = scale * sum x * (q + base) + (zero - (8 + base) * scale) * sum x
#ifdef __AVX512BF16__

// A level in the last bits of the bfloat16 number 128 + q.
constexpr short kBaseBits = 0x4300;
constexpr float kBack = 136.0f;  // 8 + base

// With SmolLM2-135M's layers on two cores of an EPYC, all weights take 22 ms at 32 rows, and 37 to
// 41 by torch's bfloat16 products; 11 and 24 at 16.
constexpr Index kMostFourBitRows = 32;

using Sums = __m512;

inline Sums no_sums() { return _mm512_setzero_ps(); }

inline Sums plus_levels(Sums sums, __m512i levels, __m512i pairs) {
  return _mm512_dpbf16_ps(sums, (__m512bh)levels, (__m512bh)pairs);
}

inline __m512 sums_of_inputs(Sums sums, float) { return sums; }

// Write up to 16 rows [rows, width] as pairs of inputs side by side, and their groups' sums.
void share(const Bfloat16* inputs, Index rows, Index width, const Room& room) {
  Pair* pairs = room.pairs;
  float* sums = room.sums;
  const Bfloat16* places[kLanes];
  for (Index i = 0; i < kLanes; ++i) places[i] = inputs + std::min(i, rows - 1) * width;
  const auto mask = static_cast<__mmask16>((1 << rows) - 1);
  const __m512i ones = repeated(0x3f803f80);
  for (Index k = 0; k < width; k += kGroup, sums += rows) {
    transpose(places, pairs, rows, mask);
    for (const Bfloat16*& place : places) place += kGroup;
    __m512 sum = _mm512_setzero_ps();
    for (Index i = 0; i < kGroup / 2; ++i, pairs += rows)
      sum = plus_levels(sum, _mm512_maskz_loadu_epi32(mask, pairs), ones);
    _mm512_mask_storeu_ps(sums, mask, sum);
  }
}

#else

// A level as it is, and inputs as integers of 16 bits, whose step the largest of a group decides:
// the sum of a group is below 2^24, which a float holds.
constexpr short kBaseBits = 0;
constexpr float kBack = 8.0f;
constexpr float kMostInput = 32767.0f;
constexpr float kLeastInput = 1e-30f;  // smaller ones become zero
constexpr Index kMostFourBitRows = kAnyRows;

// Not __m512i, whose conversions to what the instruction takes keep GCC 12 from adding in place.
using Sums = std::int32_t __attribute__((vector_size(64)));

inline Sums no_sums() { return Sums{}; }

inline Sums plus_levels(Sums sums, __m512i levels, __m512i pairs) {
  return (Sums)_mm512_dpwssd_epi32((__m512i)sums, levels, pairs);
}

inline __m512 sums_of_inputs(Sums sums, float step) {
  return _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)sums), _mm512_set1_ps(step));
}

// Write a group of inputs as integers, and their sum and step.
inline void to_integers(const Bfloat16* inputs, Bfloat16* out, float* sum, float* step) {
  const __m512 one = expanded(inputs), two = expanded(inputs + kLanes);
  const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(one), _mm512_abs_ps(two)));
  const __m512 factor = _mm512_set1_ps(most > kLeastInput ? kMostInput / most : 0.0f);
  const auto integers = [=](__m512 numbers) {
    return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(numbers, factor)));
  };
  store(integers(one), out);
  store(integers(two), out + kLanes);
  *sum = _mm512_reduce_add_ps(_mm512_add_ps(one, two));
  *step = most / kMostInput;
}

// As above, with their groups' steps.
void share(const Bfloat16* inputs, Index rows, Index width, const Room& room) {
  alignas(64) Bfloat16 integers[kLanes][kGroup] = {};
  const Bfloat16* places[kLanes];
  for (Index i = 0; i < kLanes; ++i) places[i] = integers[i];
  const auto mask = static_cast<__mmask16>((1 << rows) - 1);
  for (Index group = 0; group < width / kGroup; ++group) {
    for (Index row = 0; row < rows; ++row)
      to_integers(inputs + row * width + group * kGroup, integers[row],
                  room.sums + group * rows + row, room.steps + group * rows + row);
    transpose(places, room.pairs + group * kGroup / 2 * rows, rows, mask);
  }
}

#endif

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

// The levels of the vectors from kFirst to kEnd of two inputs, in pairs; their outputs are in an
// order of their own.
template <int kFirst, int kEnd>
inline void take_levels(const std::uint8_t* place, __m512i* levels) {
  const __m512i nibble = _mm512_set1_epi16(0x000f), base = _mm512_set1_epi16(kBaseBits);
  const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place));
  const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place) + 1);
  const __m512i bytes[] = {_mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(one, two)),
                           _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(one, two))};
  each<kEnd - kFirst>([&](auto i) {
    levels[i] = kFirst + i < 2 ? _mm512_ternarylogic_epi32(bytes[i % 2], nibble, base,
                                                           0xEA)  // (a & b) | c
                               : _mm512_or_si512(_mm512_srli_epi16(bytes[i % 2], 4), base);
  });
}

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
  return {scale, _mm512_fnmadd_ps(_mm512_set1_ps(kBack), scale, zero)};
}

// The total of a row with a group's sums, whose `sum` and `step` of inputs are given.
inline __m512 plus_group(__m512 total, Sums sums, const Scales& scales, float sum, float step) {
  total = _mm512_fmadd_ps(scales.scale, sums_of_inputs(sums, step), total);
  return _mm512_fmadd_ps(scales.shift, _mm512_set1_ps(sum), total);
}

// Write the totals of two vectors, [2, kLanes].
inline void write_outputs(const float* totals, Bfloat16* out) {
  const __m512 one = _mm512_load_ps(totals), two = _mm512_load_ps(totals + kLanes);
  store(rounded(halves(one, two, false)), out);
  store(rounded(halves(one, two, true)), out + kLanes);
}

// The product of kCount rows with the outputs of the vectors from kFirst to kEnd, an even number.
template <int kCount, int kFirst, int kEnd>
void four_bit_block(const Shared& inputs, const Columns& columns, Bfloat16* out) {
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

using Block = void (*)(const Shared&, const Columns&, Bfloat16*);
constexpr Block kWhole[kFewRows] = {four_bit_block<1, 0, 4>, four_bit_block<2, 0, 4>,
                                    four_bit_block<3, 0, 4>, four_bit_block<4, 0, 4>,
                                    four_bit_block<5, 0, 4>, four_bit_block<6, 0, 4>};
template <int kFirst, int kEnd>
constexpr Block kHalf[kRows] = {four_bit_block<1, kFirst, kEnd>, four_bit_block<2, kFirst, kEnd>,
                                four_bit_block<3, kFirst, kEnd>, four_bit_block<4, kFirst, kEnd>,
                                four_bit_block<5, kFirst, kEnd>, four_bit_block<6, kFirst, kEnd>,
                                four_bit_block<7, kFirst, kEnd>, four_bit_block<8, kFirst, kEnd>};

// Rows as passes share them.
class Passes {
 public:
  Passes(const Bfloat16* inputs, Index rows, Index width, Index most)
      : count_((rows + most - 1) / most), rows_(rows), width_(width), inputs_(inputs),
        pairs_(new Pair[rows * width / 2]), sums_(new float[rows * width / kGroup * 2]) {}

  Index count() const { return count_; }
  Index first_row(Index pass) const { return pass * rows_ / count_; }
  Index rows(Index pass) const { return first_row(pass + 1) - first_row(pass); }

  void fill(Index pass) {
    const Index first = first_row(pass);
    share(inputs_ + first * width_, rows(pass), width_, room(first));
  }

  Shared operator[](Index pass) const {
    const Room its = room(first_row(pass));
    return {its.pairs, its.sums, its.steps};
  }

 private:
  Room room(Index row) const {
    const Index groups = width_ / kGroup;
    float* sums = sums_.get() + row * groups;
    return {pairs_.get() + row * width_ / 2, sums, sums + rows_ * groups};
  }

  Index count_, rows_, width_;
  const Bfloat16* inputs_;
  std::unique_ptr<Pair[]> pairs_;
  std::unique_ptr<float[]> sums_;  // and steps
};

// The product of rows few enough that levels are taken anew by each pass.
void few_rows_product(Passes& passes, const std::uint8_t* packed, const Bfloat16* scales,
                      Bfloat16* out, Index rows, Index outputs, Index width) {
  const Index parts = rows <= kFewRows ? 1 : 2;
  for (Index pass = 0; pass < passes.count(); ++pass) passes.fill(pass);
#pragma omp parallel for schedule(static)
  for (Index item = 0; item < outputs / kColumns * parts; ++item) {
    const Index column = item / parts * kColumns;
    const Columns columns{packed + column * width / 2, scales + column * 2, width, outputs};
    const Block* blocks = parts == 1 ? kWhole : item % parts ? kHalf<2, 4> : kHalf<0, 2>;
    for (Index pass = 0; pass < passes.count(); ++pass)
      blocks[passes.rows(pass) - 1](passes[pass], columns,
                                    out + passes.first_row(pass) * outputs + column);
  }
}

#ifndef __AVX512BF16__

constexpr Index kTakenRows = 24;  // rows up to which levels are taken anew by each pass
constexpr Index kLaidGroups = 6;  // whose levels are laid out at one time, in 12 kB
constexpr Index kLaidRows = 12;  // rows that share one pass over them
constexpr Index kPartPasses = 8;  // passes that share what is laid out

// The levels and scales of two vectors of outputs and some groups.
struct Laid {
  __m512i levels[kLaidGroups][kGroup / 2][2];
  Scales scales[kLaidGroups][2];

  template <int kFirst>
  void fill(const Columns& columns, Index first, Index groups) {
    for (Index group = 0; group < groups; ++group) {
      const Index k = (first + group) * kGroup / 2;
      for (Index i = 0; i < kGroup / 2; ++i)
        take_levels<kFirst, kFirst + 2>(columns.packed + (k + i) * kColumns, levels[group][i]);
      for (int i = 0; i < 2; ++i)
        scales[group][i] =
            take_scales(columns.scales + (first + group) * columns.outputs * 2, kFirst + i);
    }
  }
};

// Add the products of kCount rows with what is laid out to their totals, [kCount, 2, kLanes].
template <int kCount>
void laid_block(const Shared& inputs, Index first, Index groups, const Laid& laid, float* totals) {
  const Pair* pairs = inputs.pairs + first * kGroup / 2 * kCount;
  const float *sums = inputs.sums + first * kCount, *steps = inputs.steps + first * kCount;
  __m512 all[kCount][2];
  each<kCount>([&](auto row) {
    each<2>([&](auto i) { all[row][i] = _mm512_load_ps(totals + (row * 2 + i) * kLanes); });
  });
  for (Index group = 0; group < groups; ++group, sums += kCount, steps += kCount) {
    Sums parts[kCount][2];
    each<kCount>([&](auto row) { parts[row][0] = parts[row][1] = no_sums(); });
    for (Index k = 0; k < kGroup / 2; ++k, pairs += kCount) {
      const __m512i one = laid.levels[group][k][0], two = laid.levels[group][k][1];
      each<kCount>([&](auto row) {
        const __m512i pair = repeated(pairs[row]);
        parts[row][0] = plus_levels(parts[row][0], one, pair);
        parts[row][1] = plus_levels(parts[row][1], two, pair);
      });
    }
    each<2>([&](auto i) {
      const Scales scales = laid.scales[group][i];
      each<kCount>([&](auto row) {
        all[row][i] = plus_group(all[row][i], parts[row][i], scales, sums[row], steps[row]);
      });
    });
  }
  each<kCount>([&](auto row) {
    each<2>([&](auto i) { _mm512_store_ps(totals + (row * 2 + i) * kLanes, all[row][i]); });
  });
}

using LaidBlock = void (*)(const Shared&, Index, Index, const Laid&, float*);
constexpr LaidBlock kLaidBlocks[kLaidRows] = {
    laid_block<1>, laid_block<2>, laid_block<3>, laid_block<4>,  laid_block<5>,  laid_block<6>,
    laid_block<7>, laid_block<8>, laid_block<9>, laid_block<10>, laid_block<11>, laid_block<12>};

// The product of the rows of some passes with the two vectors of outputs from kFirst on.
template <int kFirst>
void laid_part(const Passes& passes, Index begin, Index end, const Columns& columns,
               Bfloat16* out) {
  const Index width = columns.width / kGroup;
  Laid laid;
  alignas(64) float totals[kPartPasses][kLaidRows][2][kLanes] = {};
  for (Index first = 0; first < width; first += kLaidGroups) {
    const Index groups = std::min(kLaidGroups, width - first);
    laid.fill<kFirst>(columns, first, groups);
    for (Index pass = begin; pass < end; ++pass)
      kLaidBlocks[passes.rows(pass) - 1](passes[pass], first, groups, laid,
                                         totals[pass - begin][0][0]);
  }
  for (Index pass = begin; pass < end; ++pass)
    for (Index row = 0; row < passes.rows(pass); ++row)
      write_outputs(totals[pass - begin][row][0], out + (passes.first_row(pass) + row) *
                                                            columns.outputs + kFirst * kLanes);
}

void many_rows_product(Passes& passes, const std::uint8_t* packed, const Bfloat16* scales,
                       Bfloat16* out, Index outputs, Index width) {
  const Index parts = (passes.count() + kPartPasses - 1) / kPartPasses;
  const Index halves = outputs / kColumns * 2;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (Index pass = 0; pass < passes.count(); ++pass) passes.fill(pass);
#pragma omp for schedule(dynamic)
    for (Index item = 0; item < halves * parts; ++item) {
      const Index part = item / halves, half = item % halves, column = half / 2 * kColumns;
      const Columns columns{packed + column * width / 2, scales + column * 2, width, outputs};
      const Index begin = part * passes.count() / parts, end = (part + 1) * passes.count() / parts;
      (half % 2 ? laid_part<2> : laid_part<0>)(passes, begin, end, columns, out + column);
    }
  }
}

#endif

}  // namespace

// The rows up to which it is faster than torch's functions.
extern "C" const Index four_bit_rows = kMostFourBitRows;

// out [rows, outputs] = inputs [rows, width] * weights, as torch packs them for its own kernel:
// packed and scales [width / kGroup, outputs, 2], all contiguous. Outputs come in multiples of
// kColumns, since torch packs what is left over in another order.
extern "C" void four_bit_product(const Bfloat16* inputs, const std::uint8_t* packed,
                                 const Bfloat16* scales, Bfloat16* out, Index rows, Index outputs,
                                 Index width) {
#ifndef __AVX512BF16__
  if (rows > kTakenRows) {
    Passes passes(inputs, rows, width, kLaidRows);
    return many_rows_product(passes, packed, scales, out, outputs, width);
  }
#endif
  Passes passes(inputs, rows, width, kRows);
  few_rows_product(passes, packed, scales, out, rows, outputs, width);
}

// torch's stable C interface, of which a status other than 0 is an error.
extern "C" {

struct AtenTensorOpaque;
using Tensor = AtenTensorOpaque*;
std::int32_t aoti_torch_get_data_ptr(Tensor tensor, void** address);
std::int32_t aoti_torch_get_size(Tensor tensor, std::int64_t dimension, std::int64_t* size);
std::int32_t aoti_torch_get_stride(Tensor tensor, std::int64_t dimension, std::int64_t* stride);
std::int32_t aoti_torch_empty_strided(std::int64_t dimensions, const std::int64_t* sizes,
                                      const std::int64_t* strides, std::int32_t dtype,
                                      std::int32_t device_type, std::int32_t device_index,
                                      Tensor* made);
std::int32_t aoti_torch_dtype_bfloat16();
std::int32_t aoti_torch_device_type_cpu();

// As four_bit_product.
std::int32_t aoti_torch_cpu_four_bit_rows(Tensor inputs, Tensor packed, Tensor scales, Tensor* out) {
  Index rows, width, outputs, stride;
  void *from, *weights, *steps, *to;
  if (aoti_torch_get_size(inputs, 0, &rows) || aoti_torch_get_size(inputs, 1, &width) ||
      aoti_torch_get_size(scales, 1, &outputs) || aoti_torch_get_stride(inputs, 0, &stride) ||
      outputs % kColumns || (rows > 1 && stride != width))
    return 1;
  const Index sizes[] = {rows, outputs}, strides[] = {outputs, 1};
  if (aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_bfloat16(),
                               aoti_torch_device_type_cpu(), 0, out) ||
      aoti_torch_get_data_ptr(inputs, &from) || aoti_torch_get_data_ptr(packed, &weights) ||
      aoti_torch_get_data_ptr(scales, &steps) || aoti_torch_get_data_ptr(*out, &to))
    return 1;
  four_bit_product(static_cast<Bfloat16*>(from), static_cast<std::uint8_t*>(weights),
                   static_cast<Bfloat16*>(steps), static_cast<Bfloat16*>(to), rows, outputs, width);
  return 0;
}
}

#endif
