"""Ring, Q moves: KV stays, Q goes round, and one all-to-all at the end sends every state home.

For few new tokens over a long cache: the bytes do not grow with the cache. token_ring spreads the way home over the
rounds at the price of more messages. Source: Meta's context parallelism for inference (arXiv 2411.01783), where nothing
is left to compute while the states go home.
"""

from __future__ import annotations

import numpy as np

from sp_backend.columns import Draft
from sp_backend.layout import STATE, Layout, Q
from sp_backend.plan import Plan


def build(layout: Layout) -> Plan:
    ranks, draft = range(layout.num_ranks), Draft(layout)
    pass_q(draft, layout)
    src, dst = np.array([(r, s) for r in ranks for s in ranks if r != s], int).reshape(-1, 2).T
    draft.send(STATE, np.array(layout.all_q())[dst], round=layout.num_ranks, src=src, dst=dst)
    return Plan("ring_pass_q", layout, draft.rounds())


def pass_q(draft: Draft, layout: Layout) -> None:
    """Q goes down the ring: in round t rank r has that of rank r+t, attends with it and passes it on.

    Of its own chunks a rank attends the first half while the first Q comes, and keeps the others for the last round, in
    which states go home: under zigzag they are the larger part of its work, and hide the way.
    """
    number = layout.num_ranks
    t, r = np.indices((number, number))
    q, kv = np.array(layout.all_q())[(r + t) % number], np.array(layout.all_kv())[r]
    half = (q.shape[-1] + 1) // 2
    for own, when in (q[0, :, :half], 0), (q[0, :, half:], number):
        draft.attend(own, kv[0], round=when, rank=r[0])
    draft.attend(q[1:], kv[1:], round=t[1:], rank=r[1:])
    draft.send(Q, q[:-1], round=t[:-1], src=r[:-1], dst=(r[:-1] - 1) % number)
