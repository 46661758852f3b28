// Many queries: tiles of them against packed blocks of keys, by oneDNN's micro-kernels
// (at::native::cpublas::brgemm), which use AMX where there is any.
//
// Keys and values are packed once per KV head into the order that the products read, and used by all tiles of queries;
// a span whose queries fit one tile packs as it goes.
#pragma once

#include "attention.h"

namespace {

constexpr int64_t kTileRows = 128;  // of queries x heads of a group
constexpr int64_t kBlock = 512;     // keys of a block of a packed span
constexpr int64_t kDirect = 256;    // and of one that is packed as it goes
constexpr int64_t kStep = 64;       // sizes of products are rounded up to it, since each size is compiled once
constexpr int64_t kPackedBytes = 4 << 20;  // at a time: more is no faster

// Packing. A block of n keys: K as [dim in 4-byte words][n] words; V as [n][dim] or, in bf16, [n / 2][dim][2].

void pack_values(const char* const* rows, int64_t offset, int64_t keys, int64_t dim, float* target) {
  for (int64_t n = 0; n < keys; n++) std::copy_n(reinterpret_cast<const float*>(rows[n] + offset), dim, target + n * dim);
}

void pack_values(const char* const* rows, int64_t offset, int64_t keys, int64_t dim, BFloat16* target) {
  for (int64_t n = 0; n < keys; n += 2, target += 2 * dim) {
    for (int64_t i = n + 16; i < std::min(n + 18, keys); i++) ask(rows[i] + offset, 2 * dim);
    for (int64_t d = 0; d < dim; d += 32) {
      const int64_t count = std::min<int64_t>(32, dim - d);
      const auto mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
      const __m512i a = _mm512_maskz_loadu_epi16(mask, rows[n] + offset + 2 * d);
      const __m512i b = _mm512_maskz_loadu_epi16(mask, rows[n + 1] + offset + 2 * d);
      const Pair v = interleave(a, b);
      _mm512_mask_storeu_epi32(target + 2 * d, lanes(0, {0, count}), v.low);
      if (count > 16) _mm512_mask_storeu_epi32(target + 2 * d + 32, lanes(16, {0, count}), v.high);
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

struct Task {  // queries [q_lo, q_hi) of a span, keys [keys.lo, keys.hi)
  const Span* span;
  Heads heads;
  int64_t q_lo, q_hi;
  Range keys;
  int64_t packed;  // where they lie in the packed keys, in elements; < 0: packed as it goes
  bool merge;

  // What a row of its tile is about.
  template <class U>
  U* of(const Strided& x, int64_t row) const {
    return x.at<U>(span->q_lo + q_lo + row / heads.group, heads.q + row % heads.group);
  }

  int64_t rows() const { return (q_hi - q_lo) * heads.group; }

  template <class T>
  void ask_start(const Problem& p, int64_t row) const {
    ask(of<T>(p.q, row), p.dim * sizeof(T));
    if (merge) ask_end(p, row);
  }

  void ask_end(const Problem& p, int64_t row) const {
    ask<true>(of<float>(p.out, row), p.dim * sizeof(float));
    ask<true>(of<float>(p.lse, row), sizeof(float));
  }
};

// Attends a tile to keys [lo, hi) of a block with packed k, v; `first`: nothing is in out yet. With a task's last
// block: the task that ends with it, and the one that follows it, if any; what they need of memory is asked for meanwhile.
template <class T>
void attend_block(const Problem& p, Tile<T>& t, int64_t group, int64_t at, Range block, int64_t ld, const T* k,
                  const T* v, bool first, const Task* ends, const Task* follows) {
  constexpr bool vnni = sizeof(T) == 2;
  const int64_t n = round_up(block.hi - block.lo, kStep), start = block.lo - at;  // columns of the packed block
  at::native::cpublas::brgemm(
      t.padded, n, p.dim, p.dim, ld, ld, false, t.q, k + start * (4 / sizeof(T)), t.s, vnni);
  for (int64_t i = 0; i < t.rows; i++) {
    const Range seen{std::max(t.seen[i / group].lo, block.lo) - block.lo,
                     std::min(t.seen[i / group].hi, block.hi) - block.lo};
    T* probabilities = t.p + i * ld;
    if (ends) ends->ask_end(p, i);
    if (follows && i < follows->rows()) follows->template ask_start<T>(p, i);
    if (seen.hi <= seen.lo) {
      std::fill_n(reinterpret_cast<char*>(probabilities), n * sizeof(T), 0);
      continue;
    }
    const float* scores = t.s + i * ld;
    const float top = std::max(t.top[i], row_max(scores, seen) * p.scale);
    const float shrink = t.top[i] == top ? 1.0f : std::exp2(t.top[i] - top);
    if (shrink != 1.0f && !first) multiply(t.out + i * p.dim, shrink, p.dim);
    t.top[i] = top;
    t.sum[i] = t.sum[i] * shrink + row_exp(scores, probabilities, seen, n, p.scale, top);
  }
  at::native::cpublas::brgemm(t.padded, p.dim, n, ld, p.dim, p.dim, !first, t.p, v + start * p.dim, t.out, vnni);
}

// Merging is going on from the result that is there: as if its keys had been seen in this tile, each row's sum of
// exponentials being 1 at its lse.
template <class T>
void resume(const Problem& p, const Task& task, Tile<T>& t) {
  for (int64_t i = 0; i < t.rows; i++) {
    const float lse = *task.of<float>(p.lse, i);
    std::copy_n(task.of<float>(p.out, i), p.dim, t.out + i * p.dim);
    t.top[i] = lse * kLog2e;
    t.sum[i] = lse == -INFINITY ? 0.0f : 1.0f;
  }
}

// next: the task that this thread does next, as far as one can tell, or null.
template <class T>
void attend(const Problem& p, const Task& task, const Task* next, const T* packed_k, const T* packed_v) {
  const Span& s = *task.span;
  const int64_t group = task.heads.group, queries = task.q_hi - task.q_lo, dim = p.dim;
  const bool packs = task.packed < 0;
  const int64_t ld = packs ? kDirect : kBlock;
  Tile<T> t(queries * group, dim, ld, packs);
  Range all{task.keys.hi, task.keys.lo};
  for (int64_t i = 0; i < queries; i++) {
    const Range r = p.visible(s, task.q_lo + i);
    t.seen[i] = {std::max(r.lo, task.keys.lo), std::min(r.hi, task.keys.hi)};
    if (t.seen[i].lo < t.seen[i].hi) all = {std::min(all.lo, t.seen[i].lo), std::max(all.hi, t.seen[i].hi)};
  }
  if (task.merge) resume(p, task, t);
  for (int64_t i = 0; i < t.rows; i++) std::copy_n(task.of<T>(p.q, i), dim, t.q + i * dim);
  std::fill(t.q + t.rows * dim, t.q + t.padded * dim, T(0));
  const int64_t base = packs ? all.lo : task.keys.lo;
  bool first = !task.merge;
  for (int64_t at = base + (all.lo - base) / ld * ld; at < all.hi; at += ld, first = false) {
    const Range block{std::max(at, at + (all.lo - at) / kStep * kStep), std::min(at + ld, all.hi)};
    if (packs) pack<T>(p, s, task.heads.k, at, block.hi - at, ld, t.k, t.v);
    const int64_t offset = task.packed + (at - base) * dim;
    const bool last = at + ld >= all.hi;
    attend_block<T>(p, t, group, at, block, ld, packs ? t.k : packed_k + offset, packs ? t.v : packed_v + offset, first,
                    last ? &task : nullptr, last ? next : nullptr);
  }
  if (first) std::fill(t.out, t.out + t.rows * dim, 0.0f);
  for (int64_t i = 0; i < t.rows; i++) {
    if (task.merge && t.seen[i / group].hi <= t.seen[i / group].lo) continue;
    const bool blind = t.sum[i] == 0.0f;
    const float lse = blind ? -INFINITY : kLn2 * (t.top[i] + std::log2(t.sum[i])), by = blind ? 0.0f : 1 / t.sum[i];
    put(t.out + i * dim, by, lse, task.of<float>(p.out, i), task.of<float>(p.lse, i), dim, false);
  }
}

// Before a thread does other work it gives AMX's tile registers back: brgemm sets them up only where its product is
// another than the thread's last, and what oneDNN does in between leaves them otherwise.
template <class T>
void attend_tasks(const Problem& p, const std::vector<Task>& tasks, const T* packed_k, const T* packed_v) {
  const auto leave = [] { at::native::cpublas::brgemm_release(sizeof(T) == 2); };
  const int64_t count = tasks.size(), threads = torch::stable::get_num_threads();
  const auto follows = [&](int64_t i) { return i + threads < count ? &tasks[i + threads] : nullptr; };
  parallel(count, [&](int64_t i) { attend<T>(p, tasks[i], follows(i), packed_k, packed_v); }, leave);
}

// Cuts a task into tiles; under a causal mask, the longest first.
void add_tiles(const Task& task, std::vector<Task>& tiles) {
  const int64_t step = std::max<int64_t>(kTileRows / task.heads.group, 1);
  for (int64_t q = (task.q_hi - 1) / step * step; q >= 0; q -= step) {
    tiles.push_back(task);
    tiles.back().q_lo = q, tiles.back().q_hi = std::min(q + step, task.q_hi);
  }
}

// Spans that start at the same key, the longest first, for one KV head: their keys are packed once.
struct Unit {
  std::vector<const Span*> spans;
  Heads heads;
};

std::vector<Unit> units_of(std::vector<const Span*> spans, const std::vector<Heads>& heads) {
  std::sort(spans.begin(), spans.end(), [](const Span* a, const Span* b) {
    return a->k_lo != b->k_lo ? a->k_lo < b->k_lo : a->keys() > b->keys();
  });
  std::vector<Unit> units;
  for (size_t first = 0, last; first < spans.size(); first = last) {
    for (last = first; last < spans.size() && spans[last]->k_lo == spans[first]->k_lo;) last++;
    for (const Heads& h : heads) units.push_back({{spans.begin() + first, spans.begin() + last}, h});
  }
  return units;
}

// The other spans, a part of their keys at a time.
template <class T>
void attend_packed(const Problem& p, const std::vector<Unit>& units) {
  const int64_t most = std::max<int64_t>(kPackedBytes / (2 * p.dim * sizeof(T)) / kBlock, 1) * kBlock;  // keys
  thread_local Scratch keys, values;
  std::vector<Task> packs, tiles;
  int64_t used = 0;
  auto flush = [&] {
    const auto earlier = [](const Task& a, const Task& b) { return a.keys.lo < b.keys.lo; };
    std::stable_sort(packs.begin(), packs.end(), earlier);  // a key's heads lie together in memory
    T *k = keys.take<T>(used * p.dim), *v = values.take<T>(used * p.dim);
    parallel(packs.size(), [&](int64_t i) {
      const Task& x = packs[i];
      pack<T>(p, *x.span, x.heads.k, x.keys.lo, x.keys.hi - x.keys.lo, kBlock, k + x.packed, v + x.packed);
    });
    attend_tasks<T>(p, tiles, k, v);
    packs.clear(), tiles.clear(), used = 0;
  };
  for (const Unit& unit : units) {
    const int64_t num_keys = unit.spans[0]->keys();
    for (int64_t lo = 0; lo == 0 || lo < num_keys;) {
      if (used == most) flush();
      const int64_t hi = std::min(num_keys, lo + most - used);
      for (int64_t at = lo; at < hi; at += kBlock) {
        const Range block{at, std::min(at + kBlock, hi)};
        packs.push_back({unit.spans[0], unit.heads, 0, 0, block, (used + at - lo) * p.dim, false});
      }
      for (const Span* span : unit.spans)
        if (lo == 0 || lo < span->keys()) {
          const Range seen{lo, std::min(hi, span->keys())};
          add_tiles({span, unit.heads, 0, span->queries(), seen, used * p.dim, p.merge || lo > 0}, tiles);
        }
      used += round_up(hi - lo, kBlock);
      lo = std::max<int64_t>(hi, 1);
      if (lo < num_keys) flush();  // parts of one span's keys are merged one after the other
    }
  }
  flush();
}

}  // namespace
