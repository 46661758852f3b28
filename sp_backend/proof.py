"""A quick proof of a plan from its arrays: all or nothing. Pure: no torch.

It proves what check.py proves, of plans whose states go straight to the rank where they end, as all strategies' do. Any
doubt is a no, after which check.py says what is wrong or that nothing is. Tests hold the two against each other on
thousands of mutants.
"""

from __future__ import annotations

from functools import lru_cache
from math import lcm

import numpy as np

from sp_backend.check import rendezvous
from sp_backend.columns import OPERANDS, Columns, Rounds, mask_table
from sp_backend.forms import Forms, forms_of
from sp_backend.grouping import classes
from sp_backend.layout import KV, STATE, Layout
from sp_backend.plan import Plan
from sp_backend.prune import used
from sp_backend.ragged import RaggedSample

_KV, _STATE = OPERANDS.index(KV), OPERANDS.index(STATE)


def is_proven(plan: Plan) -> bool:
    """Whether a plan made of columns is certainly right."""
    if not isinstance(plan.rounds, Rounds):
        return False
    layout, columns = plan.layout, plan.rounds.columns
    if layout.history == "copies" or not _well_formed(layout, columns):
        return False
    forms = forms_of(columns)
    if not (_held_when_used(layout, columns, forms) and used(layout, columns).all()):
        return False
    if not (_states_come_home(layout, columns, forms) and _covered(layout, columns, forms)):
        return False
    return _sample_agrees(layout) and not rendezvous(plan)


def _well_formed(layout: Layout, columns: Columns) -> bool:
    t, a = columns.transfers, columns.attends
    ends = np.concatenate([t.src, t.dst, a.rank])
    good = [(ends >= 0) & (ends < layout.num_ranks), t.src != t.dst]
    for x in (t, a):
        good += [(x.lo >= 0) & (x.lo < x.hi) & (x.hi <= layout.num_heads), (x.piece >= 0) & (x.piece < x.pieces)]
    kv = t.operand == _KV
    good += [kv | (t.pieces == 1), (t.chunk >= 0) & (t.chunk < np.where(kv, layout.num_chunks, layout.num_new))]
    good += [(a.q >= 0) & (a.q < layout.num_new), (a.kv >= 0) & (a.kv < layout.num_chunks)]
    if not all(x.all() for x in good):
        return False
    mask = mask_table(layout)[a.q, a.kv]
    return bool(((mask > 0) & ((mask == 1) == (a.causal > 0)) & ((a.causal == 0) | (a.pieces == 1))).all())


def _held_when_used(layout: Layout, columns: Columns, forms: Forms) -> bool:
    """Every block is on a rank before it is used there, and none comes to where some of it is already."""
    t, a = columns.transfers, columns.attends
    start, some = forms.at_start(layout)
    since = np.where(start, -1, columns.num_rounds).astype(np.int32)  # [rank, form, chunk]
    rows = np.flatnonzero(t.operand != _STATE)
    brought = np.zeros(since.shape, np.int8)
    np.add.at(brought, (t.dst[rows], forms.transfer[rows], t.chunk[rows]), 1)
    if (brought > 1).any() or (brought.astype(bool) & some).any():
        return False
    for form in np.flatnonzero(brought.any((0, 2))):
        if any((brought[:, form] & brought[:, other]).any() for other in forms.others_that_meet(form)):
            return False
        mine = rows[forms.transfer[rows] == form]
        for inside in np.flatnonzero(forms.holds[form]):
            since[t.dst[mine], inside, t.chunk[mine]] = t.round[mine]
    sent = since[t.src[rows], forms.transfer[rows], t.chunk[rows]] < t.round[rows]
    read = (since[a.rank, forms.query, a.q] < a.round) & (since[a.rank, forms.key, a.kv] < a.round)
    return bool(sent.all() and read.all())


def _states_come_home(layout: Layout, columns: Columns, forms: Forms) -> bool:
    """What is attended away from where its state ends is sent there, whole and once, when the last is folded."""
    t, a = columns.transfers, columns.attends
    low, high = np.array([layout.heads_of(r) for r in range(layout.num_ranks)]).T
    ends = np.zeros((layout.num_ranks, layout.num_new), bool)
    for rank in range(layout.num_ranks):
        ends[rank, layout.q_of(rank)] = True
    sent = np.flatnonzero(t.operand == _STATE)
    src, dst, chunk, lo, hi = (x[sent] for x in (t.src, t.dst, t.chunk, t.lo, t.hi))
    comes_home = ends[dst, chunk] & (low[dst] <= lo) & (hi <= high[dst])
    at_home = ends[a.rank, a.q] & (low[a.rank] <= a.lo) & (a.hi <= high[a.rank])
    near_src = ends[src, chunk] & (lo < high[src]) & (low[src] < hi)
    near = ends[a.rank, a.q] & (a.lo < high[a.rank]) & (low[a.rank] < a.hi)
    if not comes_home.all() or near_src.any() or (near & ~at_home).any():
        return False
    leaves = np.full((forms.num_heads, layout.num_ranks, layout.num_new), -1, np.int32)  # in which round
    leaves[forms.transfer_heads[sent], src, chunk] = t.round[sent]
    done = np.full_like(leaves, -1)  # the last round in which something is folded
    away = np.flatnonzero(~at_home)
    done[forms.attend_heads[away], a.rank[away], a.q[away]] = a.round[away]  # rounds ascend
    if len(sent) != (leaves >= 0).sum() or not np.where(done >= 0, leaves > done, leaves < 0).all():
        return False
    ranges = np.flatnonzero((done >= 0).any((1, 2)))
    meet = forms.heads_meet[np.ix_(ranges, ranges)]
    pairs = zip(*np.nonzero(np.triu(meet, 1)), strict=True)
    return not any(((done[ranges[i]] >= 0) & (done[ranges[j]] >= 0)).any() for i, j in pairs)


def _covered(layout: Layout, columns: Columns, forms: Forms) -> bool:
    """Each visible pair of chunks is attended once: for all heads and slices, and none of them twice."""
    a = columns.attends
    slices = lcm(*classes(a.pieces)[0].tolist())
    pairs = layout.num_new, layout.num_chunks
    weight = (a.hi - a.lo) * (slices // a.pieces)
    total = np.bincount(a.q * pairs[1] + a.kv, weight, pairs[0] * pairs[1]).reshape(pairs)
    if (total != layout.num_heads * slices * (mask_table(layout) > 0)).any():
        return False
    times = np.bincount((forms.key * pairs[0] + a.q) * pairs[1] + a.kv, minlength=forms.number * pairs[0] * pairs[1])
    seen = times.reshape(forms.number, *pairs)
    if (seen > 1).any():
        return False
    present = np.flatnonzero(seen.any((1, 2)))
    return not any((seen[f] & seen[g]).any() for f in present for g in forms.others_that_meet(f) if g in present)


@lru_cache(maxsize=64)
def _sample_agrees(layout: Layout) -> bool:
    """Token by token, on a ragged sample laid out by the layout's own cut: masks of chunks show what may be seen."""
    table = mask_table(layout)
    for chunks in RaggedSample(layout).positions:
        of_chunk = np.repeat(np.arange(len(chunks)), [len(c) for c in chunks])
        position, index = np.concatenate(chunks), np.concatenate([np.arange(len(c)) for c in chunks])
        q = of_chunk < layout.num_new
        mask = table[of_chunk[q][:, None], of_chunk]
        seen = (mask == 2) | ((mask == 1) & (index <= index[q][:, None]))
        want = position <= position[q][:, None] if layout.causal else np.ones_like(seen)
        if (seen != want).any():
            return False
    return True
