"""TokenRing: KV stays, Q moves down the ring, and each state goes straight to its owner, the other way.

The state computed in round t is sent in round t+1, while the next Q is attended, so only the last one is
exposed. Under zigzag the front half of Q is dropped where it wraps around, unless there is history, which
every query sees. Worth it when Q and its state are smaller than KV: few query heads per KV head, or a long
cached prefix. Source: TokenRing (arXiv 2412.20501).
"""

from __future__ import annotations

from sp_backend.layout import Layout
from sp_backend.plan import Plan, Round, Transfer
from sp_backend.strategies.ring_pass_q import pass_q, states_of


def build(layout: Layout) -> Plan:
    ranks, rounds = layout.num_ranks, []
    for t in range(ranks + 1):
        transfers, attends = pass_q(layout, t) if t < ranks else ((), ())
        home = [(r, (r + t - 1) % ranks) for r in range(ranks)] if t > 1 else []
        states = [Transfer(b, r, owner) for r, owner in home for b in states_of(layout, owner)]
        rounds.append(Round((*transfers, *states), attends))
    return Plan("token_ring", layout, tuple(rounds))
