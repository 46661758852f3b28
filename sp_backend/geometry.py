"""The sizes of one step: how many rows of each sequence every chunk has. Pure: no torch.

All ranks derive the same geometry, other ranks' history included, so that buffer sizes agree without asking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from sp_backend.layout import CAUSAL, KV, STATE, Block, Layout
from sp_backend.plan import Plan

Positions = NDArray[np.int64]


def piece_rows(rows: int, piece: tuple[int, int]) -> tuple[int, int]:
    """The half-open range of a chunk's rows that piece (i, n) is."""
    i, n = piece
    return rows * i // n, rows * (i + 1) // n


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """positions[s][c] are absolute, ascending, one a row; needed only under a sliding window."""

    rows: Sequence[Sequence[int]]  # [sequence][chunk], history chunks included
    positions: Sequence[Sequence[Positions]] | None = None

    def __post_init__(self) -> None:
        assert self.positions is None or [[len(p) for p in c] for c in self.positions] == [
            list(c) for c in self.rows
        ], "one position a row"

    @property
    def num_sequences(self) -> int:
        return len(self.rows)

    def num_rows(self, block: Block) -> int:
        """Rows of a block, all sequences."""
        if block.piece == (0, 1):
            return sum(r[block.chunk] for r in self.rows)
        return sum(hi - lo for lo, hi in self.ranges(block))

    def ranges(self, block: Block) -> list[tuple[int, int]]:
        """Each sequence's rows of a block, as a range of its own rows in the chunk."""
        return [piece_rows(r[block.chunk], block.piece) for r in self.rows]

    def spans(self, block: Block) -> list[tuple[int, int]]:
        """Each sequence's rows of a block, as a range of the block's rows (sequences follow each other)."""
        ends = list(accumulate((hi - lo for lo, hi in self.ranges(block)), initial=0))
        return list(zip(ends, ends[1:], strict=False))

    def block_positions(self, block: Block) -> Positions:
        """Positions of a block's rows, all sequences."""
        assert self.positions is not None, "a sliding window needs positions"
        parts = [
            p[block.chunk][lo:hi] for p, (lo, hi) in zip(self.positions, self.ranges(block), strict=True)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def block_bytes(layout: Layout, block: Block, rows: int, head_dim: int, itemsize: int) -> int:
    """Bytes on the wire: a state is its out in the model's dtype and its lse in fp32."""
    if block.operand == KV:
        lo, hi = layout.kv_heads(block.heads)
        return rows * 2 * (hi - lo) * head_dim * itemsize
    width = head_dim * itemsize + (4 if block.operand == STATE else 0)
    return rows * (block.heads[1] - block.heads[0]) * width


def predicted_bytes(
    plan: Plan, geometry: Geometry, head_dim: int, itemsize: int
) -> list[Counter[tuple[int, int]]]:
    """Per round: bytes from rank src to rank dst, by (src, dst)."""
    rounds = []
    for r in plan.rounds:
        links: Counter[tuple[int, int]] = Counter()
        for t in r.transfers:
            rows = geometry.num_rows(t.block)
            links[t.src, t.dst] += block_bytes(plan.layout, t.block, rows, head_dim, itemsize)
        rounds.append(+links)
    return rounds


def visible_pairs(queries: int, keys: int, causal: bool) -> int:
    """Pairs under a bottom-right aligned causal mask, or all."""
    if not causal:
        return queries * keys
    seen = min(queries, keys)  # rows that see anything
    return seen * keys - seen * (seen - 1) // 2


def query_key_pairs(plan: Plan, geometry: Geometry, rank: int) -> float:
    """Visible (query, key) pairs that a rank attends, each weighted by its share of the heads. Ignores
    windows.
    """
    weighted = 0
    for r in plan.rounds:
        for a in r.attends:
            if a.rank == rank:
                weighted += (a.q.heads[1] - a.q.heads[0]) * sum(
                    visible_pairs(qh - ql, kh - kl, a.mask == CAUSAL)
                    for (ql, qh), (kl, kh) in zip(geometry.ranges(a.q), geometry.ranges(a.kv), strict=True)
                )
    return weighted / plan.layout.num_heads
