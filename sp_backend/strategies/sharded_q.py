"""Sharded Q: every rank holds Q of all tokens for its own heads, and the KV shards come to it.

In round t each rank sends its own shard straight to rank r+t+1, only the KV heads that rank reads; nothing is
passed on. The output stays sharded by heads, as the row-parallel projection after it wants. With redundant KV
the new tokens' keys and values were computed everywhere, and only history travels.
"""

from __future__ import annotations

from sp_backend.layout import KV, Block, Layout, Q
from sp_backend.plan import Plan, Round, Transfer, visible


def build(layout: Layout) -> Plan:
    ranks, rounds = layout.num_ranks, []
    for t in range(ranks):
        transfers, attends = [], []
        for r in range(ranks):
            heads, source, peer = layout.heads_of(r), (r - t) % ranks, (r + t + 1) % ranks
            q = [Block(Q, c, heads) for c in layout.q_of(r)]
            kv = layout.kv_of(r) if t == 0 else _shard(layout, source)
            attends += visible(layout, r, q, [Block(KV, c, heads) for c in kv])
            if t < ranks - 1:
                wanted = layout.heads_of(peer)
                transfers += [Transfer(Block(KV, c, wanted), r, peer) for c in _shard(layout, r)]
        rounds.append(Round(tuple(transfers), tuple(attends)))
    return Plan("sharded_q", layout, tuple(rounds))


def fits(num_ranks: int, num_heads: int) -> list[dict[str, int]]:
    """Options: it has none, but may not fit."""
    return [] if num_heads % num_ranks else [{}]


def _shard(layout: Layout, rank: int) -> list[int]:
    """The chunks that only this rank holds."""
    return [c for c in layout.kv_of(rank) if not (layout.redundant_kv and c < layout.num_new)]
