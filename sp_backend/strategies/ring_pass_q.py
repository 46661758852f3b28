"""Ring, Q moves: KV stays, Q goes round, and one all-to-all at the end sends every state home.

For few new tokens over a long cache: the bytes do not grow with the cache. token_ring hides the way home at the
price of more messages. Source: Meta's context parallelism for inference (arXiv 2411.01783).
"""

from __future__ import annotations

from sp_backend.layout import KV, STATE, Block, Layout, Q
from sp_backend.plan import Attend, Plan, Round, Transfer, visible


def build(layout: Layout) -> Plan:
    ranks = range(layout.num_ranks)
    home = [Transfer(b, r, s) for r in ranks for s in ranks if s != r for b in states_of(layout, s)]
    rounds = [Round(*pass_q(layout, t)) for t in ranks]
    return Plan("ring_pass_q", layout, (*rounds, Round(tuple(home), ())))


def pass_q(layout: Layout, t: int) -> tuple[tuple[Transfer, ...], tuple[Attend, ...]]:
    """Round t of Q going down the ring: rank r has that of rank r+t, attends with it and passes it on."""
    ranks, heads = layout.num_ranks, layout.all_heads
    transfers: list[Transfer] = []
    attends: list[Attend] = []
    for r in range(ranks):
        q = [Block(Q, c, heads) for c in layout.q_of((r + t) % ranks)]
        attends += visible(layout, r, q, [Block(KV, c, heads) for c in layout.kv_of(r)])
        if t < ranks - 1:
            transfers += [Transfer(b, r, (r - 1) % ranks) for b in q]
    return tuple(transfers), tuple(attends)


def states_of(layout: Layout, rank: int) -> list[Block]:
    """The states that end on a rank."""
    return [Block(STATE, c, layout.all_heads) for c in layout.q_of(rank)]
