// Attention with log-sum-exp for CPUs with AVX-512 BF16: online softmax over blocks of keys (FlashAttention 2), matrix
// products by oneDNN's micro-kernels (at::native::cpublas::brgemm), which use AMX where there is any.
//
// The query heads that share a KV head are rows of one tile: row = query * group + head. Keys and values are packed
// once per KV head into the order that the products read, from wherever their rows lie, and used by all tiles of
// queries; a span whose queries fit one tile packs as it goes (decode: keys are read once). What a query sees is always
// one range of its span's keys, so causal, full and windowed masks differ in that range only.
#include <ATen/native/CPUBlas.h>
#include <immintrin.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <vector>

namespace {

using at::BFloat16;
using torch::stable::Tensor;

constexpr int64_t kTileRows = 128;  // of queries x heads of a group
constexpr int64_t kBlock = 512;     // keys of a block of a packed span
constexpr int64_t kDirect = 256;    // and of one that is packed as it goes
constexpr int64_t kStep = 64;       // sizes of products are rounded up to it, since each size is compiled once
constexpr int64_t kPackedBytes = 64 << 20;  // at a time
constexpr int64_t kSplitKeys = 1024;        // the fewest worth a thread of their own
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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

// Runs f(0), ..., f(count - 1), the first ones first, on torch's threads.
template <class F>
void parallel(int64_t count, const F& f) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(i);
  };
  if (threads > 1) {
    torch::stable::parallel_for(0, threads, 1, work);
  } else {
    work(0, 1);
  }
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
  int64_t head_dim;

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

// Packing. A block of n keys: K as [dim in 4-byte words][n] words; V as [n][dim] or, in bf16, [n / 2][dim][2].

template <class T>
constexpr int64_t words(int64_t dim) {
  return dim * static_cast<int64_t>(sizeof(T)) / 4;
}

void transpose(__m512i* r) {  // 16 x 16 words
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

template <class T>
void pack_keys(const char* const* rows, int64_t keys, int64_t ld, int64_t dim, T* target) {
  auto* to = reinterpret_cast<int32_t*>(target);
  for (int64_t n = 0; n < keys; n += 16) {
    for (int64_t w = 0; w < words<T>(dim); w += 16) {
      const int64_t count = std::min<int64_t>(16, words<T>(dim) - w);
      const auto mask = static_cast<__mmask16>((1u << count) - 1);
      __m512i r[16];
      for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi32(mask, rows[n + i] + 4 * w);
      transpose(r);
      for (int i = 0; i < count; i++) _mm512_storeu_si512(to + (w + i) * ld + n, r[i]);
    }
  }
}

void pack_values(const char* const* rows, int64_t offset, int64_t keys, int64_t dim, float* target) {
  for (int64_t n = 0; n < keys; n++) std::copy_n(reinterpret_cast<const float*>(rows[n] + offset), dim, target + n * dim);
}

void pack_values(const char* const* rows, int64_t offset, int64_t keys, int64_t dim, BFloat16* target) {
  alignas(64) static constexpr auto order = [] {
    std::array<uint16_t, 64> pairs{};
    for (uint16_t i = 0; i < 32; i++) pairs[2 * i] = i, pairs[2 * i + 1] = 32 + i;
    return pairs;
  }();
  const __m512i low = _mm512_load_si512(order.data()), high = _mm512_load_si512(order.data() + 32);
  for (int64_t n = 0; n < keys; n += 2, target += 2 * dim) {
    for (int64_t d = 0; d < dim; d += 32) {
      const int64_t count = std::min<int64_t>(32, dim - d);
      const auto mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
      const __m512i a = _mm512_maskz_loadu_epi16(mask, rows[n] + offset + 2 * d);
      const __m512i b = _mm512_maskz_loadu_epi16(mask, rows[n + 1] + offset + 2 * d);
      const auto pairs = (uint64_t{1} << count) - 1;
      _mm512_mask_storeu_epi32(target + 2 * d, static_cast<__mmask16>(pairs), _mm512_permutex2var_epi16(a, low, b));
      if (count > 16)
        _mm512_mask_storeu_epi32(
            target + 2 * d + 32, static_cast<__mmask16>(pairs >> 16), _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// Keys [lo, lo + keys) of a span, and zeros up to a whole step.
template <class T>
void pack(const Problem& p, const Span& s, int64_t head, int64_t lo, int64_t keys, int64_t ld, T* k, T* v) {
  alignas(64) static const char zeros[4096] = {};
  const char* rows[kBlock];
  for (int64_t i = 0; i < keys; i++) rows[i] = p.key(s, lo + i, head);
  const int64_t whole = round_up(keys, kStep);
  std::fill(rows + keys, rows + whole, zeros);
  pack_keys<T>(rows, whole, ld, p.dim, k);
  for (int64_t i = keys; i < whole; i++) rows[i] = zeros - p.kv.value;
  pack_values(rows, p.kv.value, whole, p.dim, v);
}

// Softmax

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

float row_max(const float* s, Range r) {
  __m512 top[4];
  for (auto& t : top) t = _mm512_set1_ps(-INFINITY);
  int64_t j = r.lo / 16 * 16;
  if (j < r.lo) {
    top[0] = _mm512_mask_loadu_ps(top[0], lanes(j, r), s + j);
    j += 16;
  }
  for (; j + 64 <= r.hi; j += 64)
    for (int i = 0; i < 4; i++) top[i] = _mm512_max_ps(top[i], _mm512_loadu_ps(s + j + 16 * i));
  for (; j < r.hi; j += 16) top[1] = _mm512_mask_max_ps(top[1], lanes(j, r), top[1], _mm512_loadu_ps(s + j));
  return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3])));
}

// p = 2^(s * scale - top) in a range, 0 elsewhere in [0, n); returns their sum. p may be s.
template <class T>
float row_exp(const float* s, T* p, Range r, int64_t n, float scale, float top) {
  const __m512 c = _mm512_set1_ps(scale), t = _mm512_set1_ps(top);
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  auto masked = [&](int64_t j) {
    const __m512 e = _mm512_maskz_mov_ps(lanes(j, r), exp2(_mm512_fmsub_ps(_mm512_loadu_ps(s + j), c, t)));
    sum[0] = _mm512_add_ps(sum[0], e);
    store(p + j, e);
  };
  int64_t j = 0;
  for (; j < r.lo / 16 * 16; j += 16) store(p + j, _mm512_setzero_ps());
  if (j < r.lo) masked(j), j += 16;
  for (; j + 32 <= r.hi; j += 32) {
    const __m512 a = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(s + j), c, t));
    const __m512 b = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(s + j + 16), c, t));
    sum[0] = _mm512_add_ps(sum[0], a);
    sum[1] = _mm512_add_ps(sum[1], b);
    store(p + j, a);
    store(p + j + 16, b);
  }
  for (; j < r.hi; j += 16) masked(j);
  for (; j < n; j += 16) store(p + j, _mm512_setzero_ps());
  return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
}

void multiply(float* x, float by, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] *= by;
}

// Tiles

template <class T>
struct Tile {
  int64_t rows, padded;  // padded: of the products
  T *q, *k, *v, *p;
  float *s, *out, *top, *sum;  // out: sum of p * v; top: running maximum, in base 2
  Range* seen;                 // by each query

  Tile(int64_t rows_, int64_t dim, int64_t block, bool packs) : rows(rows_) {
    padded = rows <= 16 ? round_up(rows, 4) : round_up(rows, 32);
    const int64_t kv = packs ? dim * kDirect * sizeof(T) : 0, scores = padded * block * 4;
    const int64_t q_bytes = round_up(padded * dim * sizeof(T), 64), p_bytes = sizeof(T) == 4 ? 0 : scores / 2;
    thread_local Scratch scratch;
    char* at = scratch.take<char>(
        q_bytes + 2 * kv + scores + p_bytes + round_up(padded * dim * 4, 64) + 24 * padded + 64);
    auto take = [&](int64_t bytes) { return std::exchange(at, at + round_up(bytes, 64)); };
    q = reinterpret_cast<T*>(take(q_bytes));
    k = reinterpret_cast<T*>(take(kv));
    v = reinterpret_cast<T*>(take(kv));
    s = reinterpret_cast<float*>(take(scores));
    p = p_bytes ? reinterpret_cast<T*>(take(p_bytes)) : reinterpret_cast<T*>(s);
    out = reinterpret_cast<float*>(take(padded * dim * 4));
    top = reinterpret_cast<float*>(at);
    sum = top + padded;
    seen = reinterpret_cast<Range*>(sum + padded);
    std::fill(top, top + padded, -INFINITY);
    std::fill(sum, sum + padded, 0.0f);
  }
};

// Attends a tile to keys [lo, hi) of a block with packed k, v; `first`: nothing is in out yet.
template <class T>
void attend_block(const Problem& p, Tile<T>& t, int64_t group, int64_t at, Range block, int64_t ld, const T* k,
                  const T* v, bool first) {
  constexpr bool vnni = sizeof(T) == 2;
  const int64_t n = round_up(block.hi - block.lo, kStep), start = block.lo - at;  // columns of the packed block
  at::native::cpublas::brgemm(
      t.padded, n, p.dim, p.dim, ld, ld, false, t.q, k + start * (4 / sizeof(T)), t.s, vnni);
  for (int64_t i = 0; i < t.rows; i++) {
    const Range seen{std::max(t.seen[i / group].lo, block.lo) - block.lo,
                     std::min(t.seen[i / group].hi, block.hi) - block.lo};
    T* probabilities = t.p + i * ld;
    if (seen.hi <= seen.lo) {
      std::fill_n(reinterpret_cast<char*>(probabilities), n * sizeof(T), 0);
      continue;
    }
    const float* scores = t.s + i * ld;
    const float top = std::max(t.top[i], row_max(scores, seen) * p.scale);
    const float shrink = std::exp2(t.top[i] - top);
    if (shrink != 1.0f && !first) multiply(t.out + i * p.dim, shrink, p.dim);
    t.top[i] = top;
    t.sum[i] = t.sum[i] * shrink + row_exp(scores, probabilities, seen, n, p.scale, top);
  }
  at::native::cpublas::brgemm(t.padded, p.dim, n, ld, p.dim, p.dim, !first, t.p, v + start * p.dim, t.out, vnni);
}

// Puts a row's result (out times `by`, lse) in its place, or merges it there.
void put(const float* out, float by, float lse, float* to_out, float* to_lse, int64_t dim, bool merge) {
  float keep = 0.0f;
  if (merge) {
    if (lse == -INFINITY) return;
    const float top = std::max(*to_lse, lse), old = std::exp(*to_lse - top), add = std::exp(lse - top);
    keep = old / (old + add);
    by *= add / (old + add);
    lse = top + std::log(old + add);
  }
  *to_lse = lse;
  if (keep == 0.0f) {
    for (int64_t d = 0; d < dim; d++) to_out[d] = out[d] * by;
  } else {
    for (int64_t d = 0; d < dim; d++) to_out[d] = to_out[d] * keep + out[d] * by;
  }
}

struct Task {  // queries [q_lo, q_hi) of a span, keys [keys.lo, keys.hi)
  int64_t span;
  Heads heads;
  int64_t q_lo, q_hi;
  Range keys;
  int64_t packed;  // where they lie in the packed keys, in elements; < 0: packed as it goes
  float* part;     // [rows, dim + 1] for out and lse; null: into the result
  bool merge;
};

template <class T>
void attend(const Problem& p, const Task& task, const T* packed_k, const T* packed_v) {
  const Span& s = p.spans[task.span];
  const int64_t group = task.heads.group, queries = task.q_hi - task.q_lo, dim = p.dim;
  const bool packs = task.packed < 0;
  const int64_t ld = packs ? kDirect : kBlock;
  Tile<T> t(queries * group, dim, ld, packs);
  Range all{task.keys.hi, task.keys.lo};
  for (int64_t i = 0; i < queries; i++) {
    const Range r = p.visible(s, task.q_lo + i);
    t.seen[i] = {std::max(r.lo, task.keys.lo), std::min(r.hi, task.keys.hi)};
    if (t.seen[i].lo < t.seen[i].hi) all = {std::min(all.lo, t.seen[i].lo), std::max(all.hi, t.seen[i].hi)};
    for (int64_t g = 0; g < group; g++)
      std::copy_n(p.q.at<T>(s.q_lo + task.q_lo + i, task.heads.q + g), dim, t.q + (i * group + g) * dim);
  }
  std::fill(t.q + t.rows * dim, t.q + t.padded * dim, T(0));
  const int64_t base = packs ? all.lo : task.keys.lo;
  bool first = true;
  for (int64_t at = base + (all.lo - base) / ld * ld; at < all.hi; at += ld, first = false) {
    const Range block{std::max(at, at + (all.lo - at) / kStep * kStep), std::min(at + ld, all.hi)};
    if (packs) pack<T>(p, s, task.heads.k, at, block.hi - at, ld, t.k, t.v);
    const int64_t offset = task.packed + (at - base) * dim;
    attend_block<T>(p, t, group, at, block, ld, packs ? t.k : packed_k + offset, packs ? t.v : packed_v + offset, first);
  }
  if (first) std::fill(t.out, t.out + t.rows * dim, 0.0f);
  for (int64_t i = 0; i < t.rows; i++) {
    const bool blind = t.sum[i] == 0.0f;
    const float lse = blind ? -INFINITY : kLn2 * (t.top[i] + std::log2(t.sum[i])), by = blind ? 0.0f : 1 / t.sum[i];
    if (task.part) {
      float* part = task.part + i * (dim + 1);
      put(t.out + i * dim, by, lse, part, part + dim, dim, false);
    } else {
      const int64_t row = s.q_lo + task.q_lo + i / group, head = task.heads.q + i % group;
      put(t.out + i * dim, by, lse, p.out.at<float>(row, head), p.lse.at<float>(row, head), dim, task.merge);
    }
  }
}

// Spans whose queries fit one tile: decode. Keys are split where there are more threads than KV heads.
template <class T>
void attend_direct(const Problem& p, std::vector<Task>& tasks) {
  const int64_t threads = torch::stable::get_num_threads(), count = tasks.size();
  std::vector<Task> all;
  std::vector<int64_t> parts(count);
  int64_t floats = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t keys = tasks[i].keys.hi, most = std::min((threads + count - 1) / count, keys / kSplitKeys);
    parts[i] = std::max<int64_t>(most, 1);
    if (parts[i] > 1) floats += parts[i] * (tasks[i].q_hi - tasks[i].q_lo) * tasks[i].heads.group * (p.dim + 1);
  }
  std::vector<float> buffer(floats);
  float* at = buffer.data();
  for (int64_t i = 0; i < count; i++) {
    const int64_t size = round_up((tasks[i].keys.hi + parts[i] - 1) / parts[i], kStep);
    if (parts[i] > 1) tasks[i].part = at;
    for (int64_t j = 0; j < parts[i]; j++) {
      Task part = tasks[i];
      part.keys = {std::min(j * size, tasks[i].keys.hi), std::min((j + 1) * size, tasks[i].keys.hi)};
      if (parts[i] > 1) {
        part.part = at;
        at += (part.q_hi - part.q_lo) * part.heads.group * (p.dim + 1);
      }
      all.push_back(part);
    }
  }
  parallel(all.size(), [&](int64_t i) { attend<T>(p, all[i], nullptr, nullptr); });
  for (int64_t i = 0; i < count; i++) {
    const Task& task = tasks[i];
    const int64_t rows = (task.q_hi - task.q_lo) * task.heads.group;
    for (int64_t r = 0; r < (task.part ? parts[i] * rows : 0); r++) {
      const int64_t row = p.spans[task.span].q_lo + r % rows / task.heads.group;
      const int64_t head = task.heads.q + r % rows % task.heads.group;
      const float* part = task.part + r * (p.dim + 1);
      float *out = p.out.at<float>(row, head), *lse = p.lse.at<float>(row, head);
      put(part, 1.0f, part[p.dim], out, lse, p.dim, task.merge || r >= rows);
    }
  }
}

// The other spans, a part of their keys at a time.
template <class T>
void attend_packed(const Problem& p, const std::vector<Task>& units) {
  const int64_t most = std::max<int64_t>(kPackedBytes / (2 * p.dim * sizeof(T)) / kBlock, 1) * kBlock;  // keys
  thread_local Scratch keys, values;
  std::vector<Task> packs, tiles;
  int64_t used = 0;
  auto flush = [&] {
    T *k = keys.take<T>(used * p.dim), *v = values.take<T>(used * p.dim);
    parallel(packs.size(), [&](int64_t i) {
      const Task& x = packs[i];
      pack<T>(p, p.spans[x.span], x.heads.k, x.keys.lo, x.keys.hi - x.keys.lo, kBlock, k + x.packed, v + x.packed);
    });
    parallel(tiles.size(), [&](int64_t i) { attend<T>(p, tiles[i], k, v); });
    packs.clear(), tiles.clear(), used = 0;
  };
  for (const Task& unit : units) {
    for (int64_t lo = 0; lo == 0 || lo < unit.keys.hi;) {
      if (used == most) flush();
      Task task = unit;
      task.keys = {lo, std::min(unit.keys.hi, lo + most - used)};
      task.packed = used * p.dim;
      task.merge = unit.merge || lo > 0;
      for (int64_t at = task.keys.lo; at < task.keys.hi; at += kBlock) {
        Task part = task;
        part.keys = {at, std::min(at + kBlock, task.keys.hi)};
        part.packed = (used + at - task.keys.lo) * p.dim;
        packs.push_back(part);
      }
      const int64_t step = std::max<int64_t>(kTileRows / task.heads.group, 1);
      for (int64_t q = (task.q_hi - 1) / step * step; q >= 0; q -= step) {  // under a causal mask, the longest first
        Task tile = task;
        tile.q_lo = q, tile.q_hi = std::min(q + step, task.q_hi);
        tiles.push_back(tile);
      }
      used += round_up(task.keys.hi - task.keys.lo, kBlock);
      lo = std::max<int64_t>(task.keys.hi, 1);
      if (lo < unit.keys.hi) flush();  // parts of one span's keys are merged one after the other
    }
  }
  flush();
}

template <class T>
void attend_all(const Problem& p) {
  std::vector<Task> direct, packed;
  for (size_t s = 0; s < p.spans.size(); s++) {
    if (p.spans[s].queries() == 0) continue;
    for (const Heads& heads : p.heads) {
      const int64_t queries = p.spans[s].queries();
      const Task task{static_cast<int64_t>(s), heads, 0, queries, {0, p.spans[s].keys()}, -1, nullptr, p.merge};
      (queries * heads.group <= kTileRows ? direct : packed).push_back(task);
    }
  }
  if (!direct.empty()) attend_direct<T>(p, direct);
  if (!packed.empty()) attend_packed<T>(p, packed);
  at::native::cpublas::brgemm_release(sizeof(T) == 2);
}

Strided strided(const Tensor& t, int64_t row, int64_t head, int64_t value = -1) {
  const int64_t size = t.element_size();
  return {static_cast<char*>(t.data_ptr()), t.stride(row) * size, t.stride(head) * size,
          value < 0 ? 0 : t.stride(value) * size, t.size(t.dim() - 1)};
}

const int64_t* data_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const int64_t*>(t->data_ptr()) : nullptr;
}

// What sp_backend/kernels/native.py has checked is not checked again.
void attention(Tensor q, Tensor kv, Tensor out, Tensor lse, Tensor spans, Tensor runs, std::optional<Tensor> k_rows,
               std::optional<Tensor> q_positions, std::optional<Tensor> k_positions, bool causal, int64_t window,
               double scale, bool merge) {
  Problem p{strided(q, 0, 1), strided(kv, 0, 2, 1), strided(out, 0, 1), strided(lse, 0, 1), {}, {}, data_of(k_rows),
            data_of(q_positions), data_of(k_positions), q.size(2), window, causal, merge,
            static_cast<float>(scale) * kLog2e};
  const auto* span = static_cast<const Span*>(spans.data_ptr());
  p.spans.assign(span, span + spans.size(0));
  const auto* run = static_cast<const int64_t*>(runs.data_ptr());
  for (int64_t i = 0; i < runs.size(0); i++, run += 4) {
    const int64_t group = (run[1] - run[0]) / (run[3] - run[2]);
    for (int64_t k = run[2]; k < run[3]; k++)
      for (int64_t g = 0; g < group; g += kTileRows)
        p.heads.push_back({run[0] + (k - run[2]) * group + g, std::min(group - g, kTileRows), k});
  }
  if (q.scalar_type() == torch::headeronly::ScalarType::BFloat16) {
    attend_all<BFloat16>(p);
  } else {
    attend_all<float>(p);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sp_serve, m) {
  m.def(
      "attention(Tensor q, Tensor kv, Tensor(a!) out, Tensor(b!) lse, Tensor spans, Tensor runs, Tensor? k_rows, "
      "Tensor? q_positions, Tensor? k_positions, bool causal, int window, float scale, bool merge) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(sp_serve, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }
