"""Attention without sequence parallelism, to compare with; what the decoder's tests put in the place of groups."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sp_backend.models.config import ModelConfig
from sp_backend.parallel import Shard


class DenseAttention:
    """fp32 causal attention that remembers its keys; `exchange_kv` joins the key rows of SP peers."""

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        kv_rows: slice = slice(None),
        exchange_kv: Callable[[Tensor], Tensor] = lambda kv: kv,
        last_rows: Tensor | None = None,
    ) -> None:
        self.kv_rows = kv_rows
        self.last_rows = last_rows
        self.score_deviations: list[float] = []
        self._windows = config.windows
        self._exchange_kv = exchange_kv
        self._history: list[Tensor | None] = [None] * config.num_layers
        group = config.num_heads // config.num_kv_heads
        first = shard.kv_heads(config.num_kv_heads).start
        self._kv_of_query = [head // group - first for head in shard.query_heads(config.num_heads)]

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        kv, past = self._exchange_kv(kv), self._history[layer]
        kv = self._history[layer] = kv if past is None else torch.cat((past, kv))
        k, v = kv[:, :, self._kv_of_query].float().unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * q.shape[-1] ** -0.5
        distance = torch.arange(len(kv) - len(q), len(kv))[:, None] - torch.arange(len(kv))
        visible = (distance >= 0) & (distance < (self._windows[layer] or len(kv)))
        self.score_deviations.append(float(scores[:, visible].std()))
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


class Lockstep:
    """Collectives of ranks that are threads."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self._slots: list[Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self._slots[rank] = tensor.clone()
        self.barrier.wait(60)
        everyone = list(self._slots)
        self.barrier.wait(60)
        return everyone


class LockstepCollectives:
    def __init__(self, group: Lockstep, rank: int) -> None:
        self._group, self._rank = group, rank

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self._group.exchange(self._rank, tensor)).sum(0))

    def gather_last(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        pieces = self._group.exchange(self._rank, tensor)
        assert [piece.shape[-1] for piece in pieces] == list(sizes)
        return torch.cat(pieces, dim=-1)


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One sequence in fp64: out [queries, heads, head_dim] and lse [queries, heads].

    Causal: the last query sees all keys, so that keys before the first query are history.
    """
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))  # [heads, rows, head_dim]
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
        scores = scores.masked_fill_(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp_() @ v).transpose(0, 1), lse.T
