"""SGLang's attention backend interface over plans (sharded prompts) and kernels (everything else)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.cp.utils import is_cp_active
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from sp_backend.kernels import Attention, HeadMap, Work, get_kernel
from sp_backend.layout import KV, Block
from sp_backend.native import choose_kernel
from sp_backend.sglang_plugin import BACKENDS
from sp_backend.sglang_plugin.plans import GroupPlans, Prepared
from sp_backend.sglang_plugin.rows import CPRows, WholeRows
from sp_backend.sglang_plugin.support import attention_layers
from sp_backend.shape import ModelShape
from sp_backend.state import AttentionState
from sp_backend.transport.gloo import GlooTransport

logger = logging.getLogger(__name__)


class SPAttentionBackend(AttentionBackend):  # type: ignore[misc]  # SGLang has no types here
    """One per rank. All layers have the same heads, which `support.check` has made sure of."""

    def __init__(self, name: str, runner: Any) -> None:
        """name: a key of BACKENDS. All ranks of the CP group make theirs at the same time."""
        super().__init__()
        self.name = name
        self.token_to_kv_pool = runner.token_to_kv_pool  # by these names SGLang finds the pools
        self.req_to_token_pool = runner.req_to_token_pool
        layers = attention_layers(runner)
        layer = layers[0]
        self._last_layer = max(x.layer_id for x in layers)
        self._shape = ModelShape(
            num_heads=layer.tp_q_head_num,
            num_kv_heads=layer.tp_k_head_num,
            head_dim=layer.qk_head_dim,
            num_layers=len(layers),
            itemsize=runner.dtype.itemsize,
        )
        self._scale: float = layer.scaling
        self._kernel = get_kernel(choose_kernel()[0])
        transport = GlooTransport.over(get_parallel().attn_cp_group.device_group)
        self._plans = GroupPlans(BACKENDS[name], transport, self._shape, runner.dtype, self._scale)
        self._sharded: tuple[CPRows, Prepared] | None = None  # the batch that runs; one of the two is there
        self._whole: tuple[WholeRows, Attention] | None = None
        self._sent_before = 0
        self._layers_run = 0
        logger.info("%s: rank %d of %d CP ranks", name, transport.rank, transport.size)

    @property
    def bytes_sent(self) -> int:
        """For the attention of sharded prompts, by this rank, since this was made."""
        return self._plans.bytes_sent

    def support_triton(self) -> bool:
        return False

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self._sharded = self._whole = None
        if is_cp_active(forward_batch):
            transport = self._plans.transport
            rows = CPRows.of(forward_batch, self.req_to_token_pool.req_to_token, transport.size, transport.rank)
            prepared = self._plans.prepare(rows.geometry)
            self._sharded, self._layers_run = (rows, prepared), 0
            self._sent_before = self.bytes_sent
        else:
            whole = WholeRows.of(forward_batch, self.req_to_token_pool.req_to_token)
            self._whole = whole, self._kernel(self._work(whole))

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        """q [rows, heads x head_dim], k and v [rows, kv_heads, head_dim]: in a sharded batch, this rank's rows."""
        if self._sharded is not None:
            return self._attend_sharded(q, k, v, layer, *self._sharded)
        return self._attend_whole(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        return self._attend_whole(q, k, v, layer, forward_batch, save_kv_cache)

    def _attend_sharded(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, rows: CPRows, prepared: Prepared) -> Tensor:
        q = q.view(-1, self._shape.num_heads, self._shape.head_dim)
        states = self._run(q, k, v, layer, rows, prepared)  # a call of its own: its keys are freed before out is made
        out = torch.zeros_like(q)  # of padding too
        for chunk, part in rows.q_rows.items():
            out[part] = states[chunk].out
        self._layers_run += 1
        if layer.layer_id == self._last_layer:
            self._report(rows, prepared)
        return out.flatten(1)

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, rows: CPRows, prepared: Prepared
    ) -> Mapping[int, AttentionState]:
        """The states of this rank's query chunks. All new keys are in the pool then."""
        executor, layout = prepared.executor, prepared.executor.plan.layout
        kv = torch.stack((k[: rows.num_rows], v[: rows.num_rows]), 1)
        held = {chunk: kv[part] for chunk, part in rows.q_rows.items()}
        for chunk, own in held.items():
            self._store(layer, rows.slots(Block(KV, chunk, layout.all_heads)), own)
        held[layout.history_of(executor.rank)] = self._gather(layer, rows.history)
        return executor.run(
            prepared.schedule,
            {chunk: q[part] for chunk, part in rows.q_rows.items()},
            held,
            keep=lambda block, came: self._store(layer, rows.slots(block), came),
        )

    def _attend_whole(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: Any, batch: Any, save_kv_cache: bool
    ) -> Tensor:
        assert self._whole is not None, "init_forward_metadata comes first"
        rows, attend = self._whole
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc), k, v)
        q = q.reshape(-1, self._shape.num_heads, self._shape.head_dim)
        out = torch.zeros_like(q)
        out[: rows.num_rows] = attend(q[: rows.num_rows], self._gather(layer, rows.slots)).out
        return out.flatten(1)

    def _work(self, rows: WholeRows) -> Work:
        shape = self._shape
        return Work(
            spans=rows.spans,
            causal=True,
            heads=HeadMap(0, shape.num_heads, shape.num_heads // shape.num_kv_heads),
            head_dim=shape.head_dim,
            scale=self._scale,
            num_queries=rows.num_rows,
        )

    def _gather(self, layer: Any, slots: Tensor) -> Tensor:
        """[slots, 2, kv_heads, head_dim] from the pool, which keeps keys and values apart."""
        kv = torch.empty(
            len(slots), 2, self._shape.num_kv_heads, self._shape.head_dim, dtype=self.token_to_kv_pool.dtype
        )
        torch.index_select(self.token_to_kv_pool.get_key_buffer(layer.layer_id), 0, slots, out=kv[:, 0])
        torch.index_select(self.token_to_kv_pool.get_value_buffer(layer.layer_id), 0, slots, out=kv[:, 1])
        return kv

    def _store(self, layer: Any, slots: Tensor, kv: Tensor) -> None:
        """kv: [slots, 2, kv_heads, head_dim]."""
        self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(slots), kv[:, 0], kv[:, 1])

    def _report(self, rows: CPRows, prepared: Prepared) -> None:
        """One line a prompt batch and rank, as SGLang has one a batch."""
        executor, layers = prepared.executor, self._layers_run
        logger.info(
            "%s: rank %d, %d new and %d cached tokens of %d prompts, %s: %d rounds in each of %d layers, sent %.6f MB, "
            "of them %.6f MB of keys that other ranks only keep",
            self.name,
            executor.rank,
            rows.num_new,
            rows.num_cached,
            len(rows.geometry.rows),
            executor.plan.name,
            prepared.num_rounds,
            layers,
            (self.bytes_sent - self._sent_before) / 1e6,
            layers * prepared.copy_bytes / 1e6,
        )
