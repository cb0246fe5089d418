// RMSNorm of rows: gain * x / sqrt(mean(x^2) + epsilon).

#pragma once

#include <cmath>

#include "numbers.h"

namespace {

// What the numbers of a row [width] are multiplied by, but for the gain.
inline float norm_factor(const Bfloat16* row, Index width, float epsilon) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (Index i = 0; i < width; ++i) squares += expanded(row[i]) * expanded(row[i]);
  return 1 / std::sqrt(squares / width + epsilon);
}

constexpr Index kFewNumbers = 1 << 15;  // below which a second thread costs more

}  // namespace

// hidden and out are [rows, width], contiguous, gain is [width].
extern "C" void norm_rows(const Bfloat16* hidden, const float* gain, Bfloat16* out, Index rows,
                          Index width, float epsilon) {
#pragma omp parallel for schedule(static) if (rows * width >= kFewNumbers)
  for (Index row = 0; row < rows; ++row) {
    const Bfloat16* numbers = hidden + row * width;
    const float factor = norm_factor(numbers, width, epsilon);
#pragma omp simd
    for (Index i = 0; i < width; ++i)
      out[row * width + i] = rounded(expanded(numbers[i]) * (gain[i] * factor));
  }
}
