"""Ring, KV moves: in round t a rank attends the KV of rank r+t (down) or r-t (up) and passes it on.

Downwards over 4 ranks (zigzag, no history; * is causal), as prune leaves it:
            round 0      round 1      round 2      round 3
    rank 0  kv0>3        kv1>3        kv2>3        q7: kv3 kv4
            q0: kv0*     q7: kv1 kv6  q7: kv2 kv5
            q7: kv0 kv7*
    rank 2  kv2,5>1      kv3,4>1      kv0>1        q2: kv1
            q2: kv2*     q5: kv3 kv4  q2: kv0      q5: kv1
            q5: kv2 kv5*              q5: kv0
Downwards, the back half of a block is dropped where it wraps around to rank P-1: 3/4 of the bytes of the new
tokens under zigzag. Upwards nearly every block must go all the way round. History, which every query sees,
saves nothing either way.
"""

from __future__ import annotations

from sp_backend.layout import KV, Block, Layout, Q
from sp_backend.plan import Plan, Round, Transfer, visible


def build_down(layout: Layout) -> Plan:
    return _ring(layout, -1, "ring_pass_kv")


def build_up(layout: Layout) -> Plan:
    return _ring(layout, +1, "ring_pass_kv_up")


def _ring(layout: Layout, step: int, name: str) -> Plan:
    ranks, heads, rounds = layout.num_ranks, layout.all_heads, []
    for t in range(ranks):
        transfers, attends = [], []
        for r in range(ranks):
            q = [Block(Q, c, heads) for c in layout.q_of(r)]
            kv = [Block(KV, c, heads) for c in layout.kv_of((r - step * t) % ranks)]
            attends += visible(layout, r, q, kv)
            if t < ranks - 1:
                transfers += [Transfer(b, r, (r + step) % ranks) for b in kv]
        rounds.append(Round(tuple(transfers), tuple(attends)))
    return Plan(name, layout, tuple(rounds))
