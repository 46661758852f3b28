"""What strategies leave to be done to their plans: dropping what a mask makes useless, running a group's plan in every
group, bringing keys to ranks that have to keep them. Pure: no torch.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sp_backend.columns import OPERANDS, Attends, Column, Columns, Flags, Rounds, Transfers, columns_of, join, take
from sp_backend.forms import forms_of
from sp_backend.layout import KV, STATE, Block, Layout
from sp_backend.plan import Plan, Round, Transfer

_KV, _STATE = OPERANDS.index(KV), OPERANDS.index(STATE)


def replicate(plan: Plan, layout: Layout) -> Plan:
    """The plan of one group, run by every group of a layout at once: the same rounds on other ranks and chunks."""
    inner, columns = plan.layout, columns_of(plan)
    owners = [inner.owner(c) for c in range(inner.num_chunks)]
    transfers, attends = [], []
    for group in range(layout.num_groups):
        first = group * inner.num_ranks
        chunk = np.arange(inner.num_chunks, dtype=np.int32) + group * inner.num_new
        for c in range(inner.num_new, inner.num_chunks):
            chunk[c] = layout.history_of(first + owners[c])
        t, a = columns.transfers, columns.attends
        transfers.append(t._replace(src=t.src + first, dst=t.dst + first, chunk=chunk[t.chunk]))
        attends.append(a._replace(rank=a.rank + first, q=chunk[a.q], kv=chunk[a.kv]))
    rounds = Rounds(Columns(join(Transfers, transfers), join(Attends, attends), columns.num_rounds))
    return Plan(plan.name, layout, rounds)


def complete(plan: Plan) -> Plan:
    """Add what a strategy leaves undelivered of the keys that every rank has to keep.

    In round t, from the second one on, rank r sends its own to rank r+t: never on a link that Q takes down a ring.
    """
    layout, ranks = plan.layout, plan.layout.num_ranks
    if layout.history != "copies":
        return plan
    rounds = list(plan.rounds)
    arriving = {(t.dst, t.block.chunk) for r in rounds for t in r.transfers if layout.keeps(t.block)}
    rounds += [Round()] * (ranks - len(rounds))
    for step in range(1, ranks):
        links = ((r, (r + step) % ranks, c) for r in range(ranks) for c in layout.kv_of(r) if c < layout.num_new)
        missing = [Transfer(Block(KV, c, layout.all_heads), r, to) for r, to, c in links if (to, c) not in arriving]
        rounds[step] = rounds[step]._replace(transfers=(*rounds[step].transfers, *missing))
    return replace(plan, rounds=tuple(rounds))


def prune(plan: Plan) -> Plan:
    """Drop transfers that nobody uses, states that nobody computed, and rounds left empty.

    Builders write the full schedule; what a mask makes useless goes here. On a downward ring under zigzag
    this alone saves a quarter of the bytes.
    """
    columns = columns_of(plan)
    columns = _kept(columns, used(plan.layout, columns))
    if (columns.transfers.operand == _STATE).any():
        columns = _kept(columns, _filled(plan.layout, columns))
    return replace(plan, rounds=Rounds(_without_empty_rounds(columns)))


def used(layout: Layout, columns: Columns) -> Flags:
    """[transfers]: whether the receiver attends or passes on some of it in a later round; states always are."""
    forms, t, a = forms_of(columns), columns.transfers, columns.attends
    # something inside that form of a chunk is needed later on that rank
    needed = np.zeros((layout.num_ranks, forms.number, layout.num_chunks), bool)
    live: Flags = t.operand == _STATE
    if layout.history == "copies":  # see Layout.keeps
        live |= (t.operand == _KV) & (t.chunk < layout.num_new)

    def use(rank: Column, form: Column, chunk: Column) -> None:
        for holder in forms.holders[:, form]:
            there = holder >= 0
            needed[rank[there], holder[there], chunk[there]] = True

    for i in reversed(range(columns.num_rounds)):
        sent = slice(*columns.transfer_bounds[i : i + 2])
        form, chunk = forms.transfer[sent], t.chunk[sent]
        live[sent] |= needed[t.dst[sent], form, chunk]
        keep = live[sent]
        use(t.src[sent][keep], form[keep], chunk[keep])
        seen = slice(*columns.attend_bounds[i : i + 2])
        use(a.rank[seen], forms.query[seen], a.q[seen])
        use(a.rank[seen], forms.key[seen], a.kv[seen])
    return live


def _filled(layout: Layout, columns: Columns) -> Flags:
    """[transfers]: false for states of slots that have nothing in them."""
    forms, t, a = forms_of(columns), columns.transfers, columns.attends
    filled = np.zeros((layout.num_ranks, forms.num_heads, layout.num_new), bool)
    live = np.ones(len(t.round), bool)
    for i in range(columns.num_rounds):
        rows = np.arange(*columns.transfer_bounds[i : i + 2])
        states = rows[t.operand[rows] == _STATE]
        live[states] = filled[t.src[states], forms.transfer_heads[states], t.chunk[states]]
        states = states[live[states]]
        filled[t.src[states], forms.transfer_heads[states], t.chunk[states]] = False
        seen = slice(*columns.attend_bounds[i : i + 2])
        filled[a.rank[seen], forms.attend_heads[seen], a.q[seen]] = True
        filled[t.dst[states], forms.transfer_heads[states], t.chunk[states]] = True
    return live


def _kept(columns: Columns, live: Flags) -> Columns:
    return columns if live.all() else replace(columns, transfers=take(columns.transfers, live))


def _without_empty_rounds(columns: Columns) -> Columns:
    t, a = columns.transfers, columns.attends
    there = np.zeros(columns.num_rounds, bool)
    there[t.round] = there[a.round] = True
    if there.all():
        return columns
    number = (np.cumsum(there) - 1).astype(np.int32)
    return Columns(t._replace(round=number[t.round]), a._replace(round=number[a.round]), int(there.sum()))
