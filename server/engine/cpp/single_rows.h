// Attention of single rows, without soft-capping, by products of bfloat16 pairs with keys and values
// where they lie, for heads whose dimension is a multiple of kSpan.
//
// A thread reads its tokens in order, all of its key heads of a token together, and asks for those
// kAskedTokens later to come into the second-level cache, where more can be on their way: asking for
// them into the first one is no better than not asking.

#pragma once

#include "pairs.h"
#include "rows.h"

#ifdef __AVX512BF16__

#include <omp.h>

namespace {

constexpr Index kPiece = 32;  // tokens whose values are weighed at one time
constexpr Index kTogetherTokens = 4;  // tokens whose keys are multiplied at one time
constexpr Index kAskedTokens = 32;
constexpr Index kSpan = 64;  // numbers of a head whose sums are in registers
constexpr Index kSharingHeads = 4;  // query heads that share what is read of keys and values

// Some key heads of a row.
struct Share {
  Index row, first, count;
  Sequence sequence;
};

// Where a sequence's tokens lie in keys and in values, one after the other.
class Places {
 public:
  Places(const Pages& pages, const Sequence& sequence, Index token, Index kv_head)
      : table_(sequence.table + token / pages.tokens), page_stride_(pages.page_stride),
        width_(pages.kv_heads * pages.dim), tokens_(pages.tokens), first_(kv_head * pages.dim),
        at_(token % pages.tokens) {}

  Index next() {
    const Index place = *table_ * page_stride_ + at_ * width_ + first_;
    if (++at_ == tokens_) {
      at_ = 0;
      ++table_;
    }
    return place;
  }

 private:
  const std::int32_t* table_;
  Index page_stride_, width_, tokens_, first_, at_;
};

// Asks for the keys and values of a thread's shares, in the order in which it reads them.
class Ahead {
 public:
  Ahead(const Pages& pages, const std::vector<Share>& shares)
      : pages_(pages), share_(shares.data()), end_(share_ + shares.size()) {}

  void ask(Index tokens) {
    while (tokens > 0 && share_ < end_) {
      const Sequence& sequence = share_->sequence;
      const Index first = sequence.first + done_;
      const Index count = std::min(tokens, sequence.end - first);
      Places places(pages_, sequence, first, share_->first);
      for (Index t = 0; t < count; ++t) ask_at(places.next(), share_->count * pages_.dim);
      tokens -= count;
      done_ += count;
      if (first + count < sequence.end) continue;
      ++share_;
      done_ = 0;
    }
  }

 private:
  void ask_at(Index place, Index numbers) const {
    for (Index i = 0; i < numbers; i += kLine) {
      _mm_prefetch(pages_.keys + place + i, _MM_HINT_T1);
      _mm_prefetch(pages_.values + place + i, _MM_HINT_T1);
    }
  }

  const Pages& pages_;
  const Share *share_, *end_;
  Index done_ = 0;  // tokens of the share
};

inline __m512bh pairs_at(const Bfloat16* place) { return (__m512bh)_mm512_loadu_si512(place); }

// In each quarter one number of each of four vectors: those of one vector add up to its sum.
inline __m512 quartered(const __m512* v) {
  const __m512 one = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 two = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d a = _mm512_castps_pd(one), b = _mm512_castps_pd(two);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}

// The sums of the first two and of the last two quarters of one vector, then of another.
inline __m512 halved(__m512 one, __m512 other) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(one, other, 0x88),
                       _mm512_shuffle_f32x4(one, other, 0xDD));
}

// The sums of 16 vectors, of which each four were quartered.
inline __m512 sums_of(const float* quarters) {
  const auto part = [=](Index i) { return _mm512_load_ps(quarters + i * kLanes); };
  return halved(halved(part(0), part(1)), halved(part(2), part(3)));
}

// Query heads that share a key head, and where their results go.
struct Queries {
  const Bfloat16* numbers;
  Index head_stride, dim;
};

// Multiply kCount query heads with the keys of kTogetherTokens tokens; their quarters are
// kPiece * kTogetherTokens apart.
template <int kCount>
void multiply_keys(const Queries& query, const Bfloat16* keys, const Index* places, float* quarters) {
  __m512 sums[kCount][kTogetherTokens];
  each<kCount>([&](auto head) {
    each<kTogetherTokens>([&](auto t) { sums[head][t] = _mm512_setzero_ps(); });
  });
  for (Index d = 0; d < query.dim; d += 2 * kLanes) {
    __m512bh own[kCount];
    each<kCount>([&](auto head) {
      own[head] = pairs_at(query.numbers + head * query.head_stride + d);
    });
    each<kTogetherTokens>([&](auto t) {
      const __m512bh key = pairs_at(keys + places[t] + d);
      each<kCount>([&](auto head) {
        sums[head][t] = _mm512_dpbf16_ps(sums[head][t], own[head], key);
      });
    });
  }
  each<kCount>([&](auto head) {
    _mm512_store_ps(quarters + head * kPiece * kTogetherTokens, quartered(sums[head]));
  });
}

// Add the values of some pairs of tokens, by their weights, kPiece / 2 a head, to the sums
// [kCount, dim] of kCount heads, which fade. Of each 32 sums those of numbers 0 to 3, 8 to 11 and
// so on come first: pairs come out of the values like this.
template <int kCount>
void weigh_values(const Pair* weights, const float* fade, const Bfloat16* values,
                  const Index* places, Index pairs, Index dim, float* out) {
  constexpr int kVectors = kSpan / kLanes;
  for (Index d = 0; d < dim; d += kSpan) {
    __m512 sums[kCount][kVectors];
    each<kCount>([&](auto head) {
      each<kVectors>([&](auto v) {
        sums[head][v] = _mm512_mul_ps(_mm512_load_ps(out + head * dim + d + v * kLanes),
                                      _mm512_set1_ps(fade[head]));
      });
    });
    for (Index t = 0; t < pairs; ++t) {
      __m512bh numbers[kVectors];
      each<kVectors / 2>([&](auto v) {
        const __m512i one = _mm512_loadu_si512(values + places[2 * t] + d + v * kLine);
        const __m512i two = _mm512_loadu_si512(values + places[2 * t + 1] + d + v * kLine);
        numbers[2 * v] = (__m512bh)_mm512_unpacklo_epi16(one, two);
        numbers[2 * v + 1] = (__m512bh)_mm512_unpackhi_epi16(one, two);
      });
      each<kCount>([&](auto head) {
        const __m512bh weight = (__m512bh)repeated(weights[head * kPiece / 2 + t]);
        each<kVectors>([&](auto v) {
          sums[head][v] = _mm512_dpbf16_ps(sums[head][v], weight, numbers[v]);
        });
      });
    }
    each<kCount>([&](auto head) {
      each<kVectors>([&](auto v) {
        _mm512_store_ps(out + head * dim + d + v * kLanes, sums[head][v]);
      });
    });
  }
}

// By heads, less one.
constexpr auto kMultiplyKeys = {multiply_keys<1>, multiply_keys<2>, multiply_keys<3>,
                                multiply_keys<4>};
constexpr auto kWeighValues = {weigh_values<1>, weigh_values<2>, weigh_values<3>, weigh_values<4>};

// What a share's heads have so far, and a piece of theirs.
struct Progress {
  Lines<float> out, best, sum, fade;  // [heads, dim], [heads]
  Lines<float> quarters;              // [heads, kPiece, kTogetherTokens]
  Lines<Pair> weights;                // [heads, kPiece / 2]

  void begin(Index heads, Index dim) {
    out.assign(heads * dim, 0.0f);
    best.assign(heads, kUnseen);
    sum.assign(heads, 0.0f);
    fade.resize(heads);
    quarters.resize(heads * kPiece * kTogetherTokens);
    weights.resize(heads * kPiece / 2);
  }

  // Turn a head's scores of a piece that ends `seen` tokens after its first one into weights.
  void weigh(Index head, Index seen, float factor) {
    const Index vectors = (seen + kLanes - 1) / kLanes;
    __m512 scores[kPiece / kLanes], most = _mm512_set1_ps(kUnseen);
    for (Index v = 0; v < vectors; ++v) {
      const Index left = seen - v * kLanes;
      const __mmask16 mask = left < kLanes ? (1 << left) - 1 : 0xffff;
      const __m512 sums = sums_of(&quarters[(head * kPiece + v * kLanes) * kTogetherTokens]);
      scores[v] = _mm512_mask_mul_ps(_mm512_set1_ps(kUnseen), mask, sums, _mm512_set1_ps(factor));
      most = _mm512_max_ps(most, scores[v]);
    }
    const float before = best[head], now = std::max(before, _mm512_reduce_max_ps(most));
    __m512 total = _mm512_setzero_ps();
    for (Index v = 0; v < vectors; ++v) {
      const __m512 weight = powers_of_two(_mm512_sub_ps(scores[v], _mm512_set1_ps(now)));
      total = _mm512_add_ps(total, weight);
      store(rounded(weight),
            reinterpret_cast<Bfloat16*>(&weights[(head * kPiece + v * kLanes) / 2]));
    }
    best[head] = now;
    fade[head] = power_of_two(before - now);
    sum[head] = sum[head] * fade[head] + _mm512_reduce_add_ps(total);
  }

  void write(Index head, Index dim, Bfloat16* to) const {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // as weigh_values left them
    const __m512 factor = _mm512_set1_ps(1 / sum[head]);
    for (Index d = 0; d < dim; d += kLine) {
      const float* from = &out[head * dim + d];
      const __m512 low = _mm512_mul_ps(_mm512_load_ps(from), factor);
      const __m512 high = _mm512_mul_ps(_mm512_load_ps(from + kLanes), factor);
      const __m512i numbers = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      _mm512_storeu_si512(to + d, _mm512_permutexvar_epi64(order, numbers));
    }
  }
};

// Do it for kSharingHeads or fewer query heads of a share at a time: their key head among the
// share's, their first and their count.
template <class Do>
void by_heads(const Share& share, Index shared, Do one) {
  for (Index kv_head = 0; kv_head < share.count; ++kv_head)
    for (Index first = 0; first < shared; first += kSharingHeads)
      one(kv_head, kv_head * shared + first, std::min(kSharingHeads, shared - first));
}

// Attend with the query heads of a share, `shared` to a key head; out is [heads, dim].
void attend_share(Progress& progress, const Pages& pages, const Share& share, const Queries& query,
                  Index shared, float factor, Ahead& ahead, Bfloat16* out) {
  const Index dim = pages.dim, heads = share.count * shared;
  const Index first = share.sequence.first, end = share.sequence.end;
  progress.begin(heads, dim);
  Places next(pages, share.sequence, first, share.first);
  for (Index at = first; at < end; at += kPiece) {
    const Index seen = std::min(kPiece, end - at), padded = (seen + kLanes - 1) / kLanes * kLanes;
    Index places[kPiece];
    for (Index t = 0; t < padded; ++t) places[t] = t < seen ? next.next() : places[t - 1];
    for (Index t = 0; t < padded; t += kTogetherTokens) {
      ahead.ask(std::min(kTogetherTokens, seen - t));
      by_heads(share, shared, [&](Index kv_head, Index head, Index count) {
        kMultiplyKeys.begin()[count - 1](
            {query.numbers + head * query.head_stride, query.head_stride, dim},
            pages.keys + kv_head * dim, places + t,
            &progress.quarters[(head * kPiece + t) * kTogetherTokens]);
      });
    }
    for (Index head = 0; head < heads; ++head) progress.weigh(head, seen, factor);
    by_heads(share, shared, [&](Index kv_head, Index head, Index count) {
      kWeighValues.begin()[count - 1](&progress.weights[head * kPiece / 2], &progress.fade[head],
                                      pages.values + kv_head * dim, places, padded / 2, dim,
                                      &progress.out[head * dim]);
    });
  }
  for (Index head = 0; head < heads; ++head) progress.write(head, dim, out + head * dim);
}

// The shares of one of some threads, which have key heads of about as many tokens each.
std::vector<Share> shares_of(Index thread, Index threads, const std::vector<Sequence>& rows,
                             Index kv_heads) {
  Index all = 0, before = 0;
  for (const Sequence& row : rows) all += (row.end - row.first) * kv_heads;
  std::vector<Share> shares;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const Index tokens = rows[row].end - rows[row].first;
    Share share{static_cast<Index>(row), 0, 0, rows[row]};
    for (Index kv_head = 0; kv_head < kv_heads; ++kv_head, before += tokens) {
      const Index middle = (2 * before + tokens) * threads;
      if (middle < 2 * all * thread || middle >= 2 * all * (thread + 1)) continue;
      if (share.count++ == 0) share.first = kv_head;
    }
    if (share.count) shares.push_back(share);
  }
  return shares;
}

// Attend with one row of each sequence; keys and values are written.
void attend_single_rows(const Rows& query, Bfloat16* out, Index heads, float factor,
                        const Pages& pages, const std::vector<Sequence>& rows) {
  const Index shared = heads / pages.kv_heads;
  Index elements = 0;
  for (const Sequence& row : rows)
    elements += (row.end - row.first) * pages.kv_heads * pages.dim;
#pragma omp parallel if (elements >= kSerialPairs)
  {
    static thread_local Progress progress;
    const std::vector<Share> shares =
        shares_of(omp_get_thread_num(), omp_get_num_threads(), rows, pages.kv_heads);
    Ahead ahead(pages, shares);
    ahead.ask(kAskedTokens);
    for (const Share& share : shares) {
      const Index head = share.first * shared;
      const Bfloat16* numbers =
          query.numbers + share.row * query.row_stride + head * query.head_stride;
      attend_share(progress, pages, share, {numbers, query.head_stride, pages.dim}, shared, factor,
                   ahead, out + (share.row * heads + head) * pages.dim);
    }
  }
}

}  // namespace

#endif
