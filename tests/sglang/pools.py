"""SGLang's own pools, batches and in-tree attention on gloo ranks, without its server."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.cp import base
from sglang.srt.layers.cp.utils import get_cp_strategy, is_cp_active, prepare_cp_forward
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from tests.sglang.reports import Report, read_reports

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 6, 2, 32, 2


@dataclass(frozen=True)
class Prompt:
    new: int
    cached: int = 0


@dataclass
class Memory:
    """One rank's pools, with the slots of all prompts in random order, page by page."""

    requests: ReqToTokenPool
    tokens: MHATokenToKVPool

    @classmethod
    def make(
        cls,
        lengths: Sequence[int],
        page_size: int,
        generator: torch.Generator,
        *,
        num_kv_heads: int = KV_HEADS,
        head_dim: int = HEAD_DIM,
        num_layers: int = LAYERS,
        dtype: torch.dtype = torch.float32,
    ) -> Memory:
        pages = [-(-n // page_size) for n in lengths]
        size = (sum(pages) + 3) * page_size
        requests = ReqToTokenPool(len(lengths), max(lengths) + 1, "cpu", enable_memory_saver=False)
        tokens = MHATokenToKVPool(
            size, page_size, dtype, num_kv_heads, head_dim, num_layers, "cpu", enable_memory_saver=False
        )
        order = (1 + torch.randperm(sum(pages) + 2, generator=generator)).split([*pages, sum(pages) + 2 - sum(pages)])
        for i, n in enumerate(lengths):
            slots = (order[i][:, None] * page_size + torch.arange(page_size)).flatten()
            requests.req_to_token[i, :n] = slots[:n].to(torch.int32)
        return cls(requests, tokens)

    def slots(self, request: int, first: int, last: int) -> Tensor:
        return self.requests.req_to_token[request, first:last].long()


def parallel(rank: int, size: int, **changes: Any) -> Any:
    """SGLang's parallel state, as a server with --tp-size P --attn-cp-size P has it."""
    base._STRATEGY = None
    state = {
        "tp_size": size,
        "attn_cp_size": size,
        "attn_cp_rank": rank,
        "attn_tp_size": 1,
        "attn_dp_size": 1,
        "attn_dcp_size": 1,
        "pp_size": 1,
        "enable_prefill_cp": True,
        "cp_strategy": "zigzag",
        "attn_cp_group": SimpleNamespace(
            device_group=dist.group.WORLD,
            world_size=size,
            rank_in_group=rank,
            all_gather_into_tensor=dist.all_gather_into_tensor,
        ),
        "enable_cp_tp_group_sharing": False,
    }
    return get_parallel().override(**(state | changes))


def runner_of(memory: Memory, layers: Sequence[RadixAttention], name: str) -> Any:
    """What a backend sees of a ModelRunner."""
    config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["Qwen3ForCausalLM"]), num_attention_heads=layers[0].tp_q_head_num
    )
    return SimpleNamespace(
        device="cpu",
        dtype=memory.tokens.dtype,
        model=torch.nn.ModuleList(layers),
        model_config=config,
        req_to_token_pool=memory.requests,
        token_to_kv_pool=memory.tokens,
        prefill_attention_backend_str=name,
        spec_algorithm=SimpleNamespace(is_none=lambda: True),
    )


def extend(memory: Memory, prompts: Sequence[Prompt]) -> ForwardBatch:
    lengths = [p.cached + p.new for p in prompts]
    slots = [memory.slots(i, p.cached, p.cached + p.new) for i, p in enumerate(prompts)]
    num_new = sum(p.new for p in prompts)
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(prompts),
        input_ids=torch.zeros(num_new, dtype=torch.int64),
        req_pool_indices=torch.arange(len(prompts)),
        seq_lens=torch.tensor(lengths),
        seq_lens_cpu=torch.tensor(lengths),
        seq_lens_sum=sum(lengths),
        out_cache_loc=torch.cat(slots),
        extend_seq_lens=torch.tensor([p.new for p in prompts]),
        extend_prefix_lens=torch.tensor([p.cached for p in prompts]),
        extend_seq_lens_cpu=[p.new for p in prompts],
        extend_prefix_lens_cpu=[p.cached for p in prompts],
    )


def decode(memory: Memory, prompts: Sequence[Prompt]) -> ForwardBatch:
    """One more token of each."""
    lengths = [p.cached + p.new + 1 for p in prompts]
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(prompts),
        input_ids=torch.zeros(len(prompts), dtype=torch.int64),
        req_pool_indices=torch.arange(len(prompts)),
        seq_lens=torch.tensor(lengths),
        seq_lens_cpu=torch.tensor(lengths),
        seq_lens_sum=sum(lengths),
        out_cache_loc=torch.cat([memory.slots(i, n - 1, n) for i, n in enumerate(lengths)]),
    )


@contextmanager
def logged() -> Iterator[list[str]]:
    """Lines that the plugin logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sp_backend.sglang_plugin")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def compare(
    rank: int, size: int, name: str, prompts: Sequence[Prompt], page_size: int, dtype: torch.dtype
) -> tuple[dict[str, float], list[Report]]:
    """Differences between a backend and torch_native: outputs of a prefill and of a decoding step, and the pools.

    dtype: of the backend's inputs, outputs and pool. torch_native has the same numbers in float32.
    """
    load_plugins()
    with parallel(rank, size), logged() as lines, torch.inference_mode():
        lengths = [p.cached + p.new + 1 for p in prompts]
        generator = torch.Generator().manual_seed(0)  # the same on all ranks
        layers = [RadixAttention(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, layer_id=i) for i in range(LAYERS)]
        ours, theirs = (
            Memory.make(lengths, page_size, torch.Generator().manual_seed(seed), dtype=kind)
            for seed, kind in ((1, dtype), (2, torch.float32))
        )  # slots differ
        backend = ATTENTION_BACKENDS[name](runner_of(ours, layers, name))
        oracle = ATTENTION_BACKENDS["torch_native"](runner_of(theirs, layers, name))
        worst = {"extend": 0.0, "decode": 0.0, "pool": 0.0}
        for layer in layers:  # the cached tokens
            for i, p in enumerate(prompts):
                k, v = torch.randn(2, p.cached, KV_HEADS, HEAD_DIM, generator=generator).to(dtype)
                for memory in (ours, theirs):
                    own = memory.tokens.dtype
                    memory.tokens.set_kv_buffer(layer, KVWriteLoc(memory.slots(i, 0, p.cached)), k.to(own), v.to(own))
        for step, make in {"extend": extend, "decode": decode}.items():
            batch, whole = make(ours, prompts), make(theirs, prompts)
            sharded = is_cp_active(batch)
            if sharded:
                prepare_cp_forward(batch)
            backend.init_forward_metadata(batch)
            oracle.init_forward_metadata(whole)
            for layer in layers:
                rows = len(whole.input_ids)
                q = (torch.randn(rows, HEADS * HEAD_DIM, generator=generator) * 2).to(dtype)
                k, v = torch.randn(2, rows, KV_HEADS, HEAD_DIM, generator=generator).to(dtype)
                expected = oracle.forward(q.float(), k.float(), v.float(), layer, whole)
                if sharded:
                    cut = [get_cp_strategy().shard_hidden_states(x, batch) for x in (q, k, v, expected)]
                    q, k, v, expected = cut
                out = backend.forward(q, k, v, layer, batch)
                assert out.shape == expected.shape and out.dtype == dtype
                worst[step] = max(worst[step], float((out - expected).abs().max()))
        for layer in layers:
            for i, n in enumerate(lengths):
                for side in ("key", "value"):
                    a, b = (
                        getattr(m.tokens, f"get_{side}_buffer")(layer.layer_id)[m.slots(i, 0, n)]
                        for m in (ours, theirs)
                    )
                    worst["pool"] = max(worst["pool"], float((a - b).abs().max()))
    return worst, read_reports("\n".join(lines))


@dataclass
class Prefill:
    """One layer's attention of a sharded batch, to be called again and again."""

    backend: Any
    layer: RadixAttention
    batch: ForwardBatch
    tensors: tuple[Tensor, Tensor, Tensor]  # this rank's q, k, v

    def __call__(self) -> Tensor:
        self.backend.init_forward_metadata(self.batch)
        with forward_context(ForwardContext(attn_backend=self.backend)):
            return self.backend.forward(*self.tensors, self.layer, self.batch)

    @property
    def bytes_sent(self) -> int:
        return self.backend.bytes_sent


@contextmanager
def prepared(
    rank: int, size: int, name: str, prompts: Sequence[Prompt], *, num_heads: int, num_kv_heads: int, head_dim: int
) -> Iterator[Prefill]:
    """A backend on pools of its own, and this rank's rows."""
    load_plugins()
    with parallel(rank, size), torch.inference_mode():
        generator = torch.Generator().manual_seed(rank)
        lengths = [p.cached + p.new for p in prompts]
        sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "num_layers": 1}
        memory = Memory.make(lengths, 1, torch.Generator().manual_seed(0), **sizes)
        layer = RadixAttention(num_heads, head_dim, head_dim**-0.5, num_kv_heads, layer_id=0)
        backend = ATTENTION_BACKENDS[name](runner_of(memory, [layer], name))
        batch = extend(memory, prompts)
        prepare_cp_forward(batch)
        rows = batch.attn_cp_metadata.per_rank_actual_token[rank]
        q = torch.randn(rows, num_heads * head_dim, generator=generator)
        k, v = (torch.randn(rows, num_kv_heads, head_dim, generator=generator) for _ in range(2))
        yield Prefill(backend, layer, batch, (q, k, v))
