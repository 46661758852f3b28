// Keys and values of a block, and asking for its lines before they are needed.
#pragma once

#include "attention.h"

namespace {

// Where a block's keys and values lie, for KV head 0. The last key stands for those after the end, which no row sees.
template <int Keys>
struct Block {
  const char *key[Keys], *value[Keys];

  Block(const Problem& p, const Span& s, int64_t lo, int64_t end) {
    for (int64_t i = 0; i < Keys; i++) {
      key[i] = p.key(s, std::min(lo + i, end - 1), 0);
      value[i] = key[i] + p.kv.value;
    }
  }
};

// Asks for a block's lines, to L2, in the order in which they lie and at the pace at which those of the block before are
// read. The CPU drops what is asked while many others are under way, so each line is asked for again some time later.
template <int Keys>
class Ahead {
 public:
  Ahead(const Problem& p, int64_t bytes) : stride_(p.kv.head), runs_(p.heads.back().k + 1), bytes_(bytes) {
    if (stride_ == bytes) bytes_ *= std::exchange(runs_, 1);
    asked_.fill(p.kv.data);
  }

  void start(const Block<Keys>& block) {
    block_ = &block;
    row_ = run_ = 0;
    at_ = end_ = nullptr;
  }

  template <int N>
  [[gnu::always_inline]] void ask() {
    for (int i = 0; i < N; i++, at_ += 64) {
      if (at_ >= end_ && !next_run()) return;
      const char* before = std::exchange(asked_[count_++ % asked_.size()], at_);
      _mm_prefetch(at_, _MM_HINT_T1);
      _mm_prefetch(before, _MM_HINT_T1);
    }
  }

 private:
  [[gnu::noinline]] bool next_run() {
    if (row_ == 2 * Keys) return false;
    at_ = (row_ % 2 ? block_->value : block_->key)[row_ / 2] + run_ * stride_;
    end_ = at_ + bytes_;
    if (++run_ == runs_) run_ = 0, row_++;
    return true;
  }

  const Block<Keys>* block_ = nullptr;
  int64_t stride_, runs_, bytes_, row_ = 0, run_ = 0;  // runs of bytes in each key's row and each value's
  const char *at_ = nullptr, *end_ = nullptr;
  std::array<const char*, 128> asked_;
  uint64_t count_ = 0;
};

}  // namespace
