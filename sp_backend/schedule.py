"""A rank's program with the sizes of one step filled in: byte counts, shapes, kernel work. Made once a step.

Empty blocks are left out here, on both ends alike, since every rank derives the same geometry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from sp_backend.geometry import Geometry, Positions, Ranges, block_bytes, query_key_pairs
from sp_backend.kernels import Attention, HeadMap, Kernel, Span, Work
from sp_backend.layout import KV, Block, Layout
from sp_backend.plan import Plan
from sp_backend.program import Call, Program, Use

_FEW_QUERIES = 16  # for fewer, copying keys costs as much as attending them
_MANY_KEYS = 4096  # of one block: from there on a call of its own costs nothing, and joining them doubles the memory


@dataclass(frozen=True, slots=True)
class Section:
    """A block's place in a message."""

    use: Use
    rows: int
    first: int  # byte
    last: int


@dataclass(frozen=True, slots=True)
class Envelope:
    peer: int
    num_bytes: int
    sections: tuple[Section, ...]


@dataclass(frozen=True, slots=True)
class Slice:
    """How to cut a block out of the held block that contains it."""

    held: Block
    heads: tuple[int, int] | None  # of the held tensor's head axis; None: all
    rows: tuple[tuple[int, int], ...] | None  # None: all


@dataclass(frozen=True, slots=True)
class CallPart:
    """A query block and its place in a call."""

    block: Block
    slice: Slice
    rows: tuple[int, int]
    heads: tuple[int, int]


@dataclass(frozen=True, slots=True)
class KernelCall:
    """Attends query chunks, one below the other, that may each be made of groups of heads side by side."""

    qs: tuple[CallPart, ...]
    num_rows: int
    num_heads: int
    kvs: tuple[Slice, ...]
    keys: tuple[tuple[int, int, int], ...]  # (index of kvs, first row, last row), to be joined; empty for one KV block
    attend: Attention


@dataclass(frozen=True, slots=True)
class ScheduledRound:
    receives: tuple[Envelope, ...]
    sends: tuple[Envelope, ...]
    calls: tuple[KernelCall, ...]
    dead: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    rounds: tuple[ScheduledRound, ...]
    rows: dict[int, int]  # query chunk -> rows
    slices: dict[Use, Slice]
    query_key_pairs: float  # of this rank, for one layer


@dataclass(frozen=True, slots=True)
class ScheduleBuilder:
    """What does not change from step to step."""

    plan: Plan
    program: Program
    rank: int
    kernel: Kernel
    head_dim: int
    itemsize: int
    scale: float
    device: torch.device

    def build(self, geometry: Geometry, window: int | None) -> Schedule:
        layout = self.plan.layout
        if window is not None and not layout.causal:
            raise ValueError("a sliding window needs causal attention")
        slices: dict[Use, Slice] = {}
        rounds = []
        for r in self.program.rounds:
            receives = [self._envelope(geometry, m.peer, [Use(b, b) for b in m.blocks]) for m in r.receives]
            sends = [self._envelope(geometry, m.peer, m.uses) for m in r.sends]
            calls = [call for c in r.calls for call in self._calls(geometry, window, c)]
            rounds.append(
                ScheduledRound(
                    tuple(e for e in receives if e.sections),
                    tuple(e for e in sends if e.sections),
                    tuple(calls),
                    r.dead,
                )
            )
            slices |= {s.use: _slice(layout, geometry, s.use) for e in sends for s in e.sections}
        rows = {c: sum(r[c] for r in geometry.rows) for c in range(layout.num_new)}
        return Schedule(tuple(rounds), rows, slices, query_key_pairs(self.plan, geometry, self.rank))

    def _envelope(self, geometry: Geometry, peer: int, uses: Sequence[Use]) -> Envelope:
        rows = [(u, geometry.num_rows(u.block)) for u in uses]
        rows = [(u, n) for u, n in rows if n]
        sizes = [block_bytes(self.plan.layout, u.block, n, self.head_dim, self.itemsize) for u, n in rows]
        ends = list(accumulate(sizes))
        sections = (Section(u, n, end - size, end) for (u, n), size, end in zip(rows, sizes, ends, strict=True))
        return Envelope(peer, sum(sizes), tuple(sections))

    def _calls(self, geometry: Geometry, window: int | None, call: Call) -> list[KernelCall]:
        """The call with its keys joined if that pays and, under a window, none, since positions must ascend."""
        num_queries = sum(geometry.num_rows(uses[0].block) for uses in call.qs)
        pays = num_queries >= _FEW_QUERIES and all(geometry.num_rows(kv.block) <= _MANY_KEYS for kv in call.kvs)
        together = len(call.kvs) == 1 or (pays and window is None)
        made = [self._call(geometry, window, c) for c in ([call] if together else call.apart())]
        return [c for c in made if c is not None]

    def _call(self, geometry: Geometry, window: int | None, call: Call) -> KernelCall | None:
        spans: list[Span] = []
        parts: list[CallPart] = []
        first = 0
        prefixes = _prefixes(geometry, call.kvs)
        for uses, seen in zip(call.qs, call.num_seen, strict=True):
            q_spans = geometry.spans(uses[0].block)
            met = [
                Span(first + q_lo, first + q_hi, k_lo, k_hi)
                for (q_lo, q_hi), (k_lo, k_hi) in zip(q_spans, prefixes[seen], strict=True)
                if q_hi > q_lo and k_hi > k_lo
            ]
            if met:
                rows = (first, first + q_spans[-1][1])
                parts += [self._part(geometry, use, rows, call.kvs[0].block.heads[0]) for use in uses]
                spans += met
                first = rows[1]
        if not spans:
            return None
        kvs = [kv for kv in call.kvs if geometry.num_rows(kv.block)]  # empty blocks do not travel
        work = self._work(geometry, window, call, spans, parts)
        return KernelCall(
            qs=tuple(parts),
            num_rows=first,
            num_heads=work.heads.num_heads,
            kvs=tuple(_slice(self.plan.layout, geometry, kv) for kv in kvs),
            keys=_joined(geometry, kvs) if len(kvs) > 1 else (),
            attend=self.kernel(work),
        )

    def _part(self, geometry: Geometry, use: Use, rows: tuple[int, int], first_head: int) -> CallPart:
        lo, hi = use.block.heads
        where = _slice(self.plan.layout, geometry, use)
        return CallPart(use.block, where, rows, (lo - first_head, hi - first_head))

    def _work(
        self, geometry: Geometry, window: int | None, call: Call, spans: list[Span], parts: list[CallPart]
    ) -> Work:
        layout, kv = self.plan.layout, call.kvs[0].block
        q_positions = k_positions = None
        if window is not None:
            q_positions = self._positions(geometry, [p.block for p in parts if p.heads[0] == 0])
            k_positions = self._positions(geometry, [kv])
        return Work(
            spans=tuple(spans),
            causal=call.causal if window is None else layout.causal,
            heads=HeadMap(*kv.heads, layout.num_heads // layout.num_kv_heads),
            head_dim=self.head_dim,
            scale=self.scale,
            num_queries=parts[-1].rows[1],
            window=window,
            q_positions=q_positions,
            k_positions=k_positions,
        )

    def _positions(self, geometry: Geometry, blocks: Sequence[Block]) -> Tensor:
        parts: list[Positions] = [geometry.block_positions(b) for b in blocks]
        return torch.from_numpy(np.concatenate(parts)).to(self.device)


def _prefixes(geometry: Geometry, kvs: Sequence[Use]) -> list[Ranges]:
    """[n][sequence] -> the rows of the sequence's first n KV blocks, when those of all are joined."""
    rows = [[hi - lo for lo, hi in geometry.spans(kv.block)] for kv in kvs]
    firsts = list(accumulate((sum(of_sequence) for of_sequence in zip(*rows, strict=True)), initial=0))[:-1]
    ends = accumulate(rows, lambda before, more: [a + b for a, b in zip(before, more, strict=True)], initial=firsts)
    return [list(zip(firsts, end, strict=True)) for end in ends]


def _joined(geometry: Geometry, kvs: Sequence[Use]) -> tuple[tuple[int, int, int], ...]:
    """Sequence by sequence, its rows of each KV block: (index of the block, first row, last row)."""
    spans = [geometry.spans(kv.block) for kv in kvs]
    of_sequences = zip(*spans, strict=True)
    return tuple((i, lo, hi) for of_blocks in of_sequences for i, (lo, hi) in enumerate(of_blocks) if hi > lo)


def _slice(layout: Layout, geometry: Geometry, use: Use) -> Slice:
    block, held = use.block, use.held
    heads, base = block.heads, held.heads[0]
    if block.operand == KV:
        heads, base = layout.kv_heads(block.heads), layout.kv_heads(held.heads)[0]
    rows = None
    if block.piece != held.piece:
        inner, outer, at = geometry.ranges(block), geometry.ranges(held), geometry.spans(held)
        rows = tuple(
            (lo - first + start, hi - first + start)
            for (lo, hi), (first, _), (start, _) in zip(inner, outer, at, strict=True)
        )
    same = block.heads == held.heads
    return Slice(held, None if same else (heads[0] - base, heads[1] - base), rows)
