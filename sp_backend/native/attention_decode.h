// Few queries, many keys: what counts is to read keys and values once, in the order in which they lie.
//
// A block of keys is attended by all heads before the next one, whose lines are asked for meanwhile.
#pragma once

#include "attention_rows.h"

namespace {

constexpr int64_t kFewRows = 32;            // of queries x heads of a group
constexpr int kMostKeys = 64;               // of a block; see `attend_part`
constexpr int64_t kBlockBytes = 256 << 10;  // so that this block and the next leave half of an L2 of 1 MiB
constexpr int64_t kSplitKeys = 1024;        // the fewest worth a thread of their own

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
