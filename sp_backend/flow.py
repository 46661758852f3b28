"""What each rank does in each round of a plan, in the executor's order, as arrays: the structure that cost.py and
simulate.py put times to. Pure: no torch, no sizes, no times.

It is what program.py works out for one rank, for all ranks at once: a plan of many ranks has a million instructions,
which are not looked at one by one. A message is one link's blocks of one round; a rank waits for it once, at its first
use. Rounds are those of the plan and one more, in which what arrived last is folded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sp_backend.calls import CallFinder, Calls, Holdings, Keys, Parts
from sp_backend.columns import OPERANDS, Columns, Flags, Index, columns_of
from sp_backend.forms import Forms, forms_of
from sp_backend.grouping import classes, first_of_each, last_of_each, place_in_run
from sp_backend.layout import KV, STATE, Layout, Q
from sp_backend.plan import Plan

_Q, _KV, _STATE = (OPERANDS.index(x) for x in (Q, KV, STATE))


class Messages(NamedTuple):
    """One link's blocks of a round, by round, and in it by their first transfer."""

    round: Index
    src: Index
    dst: Index


class Waits(NamedTuple):
    """For messages that a rank received, in a round; by round and rank."""

    round: Index
    rank: Index
    message: Index


class Folds(NamedTuple):
    """States that arrived the round before, merged: before sending, where one of their chunk is sent on, or at the end
    of the round. By round.
    """

    round: Index
    rank: Index
    message: Index
    chunk: Index
    heads: Index  # how many
    before: Flags


class Copies(NamedTuple):
    """Blocks packed into their message, each only if the block `beside` has rows too. Both are rows of transfers."""

    round: Index
    rank: Index
    transfer: Index
    beside: Index


@dataclass(frozen=True, slots=True)
class Flow:
    columns: Columns
    forms: Forms
    messages: Messages
    message_of: Index  # [transfers]
    waits: Waits  # before sending: for blocks that are sent on
    folds: Folds
    copies: Copies
    calls: Calls
    call_waits: Waits  # for operands; `round` is the call
    parts: Parts
    keys: Keys

    @property
    def num_rounds(self) -> int:
        return self.columns.num_rounds + 1

    def num_merges(self, rank: int) -> int:
        """Results and arrivals that a rank merges into a state."""
        results = self.calls.rank[self.parts.call[self.parts.merges]]
        return int((results == rank).sum() + (self.folds.rank == rank).sum())


def flow_of(plan: Plan, *, paged: bool = True) -> Flow:
    """Of a proven plan. paged: each rank has its own keys, cached and new, in pages, as servers do, and attends them
    in place; else they are tensors apart.

    Adjacent groups of heads that meet the same keys, as in decode, count as calls of their own.
    """
    return _Finder(plan.layout, columns_of(plan)).flow(paged)


class _Finder:
    def __init__(self, layout: Layout, columns: Columns) -> None:
        self._layout, self._columns, self._forms = layout, columns, forms_of(columns)
        t, ranks = columns.transfers, layout.num_ranks
        links, link = classes((t.round.astype(np.int64) * ranks + t.src) * ranks + t.dst)
        order = np.argsort(first_of_each(link))
        self._message_of = np.argsort(order)[link]
        self._messages = Messages(*np.unravel_index(links[order], (columns.num_rounds + 1, ranks, ranks)))
        self._find_blocks()

    def _find_blocks(self) -> None:
        layout, forms, t = self._layout, self._forms, self._columns.transfers
        shape = layout.num_ranks, forms.number, layout.num_chunks
        start, _ = forms.at_start(layout)
        low, high = np.array([layout.heads_of(r) for r in range(layout.num_ranks)]).T[..., None]
        self._whole = (forms.operand == _Q) & (forms.lo == low) & (forms.hi == high)  # [rank, form]: just what is held
        everything = (forms.lo == 0) & (forms.hi == layout.num_heads) & (forms.pieces == 1)
        self._whole = self._whole | ((forms.operand == _KV) & everything)
        blocks = np.flatnonzero(t.operand != _STATE)[::-1]  # of two that contain one, the first counts
        came = np.full(shape, -1, np.int32)
        self._arrived = np.zeros(shape, bool)  # just so
        self._arrived[t.dst[blocks], forms.transfer[blocks], t.chunk[blocks]] = True
        for form in classes(forms.transfer[blocks])[0]:
            rows = blocks[forms.transfer[blocks] == form]
            for inside in np.flatnonzero(forms.holds[form]):
                came[t.dst[rows], inside, t.chunk[rows]] = self._message_of[rows]
        self._held = Holdings(start, came)

    def flow(self, paged: bool) -> Flow:
        forms, t = self._forms, self._columns.transfers
        at = t.src, forms.transfer, t.chunk
        held = self._held.start[at]
        sent_on = np.flatnonzero(~held & (t.operand != _STATE))
        folds = self._folds()
        waits = Waits(t.round[sent_on], t.src[sent_on], self._held.came[at][sent_on])
        early = Waits(*(x[folds.before] for x in folds[:3]))
        finder = CallFinder(self._layout, self._columns, forms, self._held, folds.before, paged)
        calls, call, parts, keys = finder.find()
        return Flow(
            columns=self._columns,
            forms=forms,
            messages=self._messages,
            message_of=self._message_of,
            waits=self._once(Waits(*map(np.concatenate, zip(waits, early, strict=True)))),
            folds=folds,
            copies=self._copies(held),
            calls=calls,
            call_waits=self._operands(call),
            parts=parts,
            keys=keys,
        )

    def _folds(self) -> Folds:
        layout, t = self._layout, self._columns.transfers
        rows = np.flatnonzero(t.operand == _STATE)
        leaving = np.zeros((self._columns.num_rounds + 1, layout.num_ranks, layout.num_new), bool)
        leaving[t.round[rows], t.src[rows], t.chunk[rows]] = True
        when, where, chunk = t.round[rows] + 1, t.dst[rows], t.chunk[rows]
        heads = t.hi[rows] - t.lo[rows]
        return Folds(when, where, self._message_of[rows], chunk, heads, leaving[when, where, chunk])

    def _copies(self, held: Flags) -> Copies:
        """States, parts of a block, and cached next to new keys, which lie elsewhere, have to be packed."""
        t, forms, message = self._columns.transfers, self._forms, self._message_of
        number, state = len(t.round), t.operand == _STATE
        just_so = np.where(held, self._whole[t.src, forms.transfer], self._arrived[t.src, forms.transfer, t.chunk])
        own = held | state
        cached = np.flatnonzero(own & (t.operand == _KV) & (t.chunk >= self._layout.num_new))[::-1]
        first = np.full(len(self._messages.round), -1, np.intp)
        first[message[cached]] = cached
        first[np.bincount(message[own], minlength=len(first)) < 2] = -1
        beside = np.where(state | ~just_so, np.arange(number), first[message])
        rows = np.flatnonzero(beside >= 0)
        return Copies(t.round[rows], t.src[rows], rows, beside[rows])

    def _operands(self, call: Index) -> Waits:
        """For what each call [attends] reads."""
        a, forms, (start, came) = self._columns.attends, self._forms, self._held
        waits = []
        for form, chunk in ((forms.query, a.q), (forms.key, a.kv)):
            rows = np.flatnonzero(~start[a.rank, form, chunk])
            message = came[a.rank[rows], form[rows], chunk[rows]]
            assert (message >= 0).all(), "a block is not held; is the plan proven?"
            waits.append((call[rows], a.rank[rows], message))
        return self._once(Waits(*map(np.concatenate, zip(*waits, strict=True))), of_calls=True)

    def _once(self, waits: Waits, of_calls: bool = False) -> Waits:
        """Sorted, each once."""
        dst = self._messages.dst
        order = np.argsort(dst, kind="stable")
        number = np.empty(len(dst), np.int64)  # of a message, among those of its receiver
        number[order] = place_in_run(dst[order])
        place = (
            waits.round.astype(np.int64) if of_calls else waits.round * np.int64(self._layout.num_ranks) + waits.rank
        )
        _, row = classes(place * (int(number.max(initial=0)) + 1) + number[waits.message])
        return Waits(*(x[last_of_each(row)] for x in waits))
