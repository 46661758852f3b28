"""The kinds of blocks in a plan: what is true of one is worked out once for every chunk. Pure: no torch."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from sp_backend.columns import OPERANDS, Column, Columns, Flags, Index
from sp_backend.layout import KV, Block, Layout, Q


class Forms:
    """The kinds of blocks in a plan: a form is an operand, a range of heads and a piece, of whatever chunk."""

    def __init__(self, columns: Columns) -> None:
        t, a = columns.transfers, columns.attends
        most = 1 + max((int(x.max()) for x in (t.hi, a.hi, t.pieces, a.pieces) if len(x)), default=1)
        heads, self.transfer_heads, self.attend_heads = _numbered(t.lo * most + t.hi, a.lo * most + a.hi)
        cuts, self.sent_cut, self.read_cut, whole = _numbered(
            t.piece * most + t.pieces, a.piece * most + a.pieces, np.array([1], np.int32)
        )
        number = len(heads), len(cuts)

        def code(operand: Column | int, heads: Column, cut: Column) -> Column:
            return np.asarray((operand * number[0] + heads) * number[1] + cut, np.int32)

        queries, keys = code(0, self.attend_heads, whole), code(1, self.attend_heads, self.read_cut)
        codes, self.transfer, self.query, self.key = _numbered(
            code(t.operand, self.transfer_heads, self.sent_cut), queries, keys
        )
        self.number, self.num_heads = len(codes), len(heads)
        self.cuts = [(int(c) // most, int(c) % most) for c in cuts]
        rest, cut = np.divmod(codes, number[1])
        self.operand, self.heads = np.divmod(rest, number[0])
        self.lo, self.hi = np.divmod(heads[self.heads], most)
        low, high = np.divmod(heads, most)
        self.heads_meet = (low[:, None] < high) & (low < high[:, None])  # of ranges of heads
        self.piece, self.pieces = np.divmod(cuts[cut], most)

    def block(self, form: int, chunk: int) -> Block:
        cut = int(self.piece[form]), int(self.pieces[form])
        return Block(OPERANDS[self.operand[form]], chunk, (int(self.lo[form]), int(self.hi[form])), cut)

    @cached_property
    def holds(self) -> Flags:
        """[form, form]: whether a block of the first contains one of the second."""
        i, n, j, m = self.piece[:, None], self.pieces[:, None], self.piece, self.pieces
        inside = (i * m <= j * n) & ((j + 1) * n <= (i + 1) * m)
        inside &= (self.lo[:, None] <= self.lo) & (self.hi <= self.hi[:, None])
        return np.asarray(inside & (self.operand[:, None] == self.operand))

    def others_that_meet(self, form: int | np.integer[Any]) -> Index:
        """Forms of which a block may have something in common with one of this form, and that are not this one."""
        i, n, j, m = self.piece[form], self.pieces[form], self.piece, self.pieces
        meet = (i * m < (j + 1) * n) & (j * n < (i + 1) * m) & (self.operand[form] == self.operand)
        meet &= (self.lo[form] < self.hi) & (self.lo < self.hi[form])
        meet[form] = False
        return np.flatnonzero(meet)

    def at_start(self, layout: Layout) -> tuple[Flags, Flags]:
        """[rank, form, chunk]: whether all of a block, and whether some of it, is on a rank before the first round."""
        shape = layout.num_ranks, self.number, layout.num_chunks
        whole, some = np.zeros(shape, bool), np.zeros(shape, bool)
        keys, queries = self.operand == OPERANDS.index(KV), self.operand == OPERANDS.index(Q)
        for rank in range(layout.num_ranks):
            lo, hi = layout.heads_of(rank)
            for there, forms in ((whole, (lo <= self.lo) & (self.hi <= hi)), (some, (self.lo < hi) & (lo < self.hi))):
                there[rank, np.flatnonzero(queries & forms)[:, None], layout.q_of(rank)] = True
                there[rank, np.flatnonzero(keys)[:, None], layout.kv_of(rank)] = True
        return whole, some

    @cached_property
    def holders(self) -> Column:
        """[number, form]: the forms that contain one, itself among them; -1 where there are fewer."""
        found = np.full((int(self.holds.sum(0).max(initial=0)), self.number), -1, np.int32)
        for form, column in enumerate(self.holds.T):
            which = np.flatnonzero(column)
            found[: len(which), form] = which
        return found


@lru_cache(maxsize=4)
def forms_of(columns: Columns) -> Forms:
    """A plan is pruned, costed and proved one after the other, and each needs its forms."""
    return Forms(columns)


def _numbered(*keys: Column) -> list[Column]:
    """The distinct values of all, ascending, and for each array where its values are among those."""
    there = np.zeros(1 + max((int(k.max()) for k in keys if len(k)), default=0), bool)
    for k in keys:
        there[k] = True
    values, place = np.flatnonzero(there).astype(np.int32), (np.cumsum(there) - 1).astype(np.int32)
    return [values, *(place[k] for k in keys)]
