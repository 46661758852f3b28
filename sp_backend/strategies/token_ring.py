"""TokenRing: KV stays, Q moves down the ring, and each state goes straight to its owner, the other way.

The state computed in round t is sent in round t+1, while the next Q is attended, so only the last one is
exposed. Under zigzag the front half of Q is dropped where it wraps around, unless there is history, which
every query sees. Worth it when Q and its state are smaller than KV: few query heads per KV head, or a long
cached prefix.
"""

from __future__ import annotations

from sp_backend.layout import KV, STATE, Block, Layout, Q
from sp_backend.plan import Plan, Round, Transfer, visible


def build(layout: Layout) -> Plan:
    ranks, heads, rounds = layout.num_ranks, layout.all_heads, []
    for t in range(ranks + 1):
        transfers, attends = [], []
        for r in range(ranks):
            if t < ranks:
                q = [Block(Q, c, heads) for c in layout.q_of((r + t) % ranks)]
                attends += visible(layout, r, q, [Block(KV, c, heads) for c in layout.kv_of(r)])
                if t < ranks - 1:
                    transfers += [Transfer(b, r, (r - 1) % ranks) for b in q]
            owner = (r + t - 1) % ranks
            if owner != r and t > 0:
                transfers += [Transfer(Block(STATE, c, heads), r, owner) for c in layout.q_of(owner)]
        rounds.append(Round(tuple(transfers), tuple(attends)))
    return Plan("token_ring", layout, tuple(rounds))
