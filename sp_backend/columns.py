"""A plan's instructions as arrays, one row each: what plans of many ranks are written, pruned and costed in. Pure: no
torch.

64 ranks have 10,000 to a million instructions, so nothing here looks at one alone. Rows keep the plan's order: by
round, and within one as its strategy wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Final, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sp_backend.layout import CAUSAL, FULL, KV, STATE, Block, Layout, Operand, Q
from sp_backend.plan import Attend, Plan, Round, Transfer

Column = NDArray[np.int32]
Flags = NDArray[np.bool_]
Index = NDArray[np.integer[Any]]
OPERANDS: Final[tuple[Operand, ...]] = (Q, KV, STATE)
_EMPTY, _CAUSAL, _FULL = range(3)


class Transfers(NamedTuple):
    round: Column
    src: Column
    dst: Column
    operand: Column  # index into OPERANDS
    chunk: Column
    lo: Column  # heads
    hi: Column
    piece: Column
    pieces: Column


class Attends(NamedTuple):
    round: Column
    rank: Column
    q: Column  # chunk
    kv: Column  # chunk
    lo: Column
    hi: Column
    piece: Column
    pieces: Column
    causal: Column


_Rows = TypeVar("_Rows", Transfers, Attends)


@dataclass(frozen=True, eq=False)
class Columns:
    transfers: Transfers
    attends: Attends
    num_rounds: int

    @cached_property
    def transfer_bounds(self) -> list[int]:
        """Rows of round i: those from the i-th of these to the next."""
        return _bounds(self.transfers.round, self.num_rounds)

    @cached_property
    def attend_bounds(self) -> list[int]:
        return _bounds(self.attends.round, self.num_rounds)


def _bounds(rounds: Column, number: int) -> list[int]:
    return [int(i) for i in np.searchsorted(rounds, np.arange(number + 1))]


def take(rows: _Rows, which: NDArray[Any]) -> _Rows:
    """Some of the rows."""
    return type(rows)(*(column[which] for column in rows))


class Draft:
    """A plan that a strategy writes, a whole family of instructions at a time.

    What describes an instruction (round, ranks, heads, piece) is a number or an array; they are broadcast together.
    Chunks have one axis more: all of one index travel, or are attended, alike. Within a round the rows of one call
    come in the order of their indices, after those of earlier calls.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._transfers: list[Transfers] = []
        self._attends: list[Attends] = []

    def send(
        self,
        operand: Operand,
        chunks: ArrayLike,
        *,
        round: ArrayLike,
        src: ArrayLike,
        dst: ArrayLike,
        heads: tuple[ArrayLike, ArrayLike] | None = None,
        piece: tuple[ArrayLike, int] = (0, 1),
    ) -> None:
        """chunks [..., number]"""
        lo, hi = self._layout.all_heads if heads is None else heads
        one = [np.asarray(x)[..., None] for x in (round, src, dst, lo, hi, piece[0])]
        when, source, target, first, last, part, chunk = _flat(*one, np.asarray(chunks))
        code = np.full(len(chunk), OPERANDS.index(operand), np.int32)
        pieces = np.full(len(chunk), piece[1], np.int32)
        self._transfers.append(Transfers(when, source, target, code, chunk, first, last, part, pieces))

    def attend(
        self,
        q: ArrayLike,
        kv: ArrayLike,
        *,
        round: ArrayLike,
        rank: ArrayLike,
        heads: tuple[ArrayLike, ArrayLike] | None = None,
        piece: tuple[ArrayLike, int] = (0, 1),
    ) -> None:
        """Every pair of q [..., number] and kv [..., number] that the mask leaves something of."""
        lo, hi = self._layout.all_heads if heads is None else heads
        masks = mask_table(self._layout)
        one = [np.asarray(x)[..., None, None] for x in (round, rank, lo, hi, piece[0])]
        queries, keys = np.asarray(q)[..., :, None], np.asarray(kv)[..., None, :]
        when, where, first, last, part, query, key = np.broadcast_arrays(*one, queries, keys)
        mask = masks[query, key]
        seen = mask != _EMPTY
        rows = [x[seen].astype(np.int32) for x in (when, where, query, key, first, last, part)]
        pieces = np.full(len(rows[0]), piece[1], np.int32)
        self._attends.append(Attends._make([*rows, pieces, (mask[seen] == _CAUSAL).astype(np.int32)]))

    def rounds(self) -> Rounds:
        transfers, attends = join(Transfers, self._transfers), join(Attends, self._attends)
        last = max((int(x.max()) for x in (transfers.round, attends.round) if len(x)), default=-1)
        return Rounds(Columns(transfers, attends, last + 1))


class Rounds(Sequence[Round]):
    """A plan's rounds, made of its columns when somebody looks at one."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    @cached_property
    def _rounds(self) -> tuple[Round, ...]:
        return tuple(_rounds_of(self.columns))

    def of_rank(self, rank: int) -> Iterator[Round]:
        """With no other rank's instructions."""
        t, a = self.columns.transfers, self.columns.attends
        mine = Columns(
            take(t, np.flatnonzero((t.src == rank) | (t.dst == rank))),
            take(a, np.flatnonzero(a.rank == rank)),
            self.columns.num_rounds,
        )
        return _rounds_of(mine)

    @overload
    def __getitem__(self, index: int) -> Round: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Round, ...]: ...

    def __getitem__(self, index: int | slice) -> Round | tuple[Round, ...]:
        return self._rounds[index]

    def __len__(self) -> int:
        return self.columns.num_rounds

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._rounds == tuple(other)

    def __hash__(self) -> int:
        return hash(self._rounds)

    def __repr__(self) -> str:
        return repr(self._rounds)


def columns_of(plan: Plan) -> Columns:
    """Of a plan whose attends are well formed: operands Q and KV, of the same heads."""
    if isinstance(plan.rounds, Rounds):
        return plan.rounds.columns
    transfers = [
        (when, t.src, t.dst, OPERANDS.index(t.block.operand), t.block.chunk, *t.block.heads, *t.block.piece)
        for when, r in enumerate(plan.rounds)
        for t in r.transfers
    ]
    attends = [
        (when, a.rank, a.q.chunk, a.kv.chunk, *a.q.heads, *a.kv.piece, int(a.mask == CAUSAL))
        for when, r in enumerate(plan.rounds)
        for a in r.attends
    ]
    return Columns(
        Transfers(*np.array(transfers, np.int32).reshape(-1, 9).T.copy()),
        Attends(*np.array(attends, np.int32).reshape(-1, 9).T.copy()),
        len(plan.rounds),
    )


def _rounds_of(columns: Columns) -> Iterator[Round]:
    blocks: dict[tuple[int, ...], Block] = {}

    def block(*key: int) -> Block:
        if key not in blocks:
            operand, chunk, lo, hi, piece, pieces = key
            blocks[key] = Block(OPERANDS[operand], chunk, (lo, hi), (piece, pieces))
        return blocks[key]

    transfers = [
        Transfer(block(*key), src, dst)
        for _, src, dst, *key in zip(*(column.tolist() for column in columns.transfers), strict=True)
    ]
    attends = [
        Attend(rank, block(0, q, lo, hi, 0, 1), block(1, kv, lo, hi, i, n), CAUSAL if causal else FULL)
        for _, rank, q, kv, lo, hi, i, n, causal in zip(*(c.tolist() for c in columns.attends), strict=True)
    ]
    pairs = zip(pairwise(columns.transfer_bounds), pairwise(columns.attend_bounds), strict=True)
    for (first, last), (since, until) in pairs:
        yield Round(tuple(transfers[first:last]), tuple(attends[since:until]))


def links_of(columns: Columns) -> list[list[tuple[int, int]]]:
    """Per round: the links in use, in the order of their first transfer."""
    links = list(zip(columns.transfers.src.tolist(), columns.transfers.dst.tolist(), strict=True))
    bounds = columns.transfer_bounds
    return [list(dict.fromkeys(links[a:b])) for a, b in zip(bounds, bounds[1:], strict=False)]


@lru_cache(maxsize=64)
def mask_table(layout: Layout) -> NDArray[np.int8]:
    """Layout.mask of every pair of a query chunk and a key chunk: 0 is empty, 1 causal, 2 full."""
    group = np.array([layout.group_of(c) for c in range(layout.num_chunks)])
    q, kv = np.arange(layout.num_new)[:, None], np.arange(layout.num_chunks)[None]
    together = group[q] == group[kv]
    full = together & (kv < layout.num_new) & (layout.kind != "home")
    if layout.causal:
        full &= kv < q
    if layout.history == "copies":
        owner = np.array([layout.owner(c) for c in range(layout.num_chunks)])
        full |= (kv >= layout.num_new) & (owner[q] == owner[kv])
    elif layout.history != "none":
        full |= (kv >= layout.num_new) & (together | (layout.history == "all"))
    full |= q == kv
    masks = np.where(full, _FULL, _EMPTY)
    masks[(q == kv) & layout.causal] = _CAUSAL
    return masks.astype(np.int8)


def _flat(*arrays: NDArray[Any]) -> list[Column]:
    return [x.astype(np.int32).ravel() for x in np.broadcast_arrays(*arrays)]


def join(kind: type[_Rows], parts: Sequence[_Rows]) -> _Rows:
    """All rows, by round."""
    if not parts:
        return kind(*(np.empty(0, np.int32) for _ in kind._fields))
    rows = parts[0] if len(parts) == 1 else kind(*map(np.concatenate, zip(*parts, strict=True)))
    if np.all(rows.round[1:] >= rows.round[:-1]):
        return rows
    return take(rows, np.argsort(rows.round, kind="stable"))
