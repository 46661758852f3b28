"""Decode: Q goes to every rank, each attends the KV it holds, and each state goes to its owner: two
exchanges.

For few new tokens over a long cache: bytes grow with the queries alone, and no ring of P steps is paid for. The
own queries are attended while the others travel. In layout heads a query chunk starts, and its state ends, in
groups of heads, one a rank; there all are attended together, so that the cache is read once and not once a group.
"""

from __future__ import annotations

import numpy as np

from sp_backend.columns import Draft
from sp_backend.layout import STATE, Layout, Q
from sp_backend.plan import Plan


def build(layout: Layout) -> Plan:
    ranks, draft = range(layout.num_ranks), Draft(layout)
    r, s = np.array([(r, s) for r in ranks for s in ranks if r != s], int).reshape(-1, 2).T
    q, heads = np.array(layout.all_q()), np.array([layout.heads_of(rank) for rank in ranks]).T
    kv = np.array([[c for c in layout.kv_of(rank) if layout.owner(c) == rank] for rank in ranks])
    of_r, of_s = (heads[0][r], heads[1][r]), (heads[0][s], heads[1][s])
    draft.send(Q, q[r], round=0, src=r, dst=s, heads=of_r)
    draft.attend(q, kv, round=1 if layout.kind == "heads" else 0, rank=ranks, heads=(heads[0], heads[1]))
    draft.attend(q[s], kv[r], round=1, rank=r, heads=of_s)
    draft.send(STATE, q[s], round=2, src=r, dst=s, heads=of_s)
    return Plan("decode", layout, draft.rounds())
