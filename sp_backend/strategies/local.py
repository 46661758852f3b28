"""Local: whole sequences, with their history, on their home rank. Nothing travels."""

from __future__ import annotations

from sp_backend.layout import KV, Block, Layout, Q
from sp_backend.plan import Plan, Round, visible


def build(layout: Layout) -> Plan:
    heads, attends = layout.all_heads, []
    for r in range(layout.num_ranks):
        q = [Block(Q, c, heads) for c in layout.q_of(r)]
        attends += visible(layout, r, q, [Block(KV, c, heads) for c in layout.kv_of(r)])
    return Plan("local", layout, (Round((), tuple(attends)),))
