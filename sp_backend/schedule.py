"""A rank's program with the sizes of one step filled in: byte counts, shapes, kernel work. Made once a step.

Empty blocks are left out here, on both ends alike, since every rank derives the same geometry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sp_backend.geometry import Geometry, Positions, Ranges, block_bytes, query_key_pairs
from sp_backend.kernels import Attention, HeadMap, Kernel, Span, Work
from sp_backend.kv_cache import Ints, Rows
from sp_backend.layout import KV, Block
from sp_backend.pieces import in_pieces, num_pieces
from sp_backend.plan import Plan
from sp_backend.program import Call, Program, Use, compile_rank

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
    pages: Rows | None = None  # where to read it if it is not held as a tensor of its own


class PagedKeys(NamedTuple):
    """The keys of a call, in pages."""

    heads: tuple[int, int] | None  # of the pages' head axis; None: all
    rows: tuple[int, int] | None  # None: all pages, the kernel knows the rows


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
    paged: PagedKeys | None  # or else ...
    kvs: tuple[Slice, ...]
    keys: tuple[tuple[int, int, int], ...]  # (index of kvs, first row, last row), to be joined; empty for one KV block
    attend: Attention
    side_by_side: bool  # queries are groups of heads


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
class _Step:
    geometry: Geometry
    window: int | None
    places: Mapping[int, Rows]
    paged: tuple[int, ...]  # chunks that have places, by position: history, then new ones


@dataclass(frozen=True, slots=True)
class ScheduleBuilder:
    """What does not change from step to step."""

    plan: Plan
    rank: int
    kernel: Kernel
    head_dim: int
    itemsize: int
    scale: float
    device: torch.device
    most_history: int | None  # keys of other ranks' that come in one round; None: none come
    _programs: dict[tuple[tuple[int, ...], int], Program] = field(default_factory=dict)  # (paged chunks, pieces)

    def build(self, geometry: Geometry, window: int | None, places: Mapping[int, Rows]) -> Schedule:
        layout = self.plan.layout
        if window is not None and not layout.causal:
            raise ValueError("a sliding window needs causal attention")
        step = _Step(geometry, window, places, tuple(sorted(places, key=lambda c: (c < layout.num_new, c))))
        slices: dict[Use, Slice] = {}
        rounds = []
        for r in self.program(step.paged, self._num_pieces(geometry)).rounds:
            receives = [self._envelope(geometry, m.peer, [Use(b, b) for b in m.blocks]) for m in r.receives]
            sends = [self._envelope(geometry, m.peer, m.uses) for m in r.sends]
            calls = [call for c in r.calls for call in self._calls(step, c)]
            rounds.append(
                ScheduledRound(
                    tuple(e for e in receives if e.sections),
                    tuple(e for e in sends if e.sections),
                    tuple(calls),
                    r.dead,
                )
            )
            slices |= {s.use: self._slice(step, s.use) for e in sends for s in e.sections}
        rows = {c: sum(r[c] for r in geometry.rows) for c in range(layout.num_new)}
        return Schedule(tuple(rounds), rows, slices, query_key_pairs(self.plan, geometry, self.rank))

    def program(self, paged: tuple[int, ...], pieces: int = 1) -> Program:
        """paged: see compile_rank. pieces: of other ranks' history."""
        if (paged, pieces) not in self._programs:
            self._programs[paged, pieces] = compile_rank(in_pieces(self.plan, pieces), self.rank, paged)
        return self._programs[paged, pieces]

    def _num_pieces(self, geometry: Geometry) -> int:
        if self.most_history is None:
            return 1
        return num_pieces(self.plan.layout, geometry, self.most_history)

    def _envelope(self, geometry: Geometry, peer: int, uses: Sequence[Use]) -> Envelope:
        rows = [(u, geometry.num_rows(u.block)) for u in uses]
        rows = [(u, n) for u, n in rows if n]
        sizes = [block_bytes(self.plan.layout, u.block, n, self.head_dim, self.itemsize) for u, n in rows]
        ends = list(accumulate(sizes))
        sections = (Section(u, n, end - size, end) for (u, n), size, end in zip(rows, sizes, ends, strict=True))
        return Envelope(peer, sum(sizes), tuple(sections))

    def _calls(self, step: _Step, call: Call) -> list[KernelCall]:
        """The call with its keys joined if that pays and, under a window, none, since positions must ascend.

        Keys in pages are joined without a copy; their positions ascend if history is first.
        """
        rows = step.geometry.num_rows
        num_queries = sum(rows(uses[0].block) for uses in call.qs)
        pays = num_queries >= _FEW_QUERIES and all(rows(kv.block) <= _MANY_KEYS for kv in call.kvs)
        if _paged(step, call):
            order = [step.paged.index(kv.block.chunk) for kv in call.kvs]
            pays = step.window is None or order == sorted(order)
        elif step.window is not None:
            pays = False
        together = pays or len(call.kvs) == 1
        made = [self._call(step, c) for c in ([call] if together else call.apart())]
        return [c for c in made if c is not None]

    def _call(self, step: _Step, call: Call) -> KernelCall | None:
        geometry = step.geometry
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
                parts += [self._part(step, use, rows, call.kvs[0].block.heads[0]) for use in uses]
                spans += met
                first = rows[1]
        if not spans:
            return None
        kvs = [kv for kv in call.kvs if geometry.num_rows(kv.block)]  # empty blocks do not travel
        joined = _joined(geometry, kvs)
        slices = [self._slice(step, kv) for kv in kvs]
        pages = None
        if _paged(step, call):
            places = [_place(step, kv.block) for kv in kvs]
            pages = Rows(np.concatenate([places[i][lo:hi] for i, lo, hi in joined]), self.device)
        work = self._work(step, call, spans, parts, pages, [(kvs[i].block, lo, hi) for i, lo, hi in joined])
        return KernelCall(
            qs=tuple(parts),
            num_rows=first,
            num_heads=work.heads.num_heads,
            paged=None if pages is None else _paged_keys(slices[0], pages),
            kvs=tuple(slices),
            keys=joined if len(kvs) > 1 else (),
            attend=self.kernel(work),
            side_by_side=any(part.heads != (0, work.heads.num_heads) for part in parts),
        )

    def _part(self, step: _Step, use: Use, rows: tuple[int, int], first_head: int) -> CallPart:
        lo, hi = use.block.heads
        where = self._slice(step, use)
        return CallPart(use.block, where, rows, (lo - first_head, hi - first_head))

    def _work(
        self,
        step: _Step,
        call: Call,
        spans: list[Span],
        parts: list[CallPart],
        pages: Rows | None,
        keys: list[tuple[Block, int, int]],
    ) -> Work:
        layout, kv = self.plan.layout, call.kvs[0].block
        q_positions = k_positions = None
        if step.window is not None:
            positions = step.geometry.block_positions
            q_positions = self._tensor([positions(p.block) for p in parts if p.heads[0] == 0])
            k_positions = self._tensor([positions(block)[lo:hi] for block, lo, hi in keys])
        return Work(
            spans=tuple(spans),
            causal=call.causal if step.window is None else layout.causal,
            heads=HeadMap(*kv.heads, layout.num_heads // layout.num_kv_heads),
            head_dim=self.head_dim,
            scale=self.scale,
            num_queries=parts[-1].rows[1],
            window=step.window,
            q_positions=q_positions,
            k_positions=k_positions,
            k_rows=None if pages is None or pages.contiguous else pages.index,
        )

    def _tensor(self, parts: list[Positions]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    def _slice(self, step: _Step, use: Use) -> Slice:
        layout, geometry, (block, held) = self.plan.layout, step.geometry, use
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
        pages = None
        if block.operand == KV and block.chunk in step.places:
            pages = Rows(_place(step, block), self.device)
        return Slice(held, None if same else (heads[0] - base, heads[1] - base), rows, pages)


def _paged(step: _Step, call: Call) -> bool:
    return call.kvs[0].held.chunk in step.places


def _place(step: _Step, block: Block) -> Ints:
    """The rows in pages of a block's keys, sequence by sequence."""
    slots, whole = step.places[block.chunk].slots, step.geometry.spans(block._replace(piece=(0, 1)))
    if block.piece == (0, 1):
        return slots
    parts = zip(whole, step.geometry.ranges(block), strict=True)
    return np.concatenate([slots[first + lo : first + hi] for (first, _), (lo, hi) in parts])


def _paged_keys(part: Slice, pages: Rows) -> PagedKeys:
    return PagedKeys(part.heads, (pages.low, pages.low + len(pages)) if pages.contiguous else None)


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
