"""The sizes of one step: how many rows of each sequence every chunk has. Pure: no torch.

All ranks derive the same geometry, other ranks' history included, so that buffer sizes agree without asking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sp_backend.columns import columns_of
from sp_backend.forms import forms_of
from sp_backend.layout import CAUSAL, KV, STATE, Block, Layout
from sp_backend.plan import Plan

Positions = NDArray[np.int64]


Rows = TypeVar("Rows", int, NDArray[np.int64])


def piece_rows(rows: Rows, piece: tuple[int, int]) -> tuple[Rows, Rows]:
    """The half-open range of a chunk's rows that piece (i, n) is."""
    i, n = piece
    return rows * i // n, rows * (i + 1) // n


Ranges = list[tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """positions[s][c] are absolute, ascending, one a row; needed only under a sliding window."""

    rows: Sequence[Sequence[int]]  # [sequence][chunk], history chunks included
    positions: Sequence[Sequence[Positions]] | None = None
    _ranges: dict[tuple[int, tuple[int, int]], Ranges] = field(default_factory=dict, init=False, repr=False)
    _spans: dict[tuple[int, tuple[int, int]], Ranges] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.positions is None or [[len(p) for p in c] for c in self.positions] == [
            list(c) for c in self.rows
        ], "one position a row"

    def num_rows(self, block: Block) -> int:
        """Rows of a block, all sequences."""
        spans = self.spans(block)
        return spans[-1][1] if spans else 0

    def ranges(self, block: Block) -> Ranges:
        """Each sequence's rows of a block, as a range of its own rows in the chunk."""
        key = block.chunk, block.piece
        if key not in self._ranges:
            self._ranges[key] = [piece_rows(r[block.chunk], block.piece) for r in self.rows]
        return self._ranges[key]

    def spans(self, block: Block) -> Ranges:
        """Each sequence's rows of a block, as a range of the block's rows (sequences follow each other)."""
        key = block.chunk, block.piece
        if key not in self._spans:
            ends = list(accumulate((hi - lo for lo, hi in self.ranges(block)), initial=0))
            self._spans[key] = list(pairwise(ends))
        return self._spans[key]

    def chunk_spans(self, chunk: int) -> Ranges:
        """Those of the block that is a whole chunk."""
        return self.spans(Block(KV, chunk, (0, 1)))

    def block_positions(self, block: Block) -> Positions:
        """Positions of a block's rows, all sequences."""
        assert self.positions is not None, "a sliding window needs positions"
        parts = [p[block.chunk][lo:hi] for p, (lo, hi) in zip(self.positions, self.ranges(block), strict=True)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def block_bytes(layout: Layout, block: Block, rows: int, head_dim: int, itemsize: int) -> int:
    """Bytes on the wire: a state is its out in the model's dtype and its lse in fp32."""
    if block.operand == KV:
        lo, hi = layout.kv_heads(block.heads)
        return rows * 2 * (hi - lo) * head_dim * itemsize
    width = head_dim * itemsize + (4 if block.operand == STATE else 0)
    return rows * (block.heads[1] - block.heads[0]) * width


def predicted_bytes(plan: Plan, geometry: Geometry, head_dim: int, itemsize: int) -> list[Counter[tuple[int, int]]]:
    """Per round: bytes from rank src to rank dst, by (src, dst)."""
    columns = columns_of(plan)
    forms, t, ranks = forms_of(columns), columns.transfers, plan.layout.num_ranks
    rows = [[geometry.num_rows(Block(KV, c, (0, 1), cut)) for c in range(plan.layout.num_chunks)] for cut in forms.cuts]
    width = [block_bytes(plan.layout, forms.block(i, 0), 1, head_dim, itemsize) for i in range(forms.number)]
    size = np.array(rows)[forms.sent_cut, t.chunk] * np.array(width)[forms.transfer]
    links, index = np.unique((t.round * ranks + t.src) * ranks + t.dst, return_inverse=True)
    total = np.bincount(index.ravel(), size, len(links)).astype(int).tolist()
    rounds = [Counter[tuple[int, int]]() for _ in range(columns.num_rounds)]
    for link, num_bytes in zip(links.tolist(), total, strict=True):
        if num_bytes:
            rounds[link // ranks**2][link // ranks % ranks, link % ranks] = num_bytes
    return rounds


def visible_pairs(queries: int, keys: int, causal: bool) -> int:
    """Pairs under a bottom-right aligned causal mask, or all."""
    if not causal:
        return queries * keys
    seen = min(queries, keys)  # rows that see anything
    return seen * keys - seen * (seen - 1) // 2


def query_key_pairs(plan: Plan, geometry: Geometry, rank: int) -> float:
    """Visible (query, key) pairs that a rank attends, weighted by its share of the heads; windows are ignored."""
    weighted = 0
    for r in plan.rounds:
        for a in r.attends:
            if a.rank == rank:
                spans = zip(geometry.spans(a.q), geometry.spans(a.kv), strict=True)
                pairs = (visible_pairs(qh - ql, kh - kl, a.mask == CAUSAL) for (ql, qh), (kl, kh) in spans)
                weighted += (a.q.heads[1] - a.q.heads[0]) * sum(pairs)
    return weighted / plan.layout.num_heads
