"""Where the tokens of one of SGLang's batches lie: rows of its tensors, and slots of its KV pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sp_backend.geometry import Geometry
from sp_backend.kernels import Span
from sp_backend.layout import Block


def cached_slots(req_to_token: Tensor, batch: Any, lengths: Sequence[int]) -> Tensor:
    """[tokens] int64: pool slots of the first tokens of each sequence, so many of each."""
    parts = [torch.empty(0, dtype=torch.int64)]
    requests = batch.req_pool_indices.tolist()
    parts += [req_to_token[request, :n].to(torch.int64) for request, n in zip(requests, lengths, strict=True) if n]
    return torch.cat(parts)


@dataclass(frozen=True)
class CPRows:
    """A prompt batch sharded by SGLang's zigzag strategy, in which a rank's rows lie chunk by chunk already."""

    geometry: Geometry
    q_rows: dict[int, slice]  # query chunk -> rows of this rank's q, k and v
    num_rows: int  # of them; more may follow, for padding
    history: Tensor  # [cached tokens] int64: pool slots, sequence by sequence
    new: Tensor  # [new tokens] int64: the pool slots of all ranks' tokens, sequence by sequence
    num_new: int
    num_cached: int
    _slots: dict[Block, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, batch: Any, req_to_token: Tensor, num_ranks: int, rank: int) -> CPRows:
        """batch: a ForwardBatch with CP metadata. Its out_cache_loc may be reused by later batches."""
        meta, cached = batch.attn_cp_metadata, [int(n) for n in batch.extend_prefix_lens_cpu]
        size = 2 * num_ranks
        cuts = [meta.split_list[i * size : (i + 1) * size] for i in range(meta.bs)]
        first, last = (sum(cut[chunk] for cut in cuts) for chunk in (rank, size - 1 - rank))
        return cls(
            geometry=Geometry([(*cut, *([n] * num_ranks)) for cut, n in zip(cuts, cached, strict=True)]),
            q_rows={rank: slice(0, first), size - 1 - rank: slice(first, first + last)},
            num_rows=first + last,
            history=cached_slots(req_to_token, batch, cached),
            new=batch.out_cache_loc.to(torch.int64, copy=True),
            num_new=sum(map(sum, cuts)),
            num_cached=sum(cached),
        )

    def slots(self, block: Block) -> Tensor:
        """[rows of the block] int64: where its keys and values belong."""
        if block not in self._slots:
            parts, first = [], 0
            for rows, (lo, hi) in zip(self.geometry.rows, self.geometry.ranges(block), strict=True):
                starts = list(accumulate(rows, initial=first))
                parts.append(self.new[starts[block.chunk] + lo : starts[block.chunk] + hi])
                first += sum(rows[: 2 * (len(rows) // 3)])
            self._slots[block] = torch.cat(parts)
        return self._slots[block]


@dataclass(frozen=True)
class WholeRows:
    """A batch that every CP rank runs whole: decoding, and prompts too short to shard."""

    spans: tuple[Span, ...]
    num_rows: int  # of q; more may follow, for padding
    slots: Tensor  # [tokens] int64: all of every sequence, the new ones included

    @classmethod
    def of(cls, batch: Any, req_to_token: Tensor) -> WholeRows:
        lengths = batch.seq_lens_cpu.tolist()
        new = [1] * len(lengths) if batch.forward_mode.is_decode() else [int(n) for n in batch.extend_seq_lens_cpu]
        q_ends, k_ends = list(accumulate(new)), list(accumulate(lengths))
        spans = (Span(q - n, q, k - m, k) for q, n, k, m in zip(q_ends, new, k_ends, lengths, strict=True))
        return cls(tuple(spans), q_ends[-1] if q_ends else 0, cached_slots(req_to_token, batch, lengths))
