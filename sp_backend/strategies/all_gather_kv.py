"""All-gather: every rank sends its own KV to all others, who attend all of it in one round.

All links are busy at once and nothing is passed on, but what a rank receives is all there at the same time: memory
grows with the number of ranks. The own KV is attended while the others' travels.
"""

from __future__ import annotations

from sp_backend.layout import KV, Block, Layout, Q
from sp_backend.plan import Attend, Plan, Round, Transfer, visible


def build(layout: Layout) -> Plan:
    ranks, heads = range(layout.num_ranks), layout.all_heads
    transfers: list[Transfer] = []
    own: list[Attend] = []
    others: list[Attend] = []
    for r in ranks:
        q = [Block(Q, c, heads) for c in layout.q_of(r)]
        for s in ranks:
            kv = [Block(KV, c, heads) for c in layout.kv_of(s)]
            if s == r:
                own += visible(layout, r, q, kv)
            else:
                others += visible(layout, r, q, kv)
                transfers += [Transfer(b, s, r) for b in kv]
    return Plan("all_gather_kv", layout, (Round(tuple(transfers), tuple(own)), Round((), tuple(others))))
