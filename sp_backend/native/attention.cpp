// Attention with log-sum-exp for CPUs with AVX-512 BF16: online softmax over blocks of keys (FlashAttention 2).
//
// The query heads that share a KV head are rows of one matrix: row = query * group + head. Keys and values are read from
// wherever their rows lie. What a query sees is always one range of its span's keys, so causal, full and windowed masks
// differ in that range only. Many queries: attention_tiles.h; few: attention_decode.h.
#include "attention_decode.h"
#include "attention_tiles.h"

namespace {

template <class T>
void attend_all(const Problem& p) {
  std::vector<const Span*> decode, many;
  std::vector<Task> direct;
  int64_t num_heads = 0, group = 0;
  for (const Heads& h : p.heads) num_heads += h.group, group = std::max(group, h.group);
  for (const Span& s : p.spans) {
    if (s.queries() == 0) continue;
    if (s.queries() * group <= kFewRows) {
      decode.push_back(&s);
    } else if (s.queries() * group <= kTileRows) {
      for (const Heads& h : p.heads) direct.push_back({&s, h, 0, s.queries(), {0, s.keys()}, -1, p.merge});
    } else {
      many.push_back(&s);
    }
  }
  if (!decode.empty()) attend_decode<T>(p, decode, num_heads);
  if (!direct.empty()) attend_tasks<T>(p, direct, nullptr, nullptr);
  if (!many.empty()) attend_packed<T>(p, units_of(many, p.heads));
}

Strided strided(const Tensor& t, int64_t row, int64_t head, int64_t value = -1) {
  const int64_t size = t.element_size();
  return {static_cast<char*>(t.data_ptr()), t.stride(row) * size, t.stride(head) * size,
          value < 0 ? 0 : t.stride(value) * size};
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
