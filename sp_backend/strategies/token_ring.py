"""TokenRing: KV stays, Q moves down the ring, and each state goes straight to its owner, the other way.

The state computed in round t is sent in round t+1, while the next Q is attended, and the last one while a rank attends
what it kept of its own (see pass_q). Under zigzag the front half of Q is dropped where it wraps around, unless there is
history, which every query sees. Worth it when Q and its state are smaller than KV: few query heads per KV head, or a
long cached prefix. Source: TokenRing (arXiv 2412.20501), where nothing is left to compute beside the last state.
"""

from __future__ import annotations

import numpy as np

from sp_backend.columns import Draft
from sp_backend.layout import STATE, Layout
from sp_backend.plan import Plan
from sp_backend.strategies.ring_pass_q import pass_q


def build(layout: Layout) -> Plan:
    number, draft = layout.num_ranks, Draft(layout)
    pass_q(draft, layout)
    t, r = np.indices((number, number))[:, 1:]  # computed in round t
    owner = (r + t) % number
    draft.send(STATE, np.array(layout.all_q())[owner], round=t + 1, src=r, dst=owner)
    return Plan("token_ring", layout, draft.rounds())
