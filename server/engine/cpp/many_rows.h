// Products of several rows with weights in four bits: inputs become integers of 8 bits, which are
// multiplied by fours with levels as they are. The sum of a group's inputs is that of what they
// became, else errors would count by levels.
//   sum x * (level * scale + shift) = scale * step * sum integer * level + shift * sum x
//                                     + middle * scale * sum level

#pragma once

#include <memory>

#include "quads.h"

namespace {

constexpr Index kPassRows = 12;  // rows that share one pass over levels
constexpr int kWholeRows = 4;  // rows that share one pass over all four vectors at once
constexpr Index kPartPasses = 16;  // passes over levels that the caches hold
constexpr Index kFewPasses = 4;  // up to which memory is a part of the time, and kept busy
constexpr Index kPieceGroups = 2;  // that become integers at one time

// The levels of four inputs and the vectors from kFirst to kEnd, in their order of take_levels.
template <int kFirst, int kEnd>
inline void take_quads(const std::uint8_t* place, __m512i* levels) {
  const auto line = [=](int i) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place) + i);
  };
  const __m512i order = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const auto joined = [=](__m256i pairs, __m256i more) {
    return _mm512_permutex2var_epi64(
        _mm512_castsi256_si512(_mm256_unpacklo_epi16(pairs, more)), order,
        _mm512_castsi256_si512(_mm256_unpackhi_epi16(pairs, more)));
  };
  const __m256i a = line(0), b = line(1), c = line(2), d = line(3);
  const __m512i bytes[] = {joined(_mm256_unpacklo_epi8(a, b), _mm256_unpacklo_epi8(c, d)),
                           joined(_mm256_unpackhi_epi8(a, b), _mm256_unpackhi_epi8(c, d))};
  each<kEnd - kFirst>([&](auto i) {
    const __m512i its = kFirst + i < 2 ? bytes[i % 2] : _mm512_srli_epi16(bytes[i % 2], 4);
    levels[i] = _mm512_and_si512(its, _mm512_set1_epi8(15));
  });
}

inline Sums plus_quads(Sums sums, __m512i levels, __m512i quads) {
  return (Sums)_mm512_dpbusd_epi32((__m512i)sums, levels, quads);
}

// Add the products of kCount rows with a group of the vectors from kFirst to kEnd to their totals,
// kStride apart. This is one of kParts calls that take the same bytes and share what is asked for
// ahead of them.
template <int kCount, int kFirst, int kEnd, int kParts, int kStride>
[[gnu::always_inline]] inline void plus_bytes(const Quad* quads, const float* steps,
                                              const std::uint8_t* packed, const Bfloat16* pairs,
                                              float* totals) {
  constexpr int kVectors = kEnd - kFirst, kLines = 2 / kParts;
  Sums parts[kCount][kVectors];
  __m512i all[kVectors];  // sums of levels: 8 times 15 at most, in bytes
  each<kVectors>([&](auto i) { all[i] = _mm512_setzero_si512(); });
  each<kCount>([&](auto row) {
    each<kVectors>([&](auto i) { parts[row][i] = no_sums(); });
  });
#pragma GCC unroll 2
  for (int k = 0; k < kQuads; ++k, packed += 2 * kColumns, quads += kCount) {
    // No lambda: GCC leaves out calls of what only asks.
    for (int i = 0; i < kLines; ++i)
      _mm_prefetch(packed + kAhead + (kFirst / 2 % kParts + i) * 64, _MM_HINT_T0);
    __m512i levels[kVectors];
    take_quads<kFirst, kEnd>(packed, levels);
    each<kVectors>([&](auto i) { all[i] = _mm512_add_epi8(all[i], levels[i]); });
    each<kCount>([&](auto row) {
      const __m512i quad = repeated(quads[row]);
      each<kVectors>([&](auto i) { parts[row][i] = plus_quads(parts[row][i], levels[i], quad); });
    });
  }
  each<kVectors>([&](auto i) {
    const Scales scales = take_scales(pairs, kFirst + i);
    const Sums sums = plus_quads(no_sums(), all[i], _mm512_set1_epi8(1));
    const __m512 scaled = _mm512_mul_ps(floats(sums), scales.scale);
    each<kCount>([&](auto row) {
      float* place = totals + row * kStride + i * kLanes;
      const auto of_row = [&](int which) { return _mm512_set1_ps(steps[which * kCount + row]); };
      const __m512 product = _mm512_mul_ps(floats(parts[row][i]), of_row(0));
      __m512 total = _mm512_fmadd_ps(scales.scale, product, _mm512_load_ps(place));
      total = _mm512_fmadd_ps(scaled, of_row(1), total);
      _mm512_store_ps(place, _mm512_fmadd_ps(scales.shift, of_row(2), total));
    });
    // What rows have is read again for the next vector: there are no registers to keep it in.
    asm volatile("" ::: "memory");
  });
}

// The product of kCount rows with the outputs of the vectors from kFirst to kEnd.
template <int kCount, int kFirst, int kEnd>
[[gnu::flatten]] void byte_block(const Quads& rows, const Columns& columns, Bfloat16* out) {
  constexpr int kVectors = kEnd - kFirst, kAtOnce = kCount > kWholeRows ? 2 : kVectors;
  constexpr int kParts = kVectors / kAtOnce;
  alignas(64) float numbers[kCount][kVectors][kLanes] = {};
  float* totals = numbers[0][0];
  // Hidden, else some of them get registers and sums of integers do not.
  asm volatile("" : "+r"(totals) : : "memory");
  for (Index group = 0; group < columns.width / kGroup; ++group)
    each<kParts>([&](auto part) {
      constexpr int kBegin = kFirst + part * kAtOnce;
      plus_bytes<kCount, kBegin, kBegin + kAtOnce, kParts, kVectors * kLanes>(
          rows.quads + group * kQuads * kCount, rows.steps + group * 3 * kCount,
          columns.packed + group * kGroup * kColumns / 2,
          columns.scales + group * columns.outputs * 2, totals + part * kAtOnce * kLanes);
    });
  for (int row = 0; row < kCount; ++row)
    for (int i = 0; i < kVectors; i += 2)
      write_outputs(totals + (row * kVectors + i) * kLanes,
                    out + row * columns.outputs + (kFirst + i) * kLanes);
}

using ByteBlock = void (*)(const Quads&, const Columns&, Bfloat16*);
template <int kFirst, int kEnd>
constexpr ByteBlock kByteBlocks[] = {  // of more than kExactRows rows
    byte_block<4, kFirst, kEnd>,  byte_block<5, kFirst, kEnd>,  byte_block<6, kFirst, kEnd>,
    byte_block<7, kFirst, kEnd>,  byte_block<8, kFirst, kEnd>,  byte_block<9, kFirst, kEnd>,
    byte_block<10, kFirst, kEnd>, byte_block<11, kFirst, kEnd>, byte_block<12, kFirst, kEnd>};

// Rows, more than kExactRows, as passes share them.
class ByteRows {
 public:
  ByteRows(const Bfloat16* inputs, Index rows, Index width)
      : count((rows + kPassRows - 1) / kPassRows),
        pieces((width / kGroup + kPieceGroups - 1) / kPieceGroups), rows_(rows), width_(width),
        inputs_(inputs), quads_(new Quad[rows * width / 4]),
        steps_(new float[rows * width / kGroup * 3]) {}

  const Index count;  // of passes
  const Index pieces;  // of a pass, which become integers one by one

  Index first_row(Index pass) const { return pass * rows_ / count; }
  Index rows(Index pass) const { return first_row(pass + 1) - first_row(pass); }

  void write(Index piece) const {
    const Index pass = piece / pieces, begin = piece % pieces * kPieceGroups;
    write_quads(inputs_ + first_row(pass) * width_, rows(pass), width_, begin,
                std::min(begin + kPieceGroups, width_ / kGroup), (*this)[pass]);
  }

  Quads operator[](Index pass) const {
    const Index place = first_row(pass) * (width_ / kGroup);
    return {quads_.get() + place * kQuads, steps_.get() + place * 3};
  }

 private:
  Index rows_, width_;
  const Bfloat16* inputs_;
  std::unique_ptr<Quad[]> quads_;
  std::unique_ptr<float[]> steps_;
};

void many_rows_product(const Bfloat16* inputs, const std::uint8_t* packed, const Bfloat16* scales,
                       Bfloat16* out, Index rows, Index outputs, Index width) {
  const ByteRows bytes(inputs, rows, width);
  const auto multiply = [&](Index begin, Index end, Index column, auto vectors) {
    const Columns columns{packed + column * width / 2, scales + column * 2, width, outputs};
    for (Index pass = begin; pass < end; ++pass)
      kByteBlocks<vectors.first, vectors.end>[bytes.rows(pass) - kExactRows - 1](
          bytes[pass], columns, out + bytes.first_row(pass) * outputs + column);
  };
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (Index piece = 0; piece < bytes.count * bytes.pieces; ++piece) bytes.write(piece);
    if (bytes.count <= kFewPasses) {
      each_column(outputs, [&](Index column, auto vectors) {
        multiply(0, bytes.count, column, vectors);
      });
    } else {
      const Index halves = outputs / kColumns * 2;
      const Index parts = (bytes.count + kPartPasses - 1) / kPartPasses;
#pragma omp for schedule(dynamic)
      for (Index item = 0; item < halves * parts; ++item) {
        const Index part = item / halves, half = item % halves, column = half / 2 * kColumns;
        const Index begin = part * bytes.count / parts, end = (part + 1) * bytes.count / parts;
        if (half % 2)
          multiply(begin, end, column, Vectors<2, 4>{});
        else
          multiply(begin, end, column, Vectors<0, 2>{});
      }
    }
  }
}

}  // namespace
