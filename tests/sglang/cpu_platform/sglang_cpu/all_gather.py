"""SGLang's own context parallelism on CPUs, to compare with: its all-gather of keys, its split of queries.

SGLang's backends that do this run on accelerators only. The attention itself is the plugin's kernel, so that what
differs is how keys get around.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.cp.utils import get_cp_strategy, is_cp_active
from torch import Tensor

from sp_backend.kernels import HeadMap, Span, Work
from sp_backend.sglang_plugin.backend import SPAttentionBackend
from sp_backend.sglang_plugin.rows import cached_slots


class AllGatherBackend(SPAttentionBackend):
    def __init__(self, runner: Any) -> None:
        super().__init__("sp_ring_pass_kv", runner)
        self._gathered = 0

    @property
    def bytes_sent(self) -> int:
        """What an all-gather cannot do without: this rank's rows, padded as SGLang pads them, to every other rank."""
        return self._gathered

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        if not is_cp_active(forward_batch):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        strategy, shape = get_cp_strategy(), self._shape
        q = q.view(-1, shape.num_heads, shape.head_dim)
        meta = forward_batch.attn_cp_metadata
        row = 2 * shape.num_kv_heads * shape.head_dim * shape.itemsize
        self._gathered += (strategy.cp_size - 1) * max(meta.per_rank_logical_token) * row
        strategy.materialize_full_kv(forward_batch, layer, k, v)

        def attend(part: Tensor, cu_queries: Tensor, num_keys: Tensor, longest: int) -> Tensor:
            keys = num_keys.tolist()
            ends = cu_queries.tolist()
            kv = self._gather(layer, cached_slots(self.req_to_token_pool.req_to_token, forward_batch, keys))
            first, spans = 0, []
            for lo, hi, n in zip(ends, ends[1:], keys, strict=False):
                spans.append(Span(lo, hi, first, first + n))
                first += n
            heads = HeadMap(0, shape.num_heads, shape.num_heads // shape.num_kv_heads)
            work = Work(tuple(spans), True, heads, shape.head_dim, self._scale, len(part))
            return self._kernel(work)(part, kv).out.to(part.dtype)

        return strategy.run_attention(q, forward_batch, q.device, attend).flatten(1)

    def _gather(self, layer: Any, slots: Tensor) -> Tensor:
        """The layer's own heads: where SGLang made the cache for more, it has written the same into each."""
        own = slice(self._shape.num_kv_heads)
        buffers = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        return torch.stack([buffer[slots, own] for buffer in buffers], 1)
