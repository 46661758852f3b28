// Few queries, many keys: what counts is to read keys and values once, in the order in which they lie.
//
// A block of keys is attended by all heads before the next one, whose lines are asked for meanwhile. Scores of 32 keys
// come from keys transposed in registers; values are multiplied as they are read.
#pragma once

#include "attention.h"

namespace {

constexpr int64_t kFewRows = 32;      // of queries x heads of a group
constexpr int64_t kKeys = 32;         // of a block
constexpr int64_t kSplitKeys = 1024;  // the fewest worth a thread of their own

__m512 dot(__m512 sum, __m512i a, __m512i b, BFloat16) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
__m512 dot(__m512 sum, __m512i a, __m512i b, float) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

// Calls f<R>(first row) for all rows, up to 8 at a time.
template <class F>
void by_rows(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; rows - r >= 8; r += 8) f.template operator()<8>(r);
  if (rows - r >= 4) f.template operator()<4>(r), r += 4;
  if (rows - r >= 2) f.template operator()<2>(r), r += 2;
  if (rows - r >= 1) f.template operator()<1>(r);
}

// scores [R, kKeys] = q [R, words] x keys [words, kKeys]
template <class T, int R>
void multiply_keys(const int32_t* q, const int32_t* keys, int64_t words, float* scores) {
  __m512 sum[R][2];
  for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
  for (int64_t w = 0; w < words; w++) {
    const __m512i a = _mm512_loadu_si512(keys + w * kKeys), b = _mm512_loadu_si512(keys + w * kKeys + 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512i x = _mm512_set1_epi32(q[r * words + w]);
      sum[r][0] = dot(sum[r][0], a, x, T());
      sum[r][1] = dot(sum[r][1], b, x, T());
    }
  }
  for (int r = 0; r < R; r++) {
    _mm512_storeu_ps(scores + r * kKeys, sum[r][0]);
    _mm512_storeu_ps(scores + r * kKeys + 16, sum[r][1]);
  }
}

// Numbers [d, d + 32) of the value at step n: in fp32 key n; in bf16 keys 2n and 2n + 1, interleaved.
Pair value_at(const char* const* rows, const char* const* next, int64_t n, int64_t d, int64_t dim, float) {
  const int64_t left = dim - d;
  _mm_prefetch(next[n] + 4 * d, _MM_HINT_T1);
  _mm_prefetch(next[n] + 4 * d + 64, _MM_HINT_T1);
  return {_mm512_maskz_loadu_epi32(lanes(0, {0, left}), rows[n] + 4 * d),
          _mm512_maskz_loadu_epi32(lanes(16, {0, left}), rows[n] + 4 * d + 64)};
}
Pair value_at(const char* const* rows, const char* const* next, int64_t n, int64_t d, int64_t dim, BFloat16) {
  _mm_prefetch(next[2 * n] + 2 * d, _MM_HINT_T1);
  _mm_prefetch(next[2 * n + 1] + 2 * d, _MM_HINT_T1);
  const auto mask = static_cast<__mmask32>(dim - d >= 32 ? ~0u : (1u << (dim - d)) - 1);
  const __m512i a = _mm512_maskz_loadu_epi16(mask, rows[2 * n] + 2 * d);
  const __m512i b = _mm512_maskz_loadu_epi16(mask, rows[2 * n + 1] + 2 * d);
  return interleave(a, b);
}

// out [R, dim] = out * shrink + p [R, kKeys] x values
template <class T, int R>
void add_values(const T* p, const char* const* rows, const char* const* next, int64_t dim, const float* shrink,
                float* out) {
  constexpr int64_t steps = kKeys * sizeof(T) / 4, width = round_up(kKeys, 16);
  const auto* weights = reinterpret_cast<const int32_t*>(p);
  const int64_t padded = round_up(dim, 32);
  for (int64_t d = 0; d < dim; d += 32) {
    __m512 sum[R][2];
    for (int r = 0; r < R; r++) {
      const __m512 by = _mm512_set1_ps(shrink[r]);
      for (int i = 0; i < 2; i++) sum[r][i] = _mm512_mul_ps(_mm512_loadu_ps(out + r * padded + d + 16 * i), by);
    }
    for (int64_t n = 0; n < steps; n++) {
      const Pair v = value_at(rows, next, n, d, dim, T());
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const __m512i x = _mm512_set1_epi32(weights[r * width * static_cast<int64_t>(sizeof(T)) / 4 + n]);
        sum[r][0] = dot(sum[r][0], v.low, x, T());
        sum[r][1] = dot(sum[r][1], v.high, x, T());
      }
    }
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 2; i++) _mm512_storeu_ps(out + r * padded + d + 16 * i, sum[r][i]);
  }
}

// Running softmax of some rows.
struct Rows {
  float* out;   // [rows, dim rounded up to 32], not divided by the sum
  float* top;   // [rows] maximum, in base 2
  float* sum;   // [rows, 16] of lanes
};

// p = 2^(s * scale - top) of 32 keys where they are seen, 0 elsewhere; returns what the row's out is to be scaled by.
template <class T>
float softmax(const float* s, Range seen, float scale, float* top, float* sum, T* p) {
  const __mmask16 masks[2] = {lanes(0, seen), lanes(16, seen)};
  if (!masks[0] && !masks[1]) {
    store(p, _mm512_setzero_ps());
    store(p + 16, _mm512_setzero_ps());
    return 1.0f;
  }
  const __m512 low = _mm512_set1_ps(-INFINITY), c = _mm512_set1_ps(scale);
  const __m512 a = _mm512_mask_loadu_ps(low, masks[0], s), b = _mm512_mask_loadu_ps(low, masks[1], s + 16);
  const float highest = _mm512_reduce_max_ps(_mm512_max_ps(a, b)) * scale;
  float shrink = 1.0f;
  if (highest > *top) {
    shrink = std::exp2(*top - highest);
    *top = highest;
  }
  const __m512 t = _mm512_set1_ps(*top);
  const __m512 x = _mm512_maskz_mov_ps(masks[0], exp2(_mm512_fmsub_ps(a, c, t)));
  const __m512 y = _mm512_maskz_mov_ps(masks[1], exp2(_mm512_fmsub_ps(b, c, t)));
  const __m512 before = _mm512_mul_ps(_mm512_loadu_ps(sum), _mm512_set1_ps(shrink));
  _mm512_storeu_ps(sum, _mm512_add_ps(before, _mm512_add_ps(x, y)));
  store(p, x);
  store(p + 16, y);
  return shrink;
}

struct KeyRows {  // of a block, for KV head 0
  const char* key[kKeys];
  const char* value[kKeys];

  KeyRows(const Problem& p, const Span& s, int64_t lo, int64_t hi) {
    alignas(64) static const char zeros[4096] = {};
    for (int64_t i = 0; i < kKeys; i++) {
      key[i] = lo + i < hi ? p.key(s, lo + i, 0) : nullptr;
      value[i] = key[i] ? key[i] + p.kv.value : zeros;
      if (!key[i]) key[i] = zeros;
    }
    used = std::min(hi - lo, kKeys);
  }
  KeyRows of_head(const Problem& p, int64_t head) const {
    KeyRows rows = *this;
    for (int64_t i = 0; i < used; i++) rows.key[i] += head * p.kv.head, rows.value[i] += head * p.kv.head;
    return rows;
  }

 private:
  int64_t used;
};

// All heads of a span's queries against keys [keys.lo, keys.hi): rows [head, query], as in p.heads.
template <class T>
class Decode {
 public:
  Decode(const Problem& p, const Span& s, Range keys) : p_(p), s_(s), padded_(round_up(p.dim, 32)) {
    int64_t heads = 0, most = 0;
    for (const Heads& h : p.heads) heads += h.group, most = std::max(most, h.group);
    rows_ = heads * s.queries(), most *= s.queries();
    const int64_t floats = rows_ * (padded_ + words<T>(p.dim) + 17) + kKeys * words<T>(p.dim) + most * (2 * kKeys + 1);
    thread_local Scratch scratch;
    float* at = scratch.take<float>(floats + 64);
    auto take = [&](int64_t count) { return std::exchange(at, at + count); };
    out_ = take(rows_ * padded_), sum_ = take(rows_ * 16), top_ = take(rows_);
    scores_ = take(most * kKeys), weights_ = reinterpret_cast<T*>(take(most * kKeys)), shrink_ = take(most);
    keys_ = reinterpret_cast<T*>(take(kKeys * words<T>(p.dim)));
    q_ = reinterpret_cast<T*>(at);
    std::fill(out_, out_ + rows_ * (padded_ + 16), 0.0f);
    std::fill(top_, top_ + rows_, -INFINITY);
    T* to = q_;
    for (const Heads& h : p.heads)
      for (int64_t i = 0; i < s.queries(); i++)
        for (int64_t g = 0; g < h.group; g++, to += p.dim) std::copy_n(p.q.at<T>(s.q_lo + i, h.q + g), p.dim, to);
    Range all{keys.hi, keys.lo};
    for (int64_t i = 0; i < s.queries(); i++) {
      const Range r = p.visible(s, i);
      seen_[i] = {std::max(r.lo, keys.lo), std::min(r.hi, keys.hi)};
      if (seen_[i].lo < seen_[i].hi) all = {std::min(all.lo, seen_[i].lo), std::max(all.hi, seen_[i].hi)};
    }
    run(all);
  }

  // Calls f(query, head, out, 1 / sum, lse) for each row.
  template <class F>
  void results(const F& f) const {
    int64_t row = 0;
    for (const Heads& h : p_.heads)
      for (int64_t i = 0; i < s_.queries(); i++)
        for (int64_t g = 0; g < h.group; g++, row++) {
          const float sum = _mm512_reduce_add_ps(_mm512_loadu_ps(sum_ + 16 * row));
          const bool blind = sum == 0.0f;
          const float lse = blind ? -INFINITY : kLn2 * (top_[row] + std::log2(sum));
          f(i, h.q + g, out_ + row * padded_, blind ? 0.0f : 1 / sum, lse);
        }
  }

 private:
  void run(Range all) {
    if (all.hi <= all.lo) return;
    KeyRows rows(p_, s_, all.lo, all.hi);
    for (int64_t at = all.lo; at < all.hi; at += kKeys) {
      const KeyRows next(p_, s_, std::min(at + kKeys, all.hi), all.hi);
      int64_t row = 0;
      for (const Heads& h : p_.heads) {
        attend(h, row, at, rows.of_head(p_, h.k), next.of_head(p_, h.k));
        row += h.group * s_.queries();
      }
      rows = next;
    }
  }

  void attend(const Heads& h, int64_t row, int64_t at, const KeyRows& rows, const KeyRows& next) {
    const int64_t count = h.group * s_.queries(), dim = p_.dim, width = words<T>(dim);
    pack_keys<T, true>(rows.key, kKeys, kKeys, dim, keys_, next.key);
    const auto* q = reinterpret_cast<const int32_t*>(q_ + row * dim);
    by_rows(count, [&]<int R>(int64_t r) {
      multiply_keys<T, R>(q + r * width, reinterpret_cast<const int32_t*>(keys_), width, scores_ + r * kKeys);
    });
    for (int64_t r = 0; r < count; r++) {
      const Range seen = seen_[r / h.group];
      shrink_[r] = softmax(scores_ + r * kKeys, {seen.lo - at, seen.hi - at}, p_.scale, top_ + row + r,
                           sum_ + 16 * (row + r), weights_ + r * kKeys);
    }
    by_rows(count, [&]<int R>(int64_t r) {
      add_values<T, R>(weights_ + r * kKeys, rows.value, next.value, dim, shrink_ + r, out_ + (row + r) * padded_);
    });
  }

  const Problem& p_;
  const Span& s_;
  int64_t rows_, padded_;
  float *out_, *sum_, *top_, *scores_, *shrink_;  // shrink: see softmax
  T *weights_, *keys_, *q_;
  Range seen_[kFewRows];
};

struct Part {  // of a span's keys
  const Span* span;
  Range keys;
  float* result;  // [queries, heads, dim + 1] for out and lse; null: put in its place
};

// Keys are split where there are more threads than spans, and the parts merged.
template <class T>
void attend_decode(const Problem& p, const std::vector<const Span*>& spans, int64_t num_heads) {
  const int64_t threads = torch::stable::get_num_threads(), count = spans.size(), size = p.dim + 1;
  const auto num_parts = [&](const Span& s) {
    return std::max<int64_t>(std::min((threads + count - 1) / count, s.keys() / kSplitKeys), 1);
  };
  int64_t floats = 0;
  for (const Span* s : spans) floats += num_parts(*s) > 1 ? num_parts(*s) * s->queries() * num_heads * size : 0;
  std::vector<float> results(floats);
  std::vector<Part> parts;
  float* at = results.data();
  for (const Span* s : spans) {
    const int64_t n = num_parts(*s), keys = round_up((s->keys() + n - 1) / n, kKeys);
    for (int64_t i = 0; i < n; i++) {
      parts.push_back({s, {std::min(i * keys, s->keys()), std::min((i + 1) * keys, s->keys())}, n > 1 ? at : nullptr});
      if (n > 1) at += s->queries() * num_heads * size;
    }
  }
  const auto place = [&](const Span& s, int64_t query, int64_t head, const float* out, float by, float lse, bool merge) {
    put(out, by, lse, p.out.at<float>(s.q_lo + query, head), p.lse.at<float>(s.q_lo + query, head), p.dim, merge);
  };
  parallel(parts.size(), [&](int64_t i) {
    const Part& part = parts[i];
    Decode<T>(p, *part.span, part.keys).results([&](int64_t query, int64_t head, const float* out, float by, float lse) {
      float* to = part.result + (query * num_heads + head) * size;
      if (part.result) {
        put(out, by, lse, to, to + p.dim, p.dim, false);
      } else {
        place(*part.span, query, head, out, by, lse, p.merge);
      }
    });
  });
  for (const Part& part : parts) {
    for (int64_t i = 0; part.result && i < part.span->queries() * num_heads; i++) {
      const float* row = part.result + i * size;
      place(*part.span, i / num_heads, i % num_heads, row, 1.0f, row[p.dim], p.merge || part.keys.lo > 0);
    }
  }
}

}  // namespace
