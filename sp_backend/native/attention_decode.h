// Few queries, many keys: what counts is to read keys and values once, in the order in which they lie.
//
// A block of keys is attended by all heads before the next one, whose lines are asked for meanwhile. Four keys share a
// vector, a quarter each, so that their products with a row of q are summed in few steps; values are multiplied as they
// are read.
#pragma once

#include "attention_ahead.h"

namespace {

constexpr int64_t kFewRows = 32;            // of queries x heads of a group
constexpr int kMostKeys = 64;               // of a block; see `attend_part`
constexpr int64_t kBlockBytes = 256 << 10;  // so that this block and the next leave half of an L2 of 1 MiB
constexpr int64_t kSplitKeys = 1024;        // the fewest worth a thread of their own

__m512 dot(__m512 sum, __m512i a, __m512i b, BFloat16) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
__m512 dot(__m512 sum, __m512i a, __m512i b, float) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

// Calls f<R, first>(row) for all rows, up to 8 at a time.
template <class F>
void by_rows(int64_t rows, const F& f) {
  const auto call = [&]<int R>(int64_t r) {
    r ? f.template operator()<R, false>(r) : f.template operator()<R, true>(r);
  };
  int64_t r = 0;
  for (; rows - r >= 8; r += 8) call.template operator()<8>(r);
  if (rows - r >= 4) call.template operator()<4>(r), r += 4;
  if (rows - r >= 2) call.template operator()<2>(r), r += 2;
  if (rows - r >= 1) call.template operator()<1>(r);
}

// The four quarters of four vectors, gathered: quarter j of the result's vector i is quarter i of vector j.
[[gnu::always_inline]] inline void transpose_quarters(__m512i* r) {
  const __m512i a = _mm512_shuffle_i32x4(r[0], r[1], 0x44), b = _mm512_shuffle_i32x4(r[0], r[1], 0xee);
  const __m512i c = _mm512_shuffle_i32x4(r[2], r[3], 0x44), d = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
  r[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  r[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  r[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  r[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

// q [R, width in words] x keys: for each row and four keys, a vector of four sums for each key, to be added up in
// `sum_quarters`. Of every 16 keys, vector n has keys n, n + 4, n + 8, n + 12. Two vectors at a time share what is read
// of q.
template <class T, bool Whole, bool First, int R, int Keys>
void multiply_keys(const int32_t* q, int64_t width, const Block<Keys>& block, int64_t offset, int64_t dim, float* sums,
                   Ahead<Keys>& ahead) {
  constexpr int kSums = R >= 4 ? 1 : 4 / R;  // of a row: enough in flight to hide the time that a product takes
  for (int64_t n = 0; n < Keys / 4; n += 2) {
    const char* const* key = block.key + n / 4 * 16 + n % 4;
    __m512 sum[2][R][kSums];
    for (auto& vector : sum)
      for (auto& row : vector)
        for (auto& x : row) x = _mm512_setzero_ps();
    for (int64_t w = 0; w < width; w += 16) {
      const __mmask16 mask = Whole ? 0xffff : lanes(0, {0, words<T>(dim) - w});
      __m512i k[2][4];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) k[i % 2][i / 2] = _mm512_maskz_loadu_epi32(mask, key[i / 2 * 4 + i % 2] + offset + 4 * w);
      if constexpr (First) ahead.template ask<8>();
      transpose_quarters(k[0]);
      transpose_quarters(k[1]);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + r * width + w + 4 * i));
          const __m512i x = _mm512_broadcast_i32x4(part);
          sum[0][r][i % kSums] = dot(sum[0][r][i % kSums], k[0][i], x, T());
          sum[1][r][i % kSums] = dot(sum[1][r][i % kSums], k[1][i], x, T());
        }
      }
    }
    for (int r = 0; r < R; r++) {
      for (int i = 1; i < kSums; i++) {
        sum[0][r][0] = _mm512_add_ps(sum[0][r][0], sum[0][r][i]);
        sum[1][r][0] = _mm512_add_ps(sum[1][r][0], sum[1][r][i]);
      }
      _mm512_storeu_ps(sums + (r * Keys + 4 * n) * 4, sum[0][r][0]);
      _mm512_storeu_ps(sums + (r * Keys + 4 * n + 4) * 4, sum[1][r][0]);
    }
  }
}

// The sums of 16 keys, of four numbers each.
__m512 sum_quarters(const float* sums) {
  const auto add = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  const __m512 a = add(_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 32));
  const __m512 b = add(_mm512_loadu_ps(sums + 16), _mm512_loadu_ps(sums + 48));
  return add(a, b);
}

// Numbers [d, d + 32) of the value at step n: in fp32 key n; in bf16 keys 2n and 2n + 1, interleaved.
template <bool Whole>
Pair value_at(const char* const* rows, int64_t offset, int64_t n, int64_t d, int64_t dim, float) {
  const char* at = rows[n] + offset + 4 * d;
  return {_mm512_maskz_loadu_epi32(Whole ? 0xffff : lanes(0, {0, dim - d}), at),
          _mm512_maskz_loadu_epi32(Whole ? 0xffff : lanes(16, {0, dim - d}), at + 64)};
}
template <bool Whole>
Pair value_at(const char* const* rows, int64_t offset, int64_t n, int64_t d, int64_t dim, BFloat16) {
  const auto mask = static_cast<__mmask32>(Whole || dim - d >= 32 ? ~0u : (1u << (dim - d)) - 1);
  const __m512i a = _mm512_maskz_loadu_epi16(mask, rows[2 * n] + offset + 2 * d);
  const __m512i b = _mm512_maskz_loadu_epi16(mask, rows[2 * n + 1] + offset + 2 * d);
  return interleave(a, b);
}

// out [R, dim] += p [R, Keys] x values, for C times 32 numbers from d on.
template <class T, bool Whole, bool First, int R, int C, int Keys>
void add_columns(const T* p, const Block<Keys>& block, int64_t offset, int64_t d, int64_t dim, float* out,
                 Ahead<Keys>& ahead) {
  constexpr int64_t steps = Keys * sizeof(T) / 4;
  const auto* weights = reinterpret_cast<const int32_t*>(p);
  const int64_t padded = round_up(dim, 32);
  __m512 sum[R][2 * C];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 2 * C; i++) sum[r][i] = _mm512_loadu_ps(out + r * padded + d + 16 * i);
  for (int64_t n = 0; n < steps; n++) {
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      const Pair v = value_at<Whole>(block.value, offset, n, d + 32 * c, dim, T());
      if constexpr (First) ahead.template ask<2>();
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const __m512i x = _mm512_set1_epi32(weights[r * steps + n]);
        sum[r][2 * c] = dot(sum[r][2 * c], v.low, x, T());
        sum[r][2 * c + 1] = dot(sum[r][2 * c + 1], v.high, x, T());
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 2 * C; i++) _mm512_storeu_ps(out + r * padded + d + 16 * i, sum[r][i]);
}

template <class T, bool Whole, bool First, int R, int Keys>
void add_values(const T* p, const Block<Keys>& block, int64_t offset, int64_t dim, float* out, Ahead<Keys>& ahead) {
  constexpr int kMost = R >= 8 ? 1 : R >= 4 ? 2 : 4;  // columns whose sums fit the registers
  int64_t d = 0;
  for (; dim - d > 32 * (kMost - 1); d += 32 * kMost)
    add_columns<T, Whole, First, R, kMost>(p, block, offset, d, dim, out, ahead);
  if constexpr (kMost > 2)
    for (; dim - d > 32; d += 64) add_columns<T, Whole, First, R, 2>(p, block, offset, d, dim, out, ahead);
  if constexpr (kMost > 1)
    for (; dim > d; d += 32) add_columns<T, Whole, First, R, 1>(p, block, offset, d, dim, out, ahead);
}

// One row's running softmax.
struct Row {
  float* out;  // [padded] not divided by the sum
  float* sum;  // [16] lanes
  float* top;  // maximum, in base 2
};

// p = 2^(s * scale - top) of a block's keys where they are seen, 0 elsewhere.
template <class T, int Keys>
void softmax(const float* sums, Range seen, float scale, const Row& row, int64_t padded, T* p) {
  constexpr int kVectors = Keys / 16;
  __mmask16 mask[kVectors];
  __m512 x[kVectors], most = _mm512_set1_ps(-INFINITY);
  for (int i = 0; i < kVectors; i++) {
    mask[i] = lanes(16 * i, seen);
    x[i] = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), mask[i], sum_quarters(sums + 64 * i), _mm512_set1_ps(scale));
    most = _mm512_max_ps(most, x[i]);
  }
  if (_mm512_cmp_ps_mask(most, _mm512_set1_ps(*row.top), _CMP_GT_OQ)) {  // seldom, after some blocks
    const float top = _mm512_reduce_max_ps(most);
    const __m512 shrink = _mm512_set1_ps(std::exp2(*row.top - top));
    *row.top = top;
    _mm512_storeu_ps(row.sum, _mm512_mul_ps(_mm512_loadu_ps(row.sum), shrink));
    for (int64_t d = 0; d < padded; d += 16)
      _mm512_storeu_ps(row.out + d, _mm512_mul_ps(_mm512_loadu_ps(row.out + d), shrink));
  }
  for (int i = 0; i < kVectors; i++) {
    const __m512 y = _mm512_maskz_mov_ps(mask[i], exp2(_mm512_sub_ps(x[i], _mm512_set1_ps(*row.top))));
    _mm512_storeu_ps(row.sum, _mm512_add_ps(_mm512_loadu_ps(row.sum), y));
    store(p + 16 * i, y);
  }
}

// All heads of a span's queries against keys [keys.lo, keys.hi): rows [head, query], as in p.heads.
// Whole: head_dim is a multiple of 32.
template <class T, bool Whole, int Keys>
class Decode {
 public:
  Decode(const Problem& p, const Span& s, Range keys)
      : p_(p), s_(s), padded_(round_up(p.dim, 32)), width_(round_up(words<T>(p.dim), 16)) {
    int64_t heads = 0, most = 0;
    for (const Heads& h : p.heads) {
      heads += h.group, most = std::max(most, h.group);
    }
    rows_ = heads * s.queries(), most *= s.queries();
    thread_local Scratch scratch;
    float* at = scratch.take<float>(rows_ * (padded_ + width_ + 17) + most * 5 * Keys);
    auto take = [&](int64_t count) { return std::exchange(at, at + count); };
    out_ = take(rows_ * padded_), sum_ = take(rows_ * 16);
    q_ = reinterpret_cast<int32_t*>(take(rows_ * width_));
    sums_ = take(most * 4 * Keys), weights_ = reinterpret_cast<T*>(take(most * Keys)), top_ = take(rows_);
    std::fill(out_, reinterpret_cast<float*>(q_) + rows_ * width_, 0.0f);
    std::fill(top_, top_ + rows_, -INFINITY);
    int32_t* to = q_;
    for (const Heads& h : p.heads)
      for (int64_t i = 0; i < s.queries(); i++)
        for (int64_t g = 0; g < h.group; g++, to += width_)
          std::copy_n(p.q.at<T>(s.q_lo + i, h.q + g), p.dim, reinterpret_cast<T*>(to));
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
    Ahead<Keys> ahead(p_, p_.dim * sizeof(T));
    Block<Keys> block(p_, s_, all.lo, all.hi);
    for (int64_t at = all.lo; at < all.hi; at += Keys) {
      const Block<Keys> next(p_, s_, std::min(at + Keys, all.hi), all.hi);
      ahead.start(next);
      int64_t row = 0;
      for (const Heads& h : p_.heads) {
        attend(h, row, at, block, ahead);
        row += h.group * s_.queries();
      }
      block = next;
    }
  }

  void attend(const Heads& h, int64_t row, int64_t at, const Block<Keys>& block, Ahead<Keys>& ahead) {
    const int64_t count = h.group * s_.queries(), offset = h.k * p_.kv.head;
    by_rows(count, [&]<int R, bool First>(int64_t r) {
      const int32_t* q = q_ + (row + r) * width_;
      multiply_keys<T, Whole, First, R>(q, width_, block, offset, p_.dim, sums_ + r * 4 * Keys, ahead);
    });
    for (int64_t r = 0; r < count; r++) {
      const Range seen = seen_[r / h.group];
      const Row state{out_ + (row + r) * padded_, sum_ + 16 * (row + r), top_ + row + r};
      softmax<T, Keys>(sums_ + r * 4 * Keys, {seen.lo - at, seen.hi - at}, p_.scale, state, padded_, weights_ + r * Keys);
    }
    by_rows(count, [&]<int R, bool First>(int64_t r) {
      add_values<T, Whole, First, R>(weights_ + r * Keys, block, offset, p_.dim, out_ + (row + r) * padded_, ahead);
    });
  }

  const Problem& p_;
  const Span& s_;
  int64_t rows_, padded_, width_;  // padded, width: of a row of out, and of q in words
  float *out_, *sum_, *top_, *sums_;  // sums: of multiply_keys
  int32_t* q_;
  T* weights_;
  Range seen_[kFewRows];
};

struct Part {  // of a span's keys
  const Span* span;
  Range keys;
  float* result;  // [queries, heads, dim + 1] for out and lse; null: put in its place
};

// Large blocks load and store the running output less often, which pays from 4 rows that share a KV head.
template <class T, class F>
void attend_part(const Problem& p, const Part& part, const F& keep) {
  const auto attend = [&]<bool Whole, int Keys>() { Decode<T, Whole, Keys>(p, *part.span, part.keys).results(keep); };
  const int64_t rows = p.heads[0].group * part.span->queries();
  const int64_t key_bytes = 2 * (p.heads.back().k - p.heads.front().k + 1) * p.dim * sizeof(T);
  const bool large = rows >= 4 && kMostKeys * key_bytes <= kBlockBytes;
  if (p.dim % 32) {
    large ? attend.template operator()<false, kMostKeys>() : attend.template operator()<false, 16>();
  } else {
    large ? attend.template operator()<true, kMostKeys>() : attend.template operator()<true, 16>();
  }
}

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
    const int64_t n = num_parts(*s), keys = round_up((s->keys() + n - 1) / n, kMostKeys);
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
    attend_part<T>(p, part, [&](int64_t query, int64_t head, const float* out, float by, float lse) {
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
