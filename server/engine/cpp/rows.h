// Attention of single rows, in any form, and what attention over pages has in common.

#pragma once

#include "numbers.h"

namespace {

constexpr Index kBlock = 16;  // tokens whose keys or values are expanded to float at one time
constexpr Index kSerial = 1 << 18;  // key elements below which a second thread costs more
constexpr Index kSerialPairs = 1 << 15;  // the same by products of pairs
constexpr float kUnseen = -1e30f;  // a score
constexpr Index kLine = 32;  // numbers that come from memory together

inline float dot(const float* a, const float* b, Index count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (Index i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
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
