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
// read. The CPU drops what is asked while many others are under way, so each line is asked for three times.
template <int Keys>
class Ahead {
 public:
  Ahead(const Problem& p, int64_t head_bytes) {
    first_ = p.heads.front().k * p.kv.head;
    bytes_ = p.heads.back().k * p.kv.head + head_bytes - first_;
    if (p.kv.value == bytes_) bytes_ *= 2, runs_ = 1;
    asked_.fill(p.kv.data);
  }

  void start(const Block<Keys>& block) {
    block_ = &block;
    run_ = 0;
    at_ = end_ = nullptr;
  }

  // Two lines at a time.
  template <int Lines>
  [[gnu::always_inline]] void ask() {
    static_assert(Lines % 2 == 0);
    for (int i = 0; i < Lines; i += 2) {
      if (at_ >= end_ && !next_run()) return;
      asked_[++count_ % asked_.size()] = std::exchange(at_, at_ + 128);
      for (uint64_t ago : {0, 32, 64}) {
        const char* pair = asked_[(count_ - ago) % asked_.size()];
        _mm_prefetch(pair, _MM_HINT_T1);
        _mm_prefetch(pair + 64, _MM_HINT_T1);
      }
    }
  }

 private:
  [[gnu::noinline]] bool next_run() {
    if (run_ == runs_ * Keys) return false;
    at_ = (run_ % runs_ ? block_->value : block_->key)[run_ / runs_] + first_;
    end_ = at_ + bytes_;
    run_++;
    return true;
  }

  const Block<Keys>* block_ = nullptr;
  int64_t first_, bytes_, runs_ = 2, run_ = 0;  // runs of bytes of each key: its own and its value's, or one for both
  const char *at_ = nullptr, *end_ = nullptr;
  std::array<const char*, 128> asked_;
  uint64_t count_ = 0;
};

}  // namespace
