// Attention of prompt chunks and of single rows, without soft-capping, for heads whose dimension is
// a multiple of kTokens: by products of bfloat16 pairs where the processor has them, else of floats.

#pragma once

#include "pairs.h"
#include "rows.h"
#include "single_rows.h"

namespace {

constexpr Index kTokens = 64;  // whose scores of a row are in registers at one time
constexpr Index kSharing = 4;  // rows that share what is read of keys and values
constexpr Index kVectors = kTokens / kLanes;
constexpr Index kTileRows = 192;  // rows times heads of a tile

// What is multiplied at one time in one lane, and what 16 lanes hold.
#ifdef __AVX512BF16__

using Factor = Pair;
using Factors = __m512bh;
constexpr Index kPaired = 2;  // numbers in a factor

inline Factors factors(const Factor* place) { return (__m512bh)_mm512_loadu_si512(place); }

inline Factors repeated_factor(Factor factor) { return (__m512bh)repeated(factor); }

inline __m512 plus_products(__m512 sum, Factors a, Factors b) {
  return _mm512_dpbf16_ps(sum, a, b);
}

inline void write_factors(const Bfloat16* numbers, Index count, Factor* to) {
  std::memcpy(to, numbers, count * sizeof(Bfloat16));
}

inline void write_weights(__m512 weights, Factor* to) {
  store(rounded(weights), reinterpret_cast<Bfloat16*>(to));
}

// Write 16 rows of 32 numbers as columns, kTokens apart.
inline void write_keys(const Bfloat16* const* rows, Factor* to) {
  transpose(rows, to, kTokens, 0xffff);
}

// Write two rows of numbers, side by side.
inline void write_values(const Bfloat16* one, const Bfloat16* two, Index width, Factor* to) {
  const auto wide = [](const Bfloat16* place) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(place)));
  };
  for (Index i = 0; i < width; i += kLanes)
    _mm512_storeu_si512(to + i,
                        _mm512_or_si512(wide(one + i), _mm512_slli_epi32(wide(two + i), 16)));
}

#else

using Factor = float;
using Factors = __m512;
constexpr Index kPaired = 1;

inline Factors factors(const Factor* place) { return _mm512_loadu_ps(place); }

inline Factors repeated_factor(Factor factor) { return _mm512_set1_ps(factor); }

inline __m512 plus_products(__m512 sum, Factors a, Factors b) {
  return _mm512_fmadd_ps(a, b, sum);
}

inline void write_factors(const Bfloat16* numbers, Index count, Factor* to) {
  for (Index i = 0; i < count; i += kLanes) _mm512_storeu_ps(to + i, expanded(numbers + i));
}

inline void write_weights(__m512 weights, Factor* to) { _mm512_storeu_ps(to, weights); }

inline void write_keys(const Bfloat16* const* rows, Factor* to) {
  transpose(rows, [=](int column, __m512i pairs) {
    const __m512i second = _mm512_andnot_si512(_mm512_set1_epi32(0xffff), pairs);
    _mm512_storeu_si512(to + 2 * column * kTokens, _mm512_slli_epi32(pairs, 16));
    _mm512_storeu_si512(to + (2 * column + 1) * kTokens, second);
  });
}

inline void write_values(const Bfloat16* one, const Bfloat16* two, Index width, Factor* to) {
  write_factors(one, width, to);
  write_factors(two, width, to + width);
}

#endif

// Rows of one sequence that one thread attends with the query heads of one key head: tile row
// row * heads + head. Position `first` is that of its first row. Kept from tile to tile.
struct Tile {
  Index rows, heads, first;
  Lines<Factor> query;  // [tile rows, dim / kPaired]
  Lines<float> out, best, sum;
  Lines<Factor> keys, values;  // [dim / kPaired, kTokens], [kTokens / kPaired, dim]

  void begin(Index its_rows, Index its_heads, Index its_first, Index dim) {
    rows = its_rows;
    heads = its_heads;
    first = its_first;
    query.resize(count() * dim / kPaired);
    out.assign(count() * dim, 0.0f);
    best.assign(count(), kUnseen);
    sum.assign(count(), 0.0f);
    keys.resize(dim / kPaired * kTokens);
    values.resize(kTokens / kPaired * dim);
  }

  Index count() const { return rows * heads; }
  Index position(Index tile_row) const { return first + tile_row / heads; }
};

// Put keys and values of up to kTokens tokens from `at` on where products find them, kLanes at a
// time; those past `end` are zero.
void pack(Tile& tile, const Pages& pages, const std::int32_t* table, Index at, Index end,
          Index kv_head) {
  const Index dim = pages.dim;
  static const std::vector<Bfloat16> nothing(1024, 0);
  const Bfloat16 *all_keys[kTokens], *all_values[kTokens];
  for (Index t = 0; t < kTokens; ++t) {
    const Index token = at + t;
    all_keys[t] = all_values[t] = nothing.data();
    if (token >= end) continue;
    const Index place = table[token / pages.tokens] * pages.page_stride +
                        (token % pages.tokens * pages.kv_heads + kv_head) * dim;
    all_keys[t] = pages.keys + place;
    all_values[t] = pages.values + place;
    for (Index d = 0; d < dim; d += kLine) {
      _mm_prefetch(all_keys[t] + d, _MM_HINT_T0);
      _mm_prefetch(all_values[t] + d, _MM_HINT_T0);
    }
  }
  for (Index t = 0; t < kTokens && at + t < end; t += kLanes) {
    const Bfloat16 **keys = all_keys + t, **values = all_values + t;
    for (Index i = 0; i < kLanes; i += 2)
      write_values(values[i], values[i + 1], dim, &tile.values[(t + i) / kPaired * dim]);
    for (Index d = 0; d < dim; d += 2 * kLanes) {
      write_keys(keys, &tile.keys[d / kPaired * kTokens + t]);
      for (Index i = 0; i < kLanes; ++i) keys[i] += 2 * kLanes;
    }
  }
}

// Add kTokens numbers of the values of kSeen times kLanes tokens, by their weights
// [kCount, kTokens / kPaired], to those of kCount rows, which fade. A call, since what is around it
// needs the registers as well.
template <int kCount, int kSeen>
[[gnu::noinline]] void add_values(const Factor* weights, const Factor* values, Index dim,
                                  const float* fade, float* rows) {
  __m512 out[kCount][kVectors];
  each<kCount>([&](auto r) {
    const __m512 factor = _mm512_set1_ps(fade[r]);
    each<kVectors>([&](auto v) {
      out[r][v] = _mm512_mul_ps(_mm512_loadu_ps(rows + r * dim + v * kLanes), factor);
    });
  });
  for (Index t = 0; t < kSeen * kLanes / kPaired; ++t, values += dim) {
    Factors numbers[kVectors];
    each<kVectors>([&](auto v) { numbers[v] = factors(values + v * kLanes); });
    each<kCount>([&](auto r) {
      const Factors weight = repeated_factor(weights[r * (kTokens / kPaired) + t]);
      each<kVectors>([&](auto v) { out[r][v] = plus_products(out[r][v], weight, numbers[v]); });
    });
  }
  each<kCount>([&](auto r) {
    each<kVectors>([&](auto v) { _mm512_storeu_ps(rows + r * dim + v * kLanes, out[r][v]); });
  });
}

// Attend with kCount rows of a tile, from `row` on, over kSeen times kLanes packed tokens, the first
// of which is `at`.
template <int kCount, int kSeen>
void attend_block(Tile& tile, Index row, Index at, Index dim, float factor, Index window) {
  const Index steps = dim / kPaired;
  __m512 scores[kCount][kSeen];
  for (auto& own : scores)
    for (auto& vector : own) vector = _mm512_setzero_ps();
  const Factor* query = &tile.query[row * steps];
  for (Index d = 0; d < steps; ++d) {
    Factors keys[kSeen];
    for (Index v = 0; v < kSeen; ++v) keys[v] = factors(&tile.keys[d * kTokens + v * kLanes]);
    for (Index r = 0; r < kCount; ++r) {
      const Factors q = repeated_factor(query[r * steps + d]);
      for (Index v = 0; v < kSeen; ++v)
        scores[r][v] = plus_products(scores[r][v], q, keys[v]);
    }
  }
  alignas(64) Factor weights[kCount][kTokens / kPaired];
  float fade[kCount];
  for (Index r = 0; r < kCount; ++r) {
    const Index position = tile.position(row + r);
    const Index oldest = window > 0 ? position - window + 1 : 0;
    const bool whole = at + kSeen * kLanes - 1 <= position && at >= oldest;
    __m512 most = _mm512_set1_ps(kUnseen);
    for (Index v = 0; v < kSeen; ++v) {
      scores[r][v] = _mm512_mul_ps(scores[r][v], _mm512_set1_ps(factor));
      if (!whole) {
        __mmask16 seen = 0;
        for (Index lane = 0; lane < kLanes; ++lane) {
          const Index token = at + v * kLanes + lane;
          if (token <= position && token >= oldest) seen |= 1 << lane;
        }
        scores[r][v] = _mm512_mask_blend_ps(seen, _mm512_set1_ps(kUnseen), scores[r][v]);
      }
      most = _mm512_max_ps(most, scores[r][v]);
    }
    const float before = tile.best[row + r];
    const float best = std::max(before, _mm512_reduce_max_ps(most));
    // Where nothing was seen yet, weights come out as 1 and are forgotten by the first real score.
    __m512 sum = _mm512_setzero_ps();
    for (auto& vector : scores[r]) {
      vector = powers_of_two(_mm512_sub_ps(vector, _mm512_set1_ps(best)));
      sum = _mm512_add_ps(sum, vector);
    }
    for (Index v = 0; v < kSeen; ++v)
      write_weights(scores[r][v], &weights[r][v * kLanes / kPaired]);
    fade[r] = power_of_two(before - best);
    tile.best[row + r] = best;
    tile.sum[row + r] = tile.sum[row + r] * fade[r] + _mm512_reduce_add_ps(sum);
  }
  for (Index d = 0; d < dim; d += kTokens)
    add_values<kCount, kSeen>(weights[0], &tile.values[d], dim, fade, &tile.out[row * dim + d]);
}

using AttendBlock = void (*)(Tile&, Index, Index, Index, float, Index);

// By rows and vectors of tokens, less one of each.
constexpr AttendBlock kAttendBlocks[kSharing][kVectors] = {
    {attend_block<1, 1>, attend_block<1, 2>, attend_block<1, 3>, attend_block<1, 4>},
    {attend_block<2, 1>, attend_block<2, 2>, attend_block<2, 3>, attend_block<2, 4>},
    {attend_block<3, 1>, attend_block<3, 2>, attend_block<3, 3>, attend_block<3, 4>},
    {attend_block<4, 1>, attend_block<4, 2>, attend_block<4, 3>, attend_block<4, 4>}};

// Write the mean of the values that a tile row weighed.
void finish(const Tile& tile, Index row, Index dim, Bfloat16* out) {
  const __m512 factor = _mm512_set1_ps(1 / tile.sum[row]);
  for (Index d = 0; d < dim; d += kLanes) {
    const __m512 values = _mm512_loadu_ps(&tile.out[row * dim + d]);
    store(rounded(_mm512_mul_ps(values, factor)), out + d);
  }
}

// A tile's place in a step.
struct Item {
  Index sequence, kv_head, row, rows;  // `row` counts from the sequence's first one
};

}  // namespace

// As attend_rows, where sequence i has the rows from starts[i] to starts[i + 1]: the last ones of
// its lengths[i] tokens, each of which sees the tokens up to its own. There is no soft-capping, and
// dim comes in multiples of kTokens.
extern "C" void attend_chunks(const Bfloat16* query, Index query_row, Index query_head,
                              const Bfloat16* key, Index key_row, Index key_head,
                              const Bfloat16* value, Index value_row, Index value_head,
                              Bfloat16* out, Index heads, float scaling, Index window,
                              const Pages* pages, Index sequences, const Index* slots,
                              const std::int32_t* table, const Index* table_starts,
                              const Index* lengths, const Index* starts) {
  write({key, key_row, key_head}, pages->keys, *pages, slots, starts[sequences]);
  write({value, value_row, value_head}, pages->values, *pages, slots, starts[sequences]);
  const Index dim = pages->dim, shared = heads / pages->kv_heads;
  const Index most = std::max<Index>(1, kTileRows / shared);
  const float factor = scaling * 1.4426950408889634f;  // scores as powers of two
#ifdef __AVX512BF16__
  if (starts[sequences] == sequences) {
    std::vector<Sequence> rows;
    for (Index row = 0; row < sequences; ++row) {
      const Index end = lengths[row], first = window > 0 ? std::max<Index>(0, end - window) : 0;
      rows.push_back({table + table_starts[row], first, end});
    }
    attend_single_rows({query, query_row, query_head}, out, heads, factor, *pages, rows);
    return;
  }
#endif
  std::vector<Item> items;
  Index elements = 0;
  for (Index sequence = 0; sequence < sequences; ++sequence) {
    const Index count = starts[sequence + 1] - starts[sequence];
    elements += count * lengths[sequence] * pages->kv_heads * dim;
    for (Index row = (count - 1) / most * most; row >= 0; row -= most)  // the longest first
      for (Index kv_head = 0; kv_head < pages->kv_heads; ++kv_head)
        items.push_back({sequence, kv_head, row, std::min(most, count - row)});
  }
#pragma omp parallel for schedule(dynamic) if (elements >= kSerialPairs)
  for (std::size_t i = 0; i < items.size(); ++i) {
    const Item& item = items[i];
    const Index first = starts[item.sequence] + item.row, head = item.kv_head * shared;
    const Index count = starts[item.sequence + 1] - starts[item.sequence];
    static thread_local Tile tile;
    tile.begin(item.rows, shared, lengths[item.sequence] - count + item.row, dim);
    for (Index row = 0; row < item.rows; ++row)
      for (Index h = 0; h < shared; ++h)
        write_factors(query + (first + row) * query_row + (head + h) * query_head, dim,
                      &tile.query[(row * shared + h) * dim / kPaired]);
    const Index end = tile.first + item.rows;
    const Index oldest = window > 0 ? std::max<Index>(0, tile.first - window + 1) : 0;
    for (Index at = oldest / kLanes * kLanes; at < end; at += kTokens) {
      pack(tile, *pages, table + table_starts[item.sequence], at, end, item.kv_head);
      for (Index row = 0, rows; row < tile.count(); row += rows) {
        rows = std::min(kSharing, tile.count() - row);
        const Index last = tile.position(row + rows - 1);
        if (at > last) continue;
        const Index seen = std::min(kVectors, (last - at) / kLanes + 1);
        kAttendBlocks[rows - 1][seen - 1](tile, row, at, dim, factor, window);
      }
    }
    for (Index row = 0; row < item.rows; ++row)
      for (Index h = 0; h < shared; ++h)
        finish(tile, row * shared + h, dim, out + ((first + row) * heads + head + h) * dim);
  }
}
