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
saves nothing either way. Both ways at once, half of each block goes up and half down: half the bytes on a link
that carries both directions at full speed.
"""

from __future__ import annotations

from sp_backend.columns import Draft
from sp_backend.layout import Layout
from sp_backend.plan import Plan
from sp_backend.strategies.rings import Cycle, down, pass_kv, up


def build_down(layout: Layout) -> Plan:
    return _plan("ring_pass_kv", layout, [down(layout.num_ranks)])


def build_up(layout: Layout) -> Plan:
    return _plan("ring_pass_kv_up", layout, [up(layout.num_ranks)])


def build_both(layout: Layout) -> Plan:
    return _plan("ring_pass_kv_both", layout, [up(layout.num_ranks), down(layout.num_ranks)])


def _plan(name: str, layout: Layout, cycles: list[Cycle]) -> Plan:
    draft = Draft(layout)
    pass_kv(draft, layout, cycles)
    return Plan(name, layout, draft.rounds())
