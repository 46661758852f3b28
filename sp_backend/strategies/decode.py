"""Decode: Q goes to every rank, each attends the KV it holds, and each state goes to its owner: two
exchanges.

For few new tokens over a long cache: bytes grow with the queries alone, and no ring of P steps is paid for. The
own queries are attended while the others travel. In layout heads a query chunk starts, and its state ends, in
groups of heads, one a rank; there all are attended together, so that the cache is read once and not once a group.
"""

from __future__ import annotations

from sp_backend.layout import KV, STATE, Block, Layout, Q
from sp_backend.plan import Attend, Plan, Round, Transfer, visible


def build(layout: Layout) -> Plan:
    ranks = range(layout.num_ranks)
    pairs = [(r, s) for r in ranks for s in ranks if r != s]

    def attends(rank: int, source: int) -> list[Attend]:
        heads = layout.heads_of(source)
        q = [Block(Q, c, heads) for c in layout.q_of(source)]
        own = [c for c in layout.kv_of(rank) if layout.owner(c) == rank]
        return visible(layout, rank, q, [Block(KV, c, heads) for c in own])

    gather = [Transfer(Block(Q, c, layout.heads_of(r)), r, s) for r, s in pairs for c in layout.q_of(r)]
    scatter = [Transfer(Block(STATE, c, layout.heads_of(s)), r, s) for r, s in pairs for c in layout.q_of(s)]
    own = [a for r in ranks for a in attends(r, r)]
    others = [a for r, s in pairs for a in attends(r, s)]
    first, second = ([], own + others) if layout.kind == "heads" else (own, others)
    rounds = (Round(tuple(gather), tuple(first)), Round((), tuple(second)), Round(tuple(scatter), ()))
    return Plan("decode", layout, rounds)
