"""The kernel calls of a plan, as arrays: what fuse.py decides for one rank and round, decided for all of them at once.
Pure: no torch, no sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sp_backend.columns import OPERANDS, Columns, Flags, Index
from sp_backend.forms import Forms
from sp_backend.grouping import classes, first_of_each, last_of_each, place_in_run
from sp_backend.layout import STATE, Layout

_STATE = OPERANDS.index(STATE)
_PAGED, _HELD, _CAME = range(3)  # where the keys of an attend are


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
    cut: Index  # index into Forms.cuts


class Holdings(NamedTuple):
    """Where each rank's blocks come from [rank, form, chunk]."""

    start: Flags  # it holds the block, or one that contains it, from the start
    came: Index  # or else the message that brought it; -1: none


class CallFinder:
    """before: of the states sent, in the order of transfers, whether they are folded before the next is sent on.

    paged: each rank has its own keys, cached and new, in pages.
    """

    def __init__(
        self, layout: Layout, columns: Columns, forms: Forms, held: Holdings, before: Flags, paged: bool
    ) -> None:
        self._layout, self._columns, self._forms, self._held, self._before = layout, columns, forms, held, before
        a = columns.attends
        self._own = held.start[a.rank, forms.key, a.kv]
        self._where = np.where(self._own, _HELD, _CAME)
        if paged:
            owner = np.array([layout.owner(c) for c in range(layout.num_chunks)])
            self._where[self._own & (owner[a.kv] == a.rank)] = _PAGED
        self._at = a.round.astype(np.int64) * layout.num_ranks + a.rank
        self._group = (self._at * forms.num_heads + forms.attend_heads) * 2 + (self._where == _CAME)

    def find(self) -> tuple[Calls, Index, Parts, Keys]:
        """With the call of each attend."""
        a, forms, chunks = self._columns.attends, self._forms, self._layout.num_chunks
        calls, call = self._fused()
        found, part = classes(call * chunks + a.q)
        sample = last_of_each(part)  # any attend of each part
        causal = np.bincount(part, a.causal, len(found)) > 0
        of_call = found // chunks
        parts = Parts(of_call, a.q[sample], (a.hi - a.lo)[sample], causal, self._merges(sample, of_call))
        full = np.flatnonzero(a.causal == 0)
        full = full[np.argsort(part[full], kind="stable")]
        return calls, call, parts, Keys(part[full], a.kv[full], forms.read_cut[full])

    def _fused(self) -> tuple[Calls, Index]:
        """Calls over keys in pages come first, then those with one block of keys each, then those over what came."""
        a, forms, number = self._columns.attends, self._forms, len(self._group)
        joined, with_own, first = self._nested(np.flatnonzero(self._where != _HELD))
        keys = ((self._group * self._layout.num_chunks + a.kv) * len(forms.cuts) + forms.read_cut) * 2 + a.causal
        together = self._group * 2 + with_own
        same = classes(np.where(joined, together, keys + (int(together.max(initial=0)) + 1)))[1]
        turn = np.where(joined, self._where, _HELD)
        alone = first_of_each(same)[same] + np.array([1, 0, 2])[self._where] * number  # those held come first
        first = np.where(joined, first, alone)
        sample = last_of_each(same)
        order = np.lexsort((with_own[sample], first[sample], turn[sample], self._at[sample]))
        place, call = self._at[sample][order], np.argsort(order)[same]
        round_, rank = np.divmod(place, self._layout.num_ranks)
        return Calls(round_, rank, place_in_run(place)), call

    def _nested(self, rows: Index) -> tuple[Flags, Flags, Index]:
        """Of attends over keys that can be joined: which are joined into one call, whether their query chunk meets its
        own there, and where their group of heads begins.
        """
        a, forms, chunks = self._columns.attends, self._forms, self._layout.num_chunks
        fits, with_own = np.zeros((2, len(self._group)), bool)
        first = np.zeros(len(self._group), np.int64)
        if not len(rows):
            return fits, with_own, first
        mine, causal = self._group[rows], a.causal[rows]
        entries, key = classes((mine * chunks + a.kv[rows]) * len(forms.cuts) + forms.read_cut[rows])
        viewers, is_own = np.bincount(key), np.bincount(key, causal) > 0
        its_group = entries // (chunks * len(forms.cuts))
        order = np.lexsort((np.arange(len(entries)), is_own, -viewers, its_group))  # entries ascend by chunk and piece
        rank = np.empty(len(entries), np.intp)
        rank[order] = place_in_run(its_group)
        queries, q = classes(mine * chunks + a.q[rows])
        seen = np.bincount(q)
        reach = np.zeros(len(queries), np.intp)
        np.maximum.at(reach, q, rank[key])
        misplaced = np.bincount(q, (causal > 0) & (rank[key] != seen[q] - 1)) > 0
        fits[rows] = ((reach == seen - 1) & ~misplaced)[q]
        with_own[rows] = (np.bincount(q, causal) > 0)[q]
        group = classes(mine)[1]
        first[rows] = rows[first_of_each(group)[group]]
        return fits, with_own, first

    def _merges(self, sample: Index, call: Index) -> Flags:
        """[parts]: whether the slot that a result goes to holds something, or more heads than the result has."""
        layout, t, a = self._layout, self._columns.transfers, self._columns.attends
        sent, late = np.flatnonzero(t.operand == _STATE), np.flatnonzero(~self._before)
        ends = [(r, c, *layout.heads_of(r)) for r in range(layout.num_ranks) for c in layout.q_of(r)]
        places = [
            (a.rank[sample], a.q[sample], a.lo[sample], a.hi[sample]),
            (t.src[sent], t.chunk[sent], t.lo[sent], t.hi[sent]),
            (t.dst[sent], t.chunk[sent], t.lo[sent], t.hi[sent]),
            np.array(ends).reshape(-1, 4).T,
        ]
        slot, wider = _slots(layout, *(np.concatenate(x) for x in zip(*places, strict=True)))
        number = len(sample)
        slots = [slot[:number], slot[number : number + len(sent)], slot[number + len(sent) :][: len(sent)][late]]
        rounds = [a.round[sample], t.round[sent], t.round[sent][late] + 1]
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
    ranges, mine = classes((place * heads + lo) * heads + hi)
    rest, high = np.divmod(ranges, heads)
    where, low = np.divmod(rest, heads)
    reach = np.maximum.accumulate(where * heads + high)  # the end of what overlaps so far
    opens = np.concatenate([[True], where[1:] * heads + low[1:] >= reach[:-1]])
    slot = np.cumsum(opens) - 1
    starts = np.flatnonzero(opens)
    width = np.maximum.reduceat(high, starts) - low[starts]
    return slot[mine], (width[slot] > high - low)[mine]
