"""Sharded Q: every rank holds Q of all tokens for its own heads, and the KV shards come to it.

In round t each rank sends its own shard straight to rank r+t+1, only the KV heads that rank reads; nothing is
passed on. The output stays sharded by heads, as the row-parallel projection after it wants. With redundant KV
the new tokens' keys and values were computed everywhere, and only history travels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sp_backend.columns import Draft
from sp_backend.layout import KV, Layout
from sp_backend.plan import Plan


def build(layout: Layout, redundant_kv: bool = False) -> Plan:
    """redundant_kv: so even if the layout is not."""
    layout = replace(layout, redundant_kv=layout.redundant_kv or redundant_kv)
    number, draft = layout.num_ranks, Draft(layout)
    heads = np.array([layout.heads_of(r) for r in range(number)]).T
    q, shard = np.array(layout.all_q()), np.array([_shard(layout, r) for r in range(number)], int)
    ranks = np.arange(number)
    draft.attend(q, layout.all_kv(), round=0, rank=ranks, heads=(heads[0], heads[1]))
    t, r = np.indices((number, number))[:, 1:]
    draft.attend(q[r], shard[(r - t) % number], round=t, rank=r, heads=(heads[0][r], heads[1][r]))
    to = (r + t) % number
    draft.send(KV, shard[r], round=t - 1, src=r, dst=to, heads=(heads[0][to], heads[1][to]))
    return Plan("sharded_q", layout, draft.rounds())


def fits(num_ranks: int, num_heads: int) -> list[dict[str, int]]:
    """Options: it has none, but may not fit."""
    return [] if num_heads % num_ranks else [{}]


def _shard(layout: Layout, rank: int) -> list[int]:
    """The chunks that only this rank holds."""
    return [c for c in layout.kv_of(rank) if not (layout.redundant_kv and c < layout.num_new)]
