"""What each rank does in each round of a plan, as arrays: operations.py for those who ask about all ranks at once.

The two say the same (a test compares them, plan by plan): that one is followed event by event by the simulator, this
one is what cost.py puts times to, where a million instructions are not looked at one by one. Pure: no torch, no sizes,
no times. Rounds are those of the plan and one more, in which what arrived last is folded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sp_backend.columns import OPERANDS, Columns, Flags, Forms, Index, columns_of
from sp_backend.layout import KV, STATE, Layout, Q
from sp_backend.plan import Plan

_Q, _KV, _STATE = (OPERANDS.index(x) for x in (Q, KV, STATE))


class Messages(NamedTuple):
    """One link's blocks of a round, by round."""

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
    of the round.
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


class Calls(NamedTuple):
    """Kernel calls, by round and rank; the turn-th of its rank and round."""

    round: Index
    rank: Index
    turn: Index


class Parts(NamedTuple):
    """A query chunk of a call, by call. causal: it meets its own chunk too. merges: its slot holds something."""

    call: Index
    q: Index
    heads: Index
    causal: Flags
    merges: Flags


class Keys(NamedTuple):
    """Blocks of keys that a part meets whole, by part."""

    part: Index
    chunk: Index
    cut: Index  # index into Flow.cuts


@dataclass(frozen=True, slots=True)
class Flow:
    columns: Columns
    forms: Forms
    cuts: list[tuple[int, int]]  # the pieces that there are
    messages: Messages
    message_of: Index  # [transfers]
    waits: Waits  # before sending: for blocks that are sent on
    folds: Folds
    copies: Copies
    calls: Calls
    call_waits: Waits  # for operands; `round` is the call
    parts: Parts
    keys: Keys


def flow_of(plan: Plan) -> Flow:
    """Of a proven plan; adjacent groups of heads that meet the same keys count as calls of their own."""
    return _Flow(plan.layout, columns_of(plan)).all()


class _Flow:
    def __init__(self, layout: Layout, columns: Columns) -> None:
        self._layout, self._columns, self._forms = layout, columns, Forms(columns)
        t, ranks = columns.transfers, layout.num_ranks
        links, message = _classes((t.round.astype(np.int64) * ranks + t.src) * ranks + t.dst)
        self._message_of = message
        self._messages = Messages(*np.unravel_index(links, (columns.num_rounds + 1, ranks, ranks)))
        self._find_blocks()

    def _find_blocks(self) -> None:
        """start and came: [rank, form, chunk] held from the start, or else the message that brought it (-1: none)."""
        layout, forms, t = self._layout, self._forms, self._columns.transfers
        shape = layout.num_ranks, forms.number, layout.num_chunks
        self._start, _ = forms.at_start(layout)
        low, high = np.array([layout.heads_of(r) for r in range(layout.num_ranks)]).T[..., None]
        self._whole = (forms.operand == _Q) & (forms.lo == low) & (forms.hi == high)  # [rank, form]: just what is held
        everything = (forms.lo == 0) & (forms.hi == layout.num_heads) & (forms.pieces == 1)
        self._whole = self._whole | ((forms.operand == _KV) & everything)
        blocks = np.flatnonzero(t.operand != _STATE)[::-1]  # of two that contain one, the first counts
        self._came = np.full(shape, -1, np.int32)
        self._arrived = np.zeros(shape, bool)  # just so
        self._arrived[t.dst[blocks], forms.transfer[blocks], t.chunk[blocks]] = True
        for form in np.unique(forms.transfer[blocks]):
            rows = blocks[forms.transfer[blocks] == form]
            for inside in np.flatnonzero(forms.holds[form]):
                self._came[t.dst[rows], inside, t.chunk[rows]] = self._message_of[rows]

    def all(self) -> Flow:
        forms, t = self._forms, self._columns.transfers
        at = t.src, forms.transfer, t.chunk
        held = self._start[at]
        sent_on = np.flatnonzero(~held & (t.operand != _STATE))
        folds = self._folds()
        waits = Waits(t.round[sent_on], t.src[sent_on], self._came[at][sent_on])
        early = Waits(*(x[folds.before] for x in folds[:3]))
        calls, call_waits, parts, keys = self._calls(folds)
        return Flow(
            columns=self._columns,
            forms=forms,
            cuts=forms.cuts,
            messages=self._messages,
            message_of=self._message_of,
            waits=_distinct(Waits(*map(np.concatenate, zip(waits, early, strict=True)))),
            folds=folds,
            copies=self._copies(held),
            calls=calls,
            call_waits=call_waits,
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

    # Kernel calls: see fuse.py

    def _calls(self, folds: Folds) -> tuple[Calls, Waits, Parts, Keys]:
        a, forms, ranks, chunks = self._columns.attends, self._forms, self._layout.num_ranks, self._layout.num_chunks
        number = len(a.round)
        own = self._start[a.rank, forms.key, a.kv]
        at = a.round.astype(np.int64) * ranks + a.rank
        group = at * forms.num_heads + forms.attend_heads
        fits, with_own, first = self._nested(np.flatnonzero(~own), group)
        keys = ((group * chunks + a.kv) * len(forms.cuts) + forms.read_cut) * 2 + a.causal
        joined = group * 2 + with_own
        same = _classes(np.where(fits, joined, keys + (int(joined.max(initial=0)) + 1)))[1]
        sample = _last_of_each(same)
        first[~fits] = _first_of_each(same)[~fits] + (~own & ~fits)[~fits] * number  # those that fit in none come last
        order = np.lexsort((with_own[sample], first[sample], fits[sample], at[sample]))
        place, call = at[sample][order], np.argsort(order)[same]
        round_, rank = np.divmod(place, ranks)
        calls = Calls(round_, rank, _within(place))
        found, part = _classes(call * chunks + a.q)
        sample = _last_of_each(part)  # any attend of each part
        causal = np.bincount(part, a.causal, len(found)) > 0
        of_call = found // chunks
        merges = self._merges(folds, sample, of_call)
        parts = Parts(of_call, a.q[sample], (a.hi - a.lo)[sample], causal, merges)
        full = np.flatnonzero(a.causal == 0)
        full = full[np.argsort(part[full], kind="stable")]
        waits = self._operands(call, own)
        return calls, waits, parts, Keys(part[full], a.kv[full], forms.read_cut[full])

    def _operands(self, call: Index, own: Flags) -> Waits:
        a, forms = self._columns.attends, self._forms
        q_held = self._start[a.rank, forms.query, a.q]
        queries, keys = self._came[a.rank, forms.query, a.q], self._came[a.rank, forms.key, a.kv]
        assert ((queries >= 0) | q_held).all() and ((keys >= 0) | own).all(), "a block is not held; is the plan proven?"
        rows = np.concatenate([np.flatnonzero(~q_held), np.flatnonzero(~own)])
        message = np.concatenate([queries[~q_held], keys[~own]])
        return _distinct(Waits(call[rows], a.rank[rows], message))

    def _nested(self, rows: Index, group: Index) -> tuple[Flags, Flags, Index]:
        """Of attends over received keys: which are joined into one call, whether their query chunk meets its own there,
        and where their group of heads begins.
        """
        a, forms, chunks = self._columns.attends, self._forms, self._layout.num_chunks
        fits, with_own = np.zeros((2, len(group)), bool)
        first = np.zeros(len(group), np.int64)
        if not len(rows):
            return fits, with_own, first
        mine, causal = group[rows], a.causal[rows]
        entries, key = _classes((mine * chunks + a.kv[rows]) * len(forms.cuts) + forms.read_cut[rows])
        viewers, is_own = np.bincount(key), np.bincount(key, causal) > 0
        its_group = entries // (chunks * len(forms.cuts))
        order = np.lexsort((np.arange(len(entries)), is_own, -viewers, its_group))  # entries ascend by chunk and piece
        rank = np.empty(len(entries), np.intp)
        rank[order] = _within(its_group)
        queries, q = _classes(mine * chunks + a.q[rows])
        seen = np.bincount(q)
        reach = np.zeros(len(queries), np.intp)
        np.maximum.at(reach, q, rank[key])
        misplaced = np.bincount(q, (causal > 0) & (rank[key] != seen[q] - 1)) > 0
        fits[rows] = ((reach == seen - 1) & ~misplaced)[q]
        with_own[rows] = (np.bincount(q, causal) > 0)[q]
        first[rows] = rows[_first_of_each(_classes(mine)[1])]
        return fits, with_own, first

    def _merges(self, folds: Folds, sample: Index, call: Index) -> Flags:
        """[parts]: whether the slot that a result goes to holds something, or more heads than the result has."""
        layout, t, a = self._layout, self._columns.transfers, self._columns.attends
        sent = np.flatnonzero(t.operand == _STATE)
        ends = [(r, c, *layout.heads_of(r)) for r in range(layout.num_ranks) for c in layout.q_of(r)]
        places = [
            (a.rank[sample], a.q[sample], a.lo[sample], a.hi[sample]),
            (t.src[sent], t.chunk[sent], t.lo[sent], t.hi[sent]),
            (t.dst[sent], t.chunk[sent], t.lo[sent], t.hi[sent]),
            np.array(ends).reshape(-1, 4).T,
        ]
        slot, wider = _slots(layout, *(np.concatenate(x) for x in zip(*places, strict=True)))
        number, late = len(sample), np.flatnonzero(~folds.before)
        slots = [slot[:number], slot[number : number + len(sent)], slot[number + len(sent) :][: len(sent)][late]]
        rounds = [a.round[sample], t.round[sent], folds.round[late]]
        phase = np.repeat([1, 0, 2], [len(x) for x in slots])  # states leave, results and arrivals come
        turn = np.concatenate([call, np.zeros(len(phase) - number, np.intp)])
        of_slot = np.concatenate(slots)
        order = np.lexsort((turn, phase, np.concatenate(rounds), of_slot))
        before = np.concatenate([[False], (of_slot[order][1:] == of_slot[order][:-1]) & (phase[order][:-1] > 0)])
        filled = np.empty(len(order), bool)
        filled[order] = before[: len(order)]
        return filled[:number] | wider[:number]


def _slots(layout: Layout, rank: Index, chunk: Index, lo: Index, hi: Index) -> tuple[Index, Flags]:
    """For each range of heads of a state on a rank: its slot, which overlapping ranges share, and whether that is
    wider.
    """
    heads = layout.num_heads + 1
    place = rank.astype(np.int64) * layout.num_new + chunk
    ranges, mine = _classes((place * heads + lo) * heads + hi)
    rest, high = np.divmod(ranges, heads)
    where, low = np.divmod(rest, heads)
    reach = np.maximum.accumulate(where * heads + high)  # the end of what overlaps so far
    opens = np.concatenate([[True], where[1:] * heads + low[1:] >= reach[:-1]])
    slot = np.cumsum(opens) - 1
    starts = np.flatnonzero(opens)
    width = np.maximum.reduceat(high, starts) - low[starts]
    return slot[mine], (width[slot] > high - low)[mine]


def _classes(codes: NDArray[Any]) -> tuple[Index, Index]:
    """The distinct values, ascending, and for each code the index of its value."""
    most = int(codes.max(initial=0)) + 1
    if most > 16 * len(codes) + 1024:
        order = np.argsort(codes, kind="stable")
        new = np.diff(codes[order], prepend=-1) > 0
        index = np.empty(len(codes), np.intp)
        index[order] = np.cumsum(new) - 1
        return codes[order][new], index
    there = np.zeros(most, bool)
    there[codes] = True
    return np.flatnonzero(there), (np.cumsum(there, dtype=np.int32) - 1)[codes]


def _last_of_each(classes: Index) -> Index:
    """[classes]: its last row."""
    last = np.zeros(int(classes.max(initial=-1)) + 1, np.intp)
    last[classes] = np.arange(len(classes))
    return last


def _first_of_each(classes: Index) -> Index:
    """For each row the first row of its class."""
    return (len(classes) - 1 - _last_of_each(classes[::-1]))[classes]


def _within(ascending: NDArray[Any]) -> Index:
    """For each row how many before it have the same value."""
    starts = np.flatnonzero(np.diff(ascending, prepend=-1))
    return np.arange(len(ascending)) - np.repeat(starts, np.diff(np.append(starts, len(ascending))))


def _distinct(waits: Waits) -> Waits:
    """Sorted, each once. All of a round (or call) and message are on one rank."""
    messages = int(waits.message.max(initial=0)) + 1
    codes, row = _classes(waits.round.astype(np.int64) * messages + waits.message)
    rank = waits.rank[_last_of_each(row)]
    round_, message = np.divmod(codes, messages)
    order = np.lexsort((message, rank, round_))
    return Waits(round_[order], rank[order], message[order])
