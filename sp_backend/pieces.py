"""Cached keys that travel, in pieces: so that what a rank has of other ranks' history does not grow with it. Pure: no
torch.

A plan moves a rank's history as one block, however long. In n pieces, piece i makes the same way i rounds later: a rank
attends one piece, sends on another and receives a third. The same bytes travel over the same links, and n - 1 rounds
come at the end, where states leave that many rounds later too. The own history, read in pages, stays whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np

from sp_backend.columns import OPERANDS, Attends, Columns, Flags, Rounds, Transfers, columns_of, join, take
from sp_backend.geometry import Geometry
from sp_backend.layout import KV, STATE, Block, Layout
from sp_backend.plan import Plan

MOST_HISTORY = 8192  # keys that come in one round: attending so many takes 50 times what a kernel call more costs
MOST_PIECES = 64  # a plan of many ranks in more would take seconds to write

_KV, _STATE = OPERANDS.index(KV), OPERANDS.index(STATE)
_Rows = TypeVar("_Rows", Transfers, Attends)


def moves_history(plan: Plan) -> bool:
    """Whether some rank attends what another has cached, by having it sent."""
    t = columns_of(plan).transfers
    return bool(((t.operand == _KV) & (t.chunk >= plan.layout.num_new)).any())


def num_pieces(layout: Layout, geometry: Geometry, most_history: int) -> int:
    """How many to cut history into: a power of two, so that few plans are made. Equal on all ranks."""
    of_ranks = [Block(KV, layout.history_of(rank), layout.all_heads) for rank in range(layout.num_ranks)]
    coming = (layout.group_size - 1) * max(map(geometry.num_rows, of_ranks))
    pieces = 1
    while coming > pieces * most_history and pieces < MOST_PIECES:
        pieces *= 2
    return pieces


def in_pieces(plan: Plan, number: int) -> Plan:
    """A proven plan with the history that travels in `number` pieces; proven as well."""
    if number == 1:
        return plan
    layout, columns = plan.layout, columns_of(plan)
    t, a = columns.transfers, columns.attends
    owner = np.array([layout.owner(c) for c in range(layout.num_chunks)])
    delay = np.where(t.operand == _STATE, number - 1, 0).astype(np.int32)
    transfers = _cut(t._replace(round=t.round + delay), (t.operand == _KV) & (t.chunk >= layout.num_new), number)
    attends = _cut(a, (a.kv >= layout.num_new) & (owner[a.kv] != a.rank), number)
    return replace(plan, rounds=Rounds(Columns(transfers, attends, columns.num_rounds + number - 1)))


def _cut(rows: _Rows, which: Flags, number: int) -> _Rows:
    """Some of the rows cut into as many pieces, each a round after the one before."""
    times = np.where(which, number, 1)
    index = np.repeat(np.arange(len(which)), times)
    part = np.arange(len(index)) - np.repeat(np.cumsum(times) - times, times)
    whole, factor = take(rows, index), times[index]
    cut = whole._replace(
        round=(whole.round + part).astype(np.int32),
        piece=(whole.piece * factor + part).astype(np.int32),
        pieces=(whole.pieces * factor).astype(np.int32),
    )
    return join(type(rows), [cut])
