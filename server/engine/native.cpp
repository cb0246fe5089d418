// What a step on a CPU computes, as single calls: attention over bfloat16 pages, of single rows and
// of prompt chunks, a head's product with weights in eight bits, what stands in a dropped sublayer's
// place with maps in eight bits, and layers' products with weights in four. For AVX-512; native.py
// compiles and calls this file. The last one is called by the compiled functions of ahead.py,
// through torch's stable C interface.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Bfloat16 = std::uint16_t;
using Index = std::int64_t;

constexpr Index kBlock = 16;  // tokens whose keys or values are expanded to float at one time
constexpr Index kOutputs = 4;  // computed side by side, so that sums do not wait for each other
constexpr Index kAhead = 4608;  // bytes that are asked for before they are needed
constexpr Index kSerial = 1 << 18;  // key elements below which a second thread costs more

inline float expanded(Bfloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline Bfloat16 rounded(float number) {  // to nearest, ties to even
  std::uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  if (number != number) return 0x7fc0;
  return static_cast<Bfloat16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// 2^f for |f| <= 0.5, from f^6 on, with a relative error below 2e-7: Cephes' polynomial.
constexpr float kPower[] = {1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f,
                            5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f,
                            1.0f};
constexpr int kPowers = sizeof kPower / sizeof kPower[0];
constexpr float kLeast = -126.0f;  // below, 2^x is no normal number

// 2^x, for x <= 0.
inline float power_of_two(float x) {
  x = std::max(x, kLeast);
  const float whole = static_cast<float>(static_cast<std::int32_t>(x - 0.5f));
  const float f = x - whole;
  float p = kPower[0];
#pragma GCC unroll 8
  for (int i = 1; i < kPowers; ++i) p = p * f + kPower[i];
  const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<std::int32_t>(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

constexpr Index kLanes = 16;

inline float dot(const float* a, const float* b, Index count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (Index i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

void expand(const Bfloat16* from, Index stride, Index rows, Index width, float* to) {
  for (Index row = 0; row < rows; ++row) {
#pragma omp simd
    for (Index i = 0; i < width; ++i) to[row * width + i] = expanded(from[row * stride + i]);
  }
}

// Query, key or value rows, [rows, heads, dim].
struct Rows {
  const Bfloat16* numbers;
  Index row_stride, head_stride;
};

struct Form {
  Index heads;
  float scaling, softcap;  // no softcap: 0
  Index window;            // sees everything: 0
};

// One layer's pages: [pages, tokens, kv_heads, dim], where a token's heads lie side by side.
struct Pages {
  Bfloat16 *keys, *values;
  Index page_stride, tokens, kv_heads, dim;
};

struct Sequence {
  const std::int32_t* table;
  Index first, end;  // tokens that the row sees
};

// What one thread needs to attend with the query heads of one key head.
struct Scratch {
  std::vector<float> query, expanded, scores, out, best, sum;

  Scratch(Index heads, Index dim)
      : query(heads * dim), expanded(kBlock * dim), scores(heads * kBlock), out(heads * dim),
        best(heads, -1e30f), sum(heads, 0.0f) {}
};

// Softmax in one pass (Milakov and Gimelshein, arXiv 1805.02867), in powers of two.
void add_scores(Scratch& s, Index head, Index tokens, Index dim) {
  float* scores = &s.scores[head * kBlock];
  float best = s.best[head];
  for (Index t = 0; t < tokens; ++t) best = std::max(best, scores[t]);
  const float before = power_of_two(s.best[head] - best);
  float sum = s.sum[head] * before;
  float* out = &s.out[head * dim];
#pragma omp simd reduction(+ : sum)
  for (Index t = 0; t < tokens; ++t) {
    scores[t] = power_of_two(scores[t] - best);
    sum += scores[t];
  }
#pragma omp simd
  for (Index i = 0; i < dim; ++i) out[i] *= before;
  s.best[head] = best;
  s.sum[head] = sum;
}

void add_values(Scratch& s, Index head, Index tokens, Index dim) {
  float* out = &s.out[head * dim];
  for (Index t = 0; t < tokens; ++t) {
    const float weight = s.scores[head * kBlock + t];
    const float* value = &s.expanded[t * dim];
#pragma omp simd
    for (Index i = 0; i < dim; ++i) out[i] += weight * value[i];
  }
}

// A score as a power of two.
inline float score(float product, const Form& form) {
  float scaled = product * form.scaling;
  if (form.softcap > 0) scaled = form.softcap * std::tanh(scaled / form.softcap);
  return scaled * 1.4426950408889634f;  // log2(e)
}

// Attend with the query heads that share one key head, from `query` on; out is [heads, dim].
void attend(const Form& form, const Pages& pages, const Sequence& sequence, Index kv_head,
            const Bfloat16* query, Index query_stride, Bfloat16* out) {
  const Index dim = pages.dim, token_stride = pages.kv_heads * dim;
  const Index heads = form.heads / pages.kv_heads;
  Scratch s(heads, dim);
  expand(query, query_stride, heads, dim, s.query.data());
  for (Index first = sequence.first, count; first < sequence.end; first += count) {
    const Index place = first % pages.tokens;
    count = std::min({kBlock, pages.tokens - place, sequence.end - first});
    const Index at = sequence.table[first / pages.tokens] * pages.page_stride +
                     place * token_stride + kv_head * dim;
    expand(pages.keys + at, token_stride, count, dim, s.expanded.data());
    for (Index head = 0; head < heads; ++head)
      for (Index t = 0; t < count; ++t)
        s.scores[head * kBlock + t] =
            score(dot(&s.query[head * dim], &s.expanded[t * dim], dim), form);
    expand(pages.values + at, token_stride, count, dim, s.expanded.data());
    for (Index head = 0; head < heads; ++head) {
      add_scores(s, head, count, dim);
      add_values(s, head, count, dim);
    }
  }
  for (Index head = 0; head < heads; ++head)
    for (Index i = 0; i < dim; ++i)
      out[head * dim + i] = rounded(s.out[head * dim + i] / s.sum[head]);
}

void write(const Rows& rows, Bfloat16* pages, const Pages& form, const Index* slots, Index count) {
  for (Index row = 0; row < count; ++row) {
    Bfloat16* token = pages + slots[row] / form.tokens * form.page_stride +
                      slots[row] % form.tokens * form.kv_heads * form.dim;
    for (Index head = 0; head < form.kv_heads; ++head)
      std::memcpy(token + head * form.dim,
                  rows.numbers + row * rows.row_stride + head * rows.head_stride,
                  form.dim * sizeof(Bfloat16));
  }
}

}  // namespace

// Write each row's key and value into its slot, then attend with each row over its sequence, of
// which it sees the last `window` tokens (0: all). Rows are [rows, heads, dim] of these strides;
// out has none. Sequence i has lengths[i] tokens and its pages at table_starts[i] of `table`.
extern "C" void attend_rows(const Bfloat16* query, Index query_row, Index query_head,
                            const Bfloat16* key, Index key_row, Index key_head,
                            const Bfloat16* value, Index value_row, Index value_head,
                            Bfloat16* out, Index heads, float scaling, float softcap, Index window,
                            const Pages* pages, Index rows, const Index* slots,
                            const std::int32_t* table, const Index* table_starts,
                            const Index* lengths) {
  write({key, key_row, key_head}, pages->keys, *pages, slots, rows);
  write({value, value_row, value_head}, pages->values, *pages, slots, rows);
  const Form form{heads, scaling, softcap, window};
  const Index kv_heads = pages->kv_heads, shared = heads / kv_heads;
  const auto one = [&](Index item) {
    const Index row = item / kv_heads, kv_head = item % kv_heads, length = lengths[row];
    const Index first = window > 0 && window < length ? length - window : 0;
    attend(form, *pages, {table + table_starts[row], first, length}, kv_head,
           query + row * query_row + kv_head * shared * query_head, query_head,
           out + (row * heads + kv_head * shared) * pages->dim);
  };
  Index elements = 0;
  for (Index row = 0; row < rows; ++row) elements += lengths[row] * kv_heads * pages->dim;
  if (elements < kSerial) {
    for (Index item = 0; item < rows * kv_heads; ++item) one(item);
    return;
  }
#pragma omp parallel for schedule(dynamic)
  for (Index item = 0; item < rows * kv_heads; ++item) one(item);
}

#ifdef __AVX512BF16__

namespace {

constexpr Index kTokens = 64;  // whose scores of a row are in registers at one time
constexpr Index kSharing = 4;  // rows that share what is read of keys and values
constexpr Index kVectors = kTokens / kLanes;
constexpr Index kTileRows = 192;  // rows times heads of a tile
constexpr float kUnseen = -1e30f;
constexpr Index kLine = 32;  // numbers that come from memory together
constexpr Index kSerialPairs = 1 << 15;  // as kSerial

// Two numbers in bfloat16 that are multiplied at one time.
using Pair = std::uint32_t;

inline __m512bh pairs(const void* place) { return (__m512bh)_mm512_loadu_si512(place); }

inline __m512bh repeated(Pair pair) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)); }

// 2^x for x <= 0, as above.
inline __m512 powers_of_two(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(kLeast));
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(kPower[0]);
  for (int i = 1; i < kPowers; ++i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kPower[i]));
  return _mm512_scalef_ps(p, whole);
}

// Rows of one sequence that one thread attends with the query heads of one key head: tile row
// row * heads + head. Position `first` is that of its first row. Kept from tile to tile.
struct Tile {
  Index rows, heads, first;
  std::vector<Pair> query;  // [tile rows, dim / 2]
  std::vector<float> out, best, sum;
  std::vector<Pair> keys, values;  // [dim / 2, kTokens], [kTokens / 2, dim]

  void begin(Index its_rows, Index its_heads, Index its_first, Index dim) {
    rows = its_rows;
    heads = its_heads;
    first = its_first;
    query.resize(count() * dim / 2);
    out.assign(count() * dim, 0.0f);
    best.assign(count(), kUnseen);
    sum.assign(count(), 0.0f);
    keys.resize(dim / 2 * kTokens);
    values.resize(kTokens / 2 * dim);
  }

  Index count() const { return rows * heads; }
  Index position(Index tile_row) const { return first + tile_row / heads; }
};

// Write the first rows, those in `mask`, of 16 rows of 16 pairs as columns, `stride` pairs apart.
inline void transpose(const Bfloat16* const* rows, Pair* to, Index stride, __mmask16 mask) {
  const auto write = [=](int column, __m512i pairs) {
    _mm512_mask_storeu_epi32(to + column * stride, mask, pairs);
  };
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

// Write two rows of numbers as pairs.
inline void pair_up(const Bfloat16* one, const Bfloat16* two, Index width, Pair* to) {
  const auto wide = [](const Bfloat16* place) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(place)));
  };
  for (Index i = 0; i < width; i += kLanes)
    _mm512_storeu_si512(to + i,
                        _mm512_or_si512(wide(one + i), _mm512_slli_epi32(wide(two + i), 16)));
}

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
      pair_up(values[i], values[i + 1], dim, &tile.values[(t + i) / 2 * dim]);
    for (Index d = 0; d < dim / 2; d += kLanes) {
      transpose(keys, &tile.keys[d * kTokens + t], kTokens, 0xffff);
      for (Index i = 0; i < kLanes; ++i) keys[i] += 2 * kLanes;
    }
  }
}

// Attend with kCount rows of a tile, from `row` on, over kSeen times kLanes packed tokens, the first
// of which is `at`.
template <int kCount, int kSeen>
void attend_block(Tile& tile, Index row, Index at, Index dim, float factor, Index window) {
  const Index half = dim / 2;
  __m512 scores[kCount][kSeen];
  for (auto& own : scores)
    for (auto& vector : own) vector = _mm512_setzero_ps();
  const Pair* query = &tile.query[row * half];
  for (Index d = 0; d < half; ++d) {
    __m512bh keys[kSeen];
    for (Index v = 0; v < kSeen; ++v) keys[v] = pairs(&tile.keys[d * kTokens + v * kLanes]);
    for (Index r = 0; r < kCount; ++r) {
      const __m512bh q = repeated(query[r * half + d]);
      for (Index v = 0; v < kSeen; ++v)
        scores[r][v] = _mm512_dpbf16_ps(scores[r][v], q, keys[v]);
    }
  }
  alignas(64) Pair weights[kCount][kTokens / 2];
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
    for (Index v = 0; v < kSeen; ++v) {
      const __m256bh numbers = _mm512_cvtneps_pbh(scores[r][v]);
      std::memcpy(&weights[r][v * kLanes / 2], &numbers, sizeof numbers);
    }
    fade[r] = power_of_two(before - best);
    tile.best[row + r] = best;
    tile.sum[row + r] = tile.sum[row + r] * fade[r] + _mm512_reduce_add_ps(sum);
  }
  for (Index d = 0; d < dim; d += kVectors * kLanes) {
    __m512 out[kCount][kVectors];
    for (Index r = 0; r < kCount; ++r)
      for (Index v = 0; v < kVectors; ++v)
        out[r][v] = _mm512_mul_ps(_mm512_loadu_ps(&tile.out[(row + r) * dim + d + v * kLanes]),
                                  _mm512_set1_ps(fade[r]));
    for (Index t = 0; t < kSeen * kLanes / 2; ++t) {
      __m512bh values[kVectors];
      for (Index v = 0; v < kVectors; ++v) values[v] = pairs(&tile.values[t * dim + d + v * kLanes]);
      for (Index r = 0; r < kCount; ++r) {
        const __m512bh weight = repeated(weights[r][t]);
        for (Index v = 0; v < kVectors; ++v)
          out[r][v] = _mm512_dpbf16_ps(out[r][v], weight, values[v]);
      }
    }
    for (Index r = 0; r < kCount; ++r)
      for (Index v = 0; v < kVectors; ++v)
        _mm512_storeu_ps(&tile.out[(row + r) * dim + d + v * kLanes], out[r][v]);
  }
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
    const __m256bh numbers = _mm512_cvtneps_pbh(_mm512_mul_ps(values, factor));
    std::memcpy(out + d, &numbers, sizeof numbers);
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
        std::memcpy(&tile.query[(row * shared + h) * dim / 2],
                    query + (first + row) * query_row + (head + h) * query_head,
                    dim * sizeof(Bfloat16));
    const Index end = tile.first + item.rows;
    const Index oldest = window > 0 ? std::max<Index>(0, tile.first - window + 1) : 0;
    for (Index at = oldest / kLanes * kLanes; at < end; at += kTokens) {
      pack(tile, *pages, table + table_starts[item.sequence], at, end, item.kv_head);
      const Index seen = std::min(kVectors, (end - at + kLanes - 1) / kLanes);
      for (Index row = 0, rows; row < tile.count(); row += rows) {
        rows = std::min(kSharing, tile.count() - row);
        if (at <= tile.position(row + rows - 1))
          kAttendBlocks[rows - 1][seen - 1](tile, row, at, dim, factor, window);
      }
    }
    for (Index row = 0; row < item.rows; ++row)
      for (Index h = 0; h < shared; ++h)
        finish(tile, row * shared + h, dim, out + ((first + row) * heads + head + h) * dim);
  }
}

#endif

namespace {

#ifdef __AVX512VNNI__

constexpr Index kBytes = 64;  // levels that are multiplied at one time
constexpr Index kMostTogether = 4;  // rows that share one pass over the levels
constexpr Index kEightBitRows = 16;

// Rows of bfloat16 numbers as integers of 16 bits, of one step a row: 6 times as exact, for numbers
// that are not much smaller than their row's largest. An integer is 256 * high + low, both of 8
// bits, for products of 8 bits, whose other factor has no sign: 128 is added to levels and taken
// back with the sums of high and low.
struct Integers {
  Index padded;  // width
  std::vector<std::int8_t> high, low;  // [rows, padded]
  std::vector<float> steps;            // [rows]
  std::vector<std::int32_t> shifts;    // [rows, 2]: 128 times the sums of high and low

  Integers(const Bfloat16* numbers, Index rows, Index width)
      : padded((width + kBytes - 1) / kBytes * kBytes), high(rows * padded), low(rows * padded),
        steps(rows), shifts(rows * 2) {
    for (Index row = 0; row < rows; ++row) fill(numbers + row * width, row, width);
  }

 private:
  void fill(const Bfloat16* numbers, Index row, Index width) {
    float most = 0;
#pragma omp simd reduction(max : most)
    for (Index i = 0; i < width; ++i) most = std::max(most, std::abs(expanded(numbers[i])));
    steps[row] = most / 32512;  // 127 * 256
    const float factor = most > 0 ? 1 / steps[row] : 0;
    std::int32_t highs = 0, lows = 0;
#pragma omp simd reduction(+ : highs, lows)
    for (Index i = 0; i < width; ++i) {
      const auto whole = static_cast<std::int32_t>(std::nearbyint(expanded(numbers[i]) * factor));
      const auto lower = static_cast<std::int8_t>(whole);
      const auto upper = static_cast<std::int8_t>((whole - lower) >> 8);
      low[row * padded + i] = lower;
      high[row * padded + i] = upper;
      lows += lower;
      highs += upper;
    }
    shifts[row * 2] = 128 * highs;
    shifts[row * 2 + 1] = 128 * lows;
  }
};

// The sums of 16 vectors, in order.
inline __m512i sums_of(const __m512i* vectors) {
  __m512i sums[kLanes];
  for (int i = 0; i < 8; ++i) {
    const __m512i a = vectors[2 * i], b = vectors[2 * i + 1];
    sums[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = sums[2 * i], b = sums[2 * i + 1];
    sums[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  for (int count = 2; count; count /= 2)
    for (int i = 0; i < count; ++i) {
      const __m512i a = sums[2 * i], b = sums[2 * i + 1];
      sums[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88),
                                 _mm512_shuffle_i32x4(a, b, 0xDD));
    }
  return sums[0];
}

// The products of kCount rows, from `row` on, with kOut outputs.
template <int kCount, int kOut>
void eight_bit_block(const Integers& inputs, Index row, Index width, const std::int8_t* levels,
                     const Bfloat16* scales, Index outputs, Bfloat16* out) {
  static_assert(kCount * kOut <= 8);
  const __m512i sign = _mm512_set1_epi8(-128);
  const std::int8_t* high = &inputs.high[row * inputs.padded];
  const std::int8_t* low = &inputs.low[row * inputs.padded];
  __m512i highs[kCount][kOut], lows[kCount][kOut];
  for (int r = 0; r < kCount; ++r)
    for (int o = 0; o < kOut; ++o) highs[r][o] = lows[r][o] = _mm512_setzero_si512();
  for (Index i = 0; i < width; i += kBytes) {
    const __mmask64 mask = width - i < kBytes ? (__mmask64{1} << (width - i)) - 1 : ~__mmask64{0};
    __m512i factors[kOut];
#pragma GCC unroll 4
    for (int o = 0; o < kOut; ++o) {
      const std::int8_t* place = levels + o * width + i;
      _mm_prefetch(place + kAhead, _MM_HINT_T0);
      factors[o] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, place), sign);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const __m512i first = _mm512_loadu_si512(high + r * inputs.padded + i);
      const __m512i second = _mm512_loadu_si512(low + r * inputs.padded + i);
#pragma GCC unroll 4
      for (int o = 0; o < kOut; ++o) {
        highs[r][o] = _mm512_dpbusd_epi32(highs[r][o], factors[o], first);
        lows[r][o] = _mm512_dpbusd_epi32(lows[r][o], factors[o], second);
      }
    }
  }
  __m512i sums[2][8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const bool is = i < kCount * kOut;
    sums[0][i] = is ? highs[i % kCount][i / kCount % kOut] : _mm512_setzero_si512();
    sums[1][i] = is ? lows[i % kCount][i / kCount % kOut] : _mm512_setzero_si512();
  }
  alignas(64) std::int32_t totals[2][8];
  _mm512_store_si512(totals, sums_of(sums[0]));
  for (int r = 0; r < kCount; ++r) {
    const std::int32_t* shifts = &inputs.shifts[(row + r) * 2];
    for (int o = 0; o < kOut; ++o) {
      const float above = static_cast<float>(totals[0][o * kCount + r] - shifts[0]);
      const float below = static_cast<float>(totals[1][o * kCount + r] - shifts[1]);
      out[(row + r) * outputs + o] =
          rounded((256 * above + below) * inputs.steps[row + r] * expanded(scales[o]));
    }
  }
}

void eight_bit_outputs(const Integers& inputs, Index rows, Index width, const std::int8_t* levels,
                       const Bfloat16* scales, Index outputs, Bfloat16* out) {
  Index blocks = (rows + kMostTogether - 1) / kMostTogether;
  for (Index row = 0, count; row < rows; row += count, --blocks) {
    count = (rows - row + blocks - 1) / blocks;
    const auto call = [&](auto block, int each) {
      for (Index o = 0; o < kOutputs; o += each)
        block(inputs, row, width, levels + o * width, scales + o, outputs, out + o);
    };
    if (count == 1) call(eight_bit_block<1, 4>, 4);
    if (count == 2) call(eight_bit_block<2, 4>, 4);
    if (count == 3) call(eight_bit_block<3, 2>, 2);
    if (count == 4) call(eight_bit_block<4, 2>, 2);
  }
}

#else

constexpr Index kEightBitRows = 4;

// Rows of numbers [rows, width].
struct Floats {
  std::vector<float> numbers;

  Floats(const Bfloat16* from, Index rows, Index width) : numbers(rows * width) {
    expand(from, width, rows, width, numbers.data());
  }
};
using Integers = Floats;

void eight_bit_outputs(const Floats& inputs, Index rows, Index width, const std::int8_t* levels,
                       const Bfloat16* scales, Index outputs, Bfloat16* out) {
  for (Index row = 0; row < rows; ++row) {
    const float* input = &inputs.numbers[row * width];
    __m512 sums[kOutputs];
    for (Index o = 0; o < kOutputs; ++o) sums[o] = _mm512_setzero_ps();
    for (Index i = 0; i < width; i += kLanes) {
      const __m512 x = _mm512_loadu_ps(input + i);
      for (Index o = 0; o < kOutputs; ++o) {
        const std::int8_t* place = levels + o * width + i;
        _mm_prefetch(place + kAhead, _MM_HINT_T0);
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(place));
        sums[o] = _mm512_fmadd_ps(x, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), sums[o]);
      }
    }
    for (Index o = 0; o < kOutputs; ++o)
      out[row * outputs + o] = rounded(_mm512_reduce_add_ps(sums[o]) * expanded(scales[o]));
  }
}

#endif

}  // namespace

// The rows up to which it is faster than torch's functions.
extern "C" const Index eight_bit_rows = kEightBitRows;

// out [rows, outputs] = inputs [rows, width] * levels [outputs, width]^T * scales [outputs], where
// outputs come in multiples of kOutputs and width, below 2^16, in multiples of kLanes.
extern "C" void eight_bit_product(const Bfloat16* inputs, const std::int8_t* levels,
                                  const Bfloat16* scales, Bfloat16* out, Index rows, Index outputs,
                                  Index width) {
  const Integers numbers(inputs, rows, width);
#pragma omp parallel for schedule(static)
  for (Index output = 0; output < outputs; output += kOutputs)
    eight_bit_outputs(numbers, rows, width, levels + output * width, scales + output, outputs,
                      out + output);
}

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
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (Index i = 0; i < width; ++i) squares += expanded(hidden[i]) * expanded(hidden[i]);
  const float factor = 1 / std::sqrt(squares / width + s.epsilon);
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

#ifdef __AVX512BF16__

namespace {

constexpr Index kGroup = 32;  // inputs that share a scale and a zero
constexpr Index kColumns = 64;  // outputs that torch packs together, in four vectors
constexpr Index kRows = 8;  // rows that share one pass over half of the vectors
constexpr Index kFewRows = 6;  // rows that share one pass over all of them

// Rows of inputs that share a pass.
struct Shared {
  const Pair* pairs;  // [width / 2, rows]
  const float* sums;  // of inputs, [groups, rows]
};

// Write up to 16 rows [rows, width] as pairs of inputs side by side, and their groups' sums.
void share(const Bfloat16* inputs, Index rows, Index width, Pair* pairs, float* sums) {
  const Bfloat16* places[kLanes];
  for (Index i = 0; i < kLanes; ++i) places[i] = inputs + std::min(i, rows - 1) * width;
  const auto mask = static_cast<__mmask16>((1 << rows) - 1);
  const __m512bh ones = repeated(0x3f803f80);
  for (Index k = 0; k < width; k += kGroup, sums += rows) {
    transpose(places, pairs, rows, mask);
    for (const Bfloat16*& place : places) place += kGroup;
    __m512 sum = _mm512_setzero_ps();
    for (Index i = 0; i < kGroup / 2; ++i, pairs += rows)
      sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi32(mask, pairs), ones);
    _mm512_mask_storeu_ps(sums, mask, sum);
  }
}

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

// The product of kCount rows with the outputs of the vectors from kFirst to kEnd. A level q is put
// into the bfloat16 number 128 + q, whose last bits are q; the 128 is taken back with the sum of
// the inputs:
//   sum x * ((q - 8) * scale + zero) = scale * sum x * (128 + q) + (zero - 136 * scale) * sum x
template <int kCount, int kFirst, int kEnd>
void four_bit_block(const Shared& inputs, const Columns& columns, Bfloat16* out) {
  constexpr int kVectors = kEnd - kFirst;
  const __m512i nibble = _mm512_set1_epi16(0x000f), base = _mm512_set1_epi16(0x4300);
  const Index groups = columns.width / kGroup, outputs = columns.outputs;
  alignas(64) float totals[kCount][kVectors][kLanes] = {};
  for (Index group = 0; group < groups; ++group) {
    __m512 parts[kCount][kVectors];
    for (auto& row : parts)
      for (__m512& part : row) part = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (Index k = group * kGroup / 2; k < (group + 1) * kGroup / 2; ++k) {
      const std::uint8_t* place = columns.packed + k * kColumns;
      _mm_prefetch(place + kAhead, _MM_HINT_T0);
      const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place));
      const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place) + 1);
      const __m512i bytes[] = {_mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(one, two)),
                               _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(one, two))};
      __m512bh levels[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i)
        levels[i] = (__m512bh)(kFirst + i < 2
                                   ? _mm512_ternarylogic_epi32(bytes[i % 2], nibble, base,
                                                               0xEA)  // (a & b) | c
                                   : _mm512_or_si512(_mm512_srli_epi16(bytes[i % 2], 4), base));
#pragma GCC unroll 12
      for (int row = 0; row < kCount; ++row) {
        const __m512bh pair = repeated(inputs.pairs[k * kCount + row]);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i)
          parts[row][i] = _mm512_dpbf16_ps(parts[row][i], levels[i], pair);
      }
    }
    const Bfloat16* pairs = columns.scales + group * outputs * 2;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const Bfloat16* two = pairs + (kFirst + i) / 2 * kColumns;
      _mm_prefetch(two + 2 * kColumns + i % 2 * kColumns / 2, _MM_HINT_T0);
      const __m512i both = _mm512_castps_si512(
          halves(_mm512_loadu_ps(two), _mm512_loadu_ps(two + kColumns / 2), i % 2));
      const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      const __m512 zero =
          _mm512_castsi512_ps(_mm512_andnot_si512(_mm512_set1_epi32(0xffff), both));
      const __m512 shift = _mm512_fnmadd_ps(_mm512_set1_ps(136.0f), scale, zero);
#pragma GCC unroll 12
      for (int row = 0; row < kCount; ++row) {
        const __m512 sum = _mm512_set1_ps(inputs.sums[group * kCount + row]);
        const __m512 total = _mm512_fmadd_ps(scale, parts[row][i],
                                             _mm512_load_ps(totals[row][i]));
        _mm512_store_ps(totals[row][i], _mm512_fmadd_ps(shift, sum, total));
      }
    }
  }
  for (int row = 0; row < kCount; ++row)
    for (int i = 0; i < kVectors; ++i) {
      const auto* two = totals[row][i / 2 * 2];
      const __m256bh numbers = _mm512_cvtneps_pbh(
          halves(_mm512_load_ps(two), _mm512_load_ps(two + kLanes), i % 2));
      std::memcpy(out + row * outputs + (kFirst + i) * kLanes, &numbers, sizeof numbers);
    }
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

// out [rows, outputs] = inputs [rows, width] * weights, as torch packs them for its own kernel.
void four_bit_product(const Bfloat16* inputs, const std::uint8_t* packed, const Bfloat16* scales,
                      Bfloat16* out, Index rows, Index outputs, Index width) {
  const Index groups = width / kGroup, parts = rows <= kFewRows ? 1 : 2;
  const Index passes = (rows + kRows - 1) / kRows;
  std::vector<Pair> pairs(rows * width / 2);
  std::vector<float> sums(rows * groups);
  const auto first_row = [&](Index pass) { return pass * rows / passes; };
  for (Index pass = 0; pass < passes; ++pass) {
    const Index first = first_row(pass);
    share(inputs + first * width, first_row(pass + 1) - first, width, &pairs[first * width / 2],
          &sums[first * groups]);
  }
#pragma omp parallel for schedule(static)
  for (Index item = 0; item < outputs / kColumns * parts; ++item) {
    const Index column = item / parts * kColumns;
    const Columns columns{packed + column * width / 2, scales + column * 2, width, outputs};
    const Block* blocks = parts == 1 ? kWhole : item % parts ? kHalf<2, 4> : kHalf<0, 2>;
    for (Index pass = 0; pass < passes; ++pass) {
      const Index first = first_row(pass), count = first_row(pass + 1) - first;
      blocks[count - 1]({&pairs[first * width / 2], &sums[first * groups]}, columns,
                        out + first * outputs + column);
    }
  }
}

}  // namespace

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

// inputs are [rows, width] and scales [width / kGroup, outputs, 2], all contiguous; outputs come in
// multiples of kColumns, since torch packs what is left over in another order.
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
