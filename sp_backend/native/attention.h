// What the attention kernels share: the problem, threads, 2^x, and how a row's result is put in its place.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <immintrin.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <utility>
#include <vector>

namespace {

using at::BFloat16;
using torch::stable::Tensor;

constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory that a thread keeps for its next call: fresh pages cost more than what is done in them.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = round_up(count * sizeof(T), 4096);
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(4096, bytes);
      size_ = data_ ? bytes : 0;
      STD_TORCH_CHECK(data_, "no memory for ", bytes, " bytes of attention scratch");
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// Runs f(0), ..., f(count - 1), the first ones first, on torch's threads; each ends with a call of `leave`.
template <class F, class G>
void parallel(int64_t count, const F& f, const G& leave) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(i);
    leave();
  };
  if (threads > 1) {
    torch::stable::parallel_for(0, threads, 1, work);
  } else {
    work(0, 1);
  }
}

template <class F>
void parallel(int64_t count, const F& f) {
  parallel(count, f, [] {});
}

struct Span {
  int64_t q_lo, q_hi, k_lo, k_hi;
  int64_t queries() const { return q_hi - q_lo; }
  int64_t keys() const { return k_hi - k_lo; }
};

struct Range {
  int64_t lo, hi;
};

struct Heads {  // query heads [q, q + group) read KV head k
  int64_t q, group, k;
};

struct Strided {  // in bytes
  char* data;
  int64_t row, head, value;  // value: from a key to its value

  template <class T>
  T* at(int64_t r, int64_t h) const {
    return reinterpret_cast<T*>(data + r * row + h * head);
  }
};

struct Problem {
  Strided q, kv, out, lse;
  std::vector<Span> spans;
  std::vector<Heads> heads;
  const int64_t *k_rows, *q_positions, *k_positions;  // or null
  int64_t dim, window;                                // window < 0: none
  bool causal, merge;
  float scale;  // times log2 e: softmax is in base 2 inside

  // The keys of a span that one of its queries sees.
  Range visible(const Span& s, int64_t query) const {
    if (window < 0) return {0, causal ? std::clamp<int64_t>(query + s.keys() - s.queries() + 1, 0, s.keys()) : s.keys()};
    const int64_t position = q_positions[s.q_lo + query];
    const int64_t *first = k_positions + s.k_lo, *last = k_positions + s.k_hi;
    const int64_t hi = causal ? std::upper_bound(first, last, position) - first : s.keys();
    return {std::min<int64_t>(std::upper_bound(first, last, position - window) - first, hi), hi};
  }

  const char* key(const Span& s, int64_t i, int64_t head) const {
    return kv.at<char>(k_rows ? k_rows[s.k_lo + i] : s.k_lo + i, head);
  }
};

// Asks for the lines of a row that is soon read, or written. Asked for a row at a time, beside other work: a CPU drops
// what is asked while many lines are under way.
template <bool Write = false>
[[gnu::always_inline]] inline void ask(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(row) + at, Write, 2);
}

template <class T>
constexpr int64_t words(int64_t dim) {
  return dim * static_cast<int64_t>(sizeof(T)) / 4;
}

[[gnu::always_inline]] inline void transpose(__m512i* r) {  // 16 x 16 words
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Keys to [dim in words][ld] words.
template <class T>
void pack_keys(const char* const* rows, int64_t keys, int64_t ld, int64_t dim, T* target) {
  auto* to = reinterpret_cast<int32_t*>(target);
  for (int64_t n = 0; n < keys; n += 16) {
    for (int64_t i = n + 16; i < std::min(n + 32, keys); i++) ask(rows[i], words<T>(dim) * 4);
    for (int64_t w = 0; w < words<T>(dim); w += 16) {
      const int64_t count = std::min<int64_t>(16, words<T>(dim) - w);
      const auto mask = static_cast<__mmask16>((1u << count) - 1);
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi32(mask, rows[n + i] + 4 * w);
      transpose(r);
      for (int i = 0; i < count; i++) _mm512_storeu_si512(to + (w + i) * ld + n, r[i]);
    }
  }
}

struct Pair {
  __m512i low, high;
};

// a0 b0 a1 b1 ... of 32 numbers each.
Pair interleave(__m512i a, __m512i b) {
  alignas(64) static constexpr auto order = [] {
    std::array<uint16_t, 64> pairs{};
    for (uint16_t i = 0; i < 32; i++) pairs[2 * i] = i, pairs[2 * i + 1] = 32 + i;
    return pairs;
  }();
  return {_mm512_permutex2var_epi16(a, _mm512_load_si512(order.data()), b),
          _mm512_permutex2var_epi16(a, _mm512_load_si512(order.data() + 32), b)};
}

// 2^x for x <= 0, to 1e-7; polynomial: minimax on [-1/2, 1/2].
__m512 exp2(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
void store(BFloat16* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

// The lanes of a vector that starts at j which lie in a range.
__mmask16 lanes(int64_t j, Range r) {
  const int64_t lo = std::max<int64_t>(r.lo - j, 0), hi = std::min<int64_t>(r.hi - j, 16);
  return hi <= lo ? 0 : static_cast<__mmask16>((0xffffu << lo) & (0xffffu >> (16 - hi)));
}

// Puts a row's result (out times `by`, lse) in its place, or merges it there.
void put(const float* out, float by, float lse, float* to_out, float* to_lse, int64_t dim, bool merge) {
  float keep = 0.0f;
  if (merge) {
    if (lse == -INFINITY) return;
    const float apart = lse - *to_lse, less = std::exp(-std::abs(apart)), share = less / (1 + less);
    keep = apart > 0 ? share : 1 - share;
    by *= 1 - keep;
    lse = std::max(*to_lse, lse) + std::log(1 + less);
  }
  *to_lse = lse;
  if (keep == 0.0f) {
    for (int64_t d = 0; d < dim; d++) to_out[d] = out[d] * by;
  } else {
    for (int64_t d = 0; d < dim; d++) to_out[d] = to_out[d] * keep + out[d] * by;
  }
}

}  // namespace
