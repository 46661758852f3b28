"""KV in pieces, each piece on its own ring of teams: what the strategies that pass KV have in common.

A team is some ranks that hold each other's chunks for one group of heads a rank (for a plain ring: one rank with all
heads). Rings are written as in the literature on Hamiltonian cycles: the order in which a piece visits the teams.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sp_backend.columns import Draft
from sp_backend.layout import KV, Heads, Layout

Cycle = tuple[int, ...]


def up(num_teams: int) -> Cycle:
    return tuple(range(num_teams))


def down(num_teams: int) -> Cycle:
    return tuple(-i % num_teams for i in range(num_teams))


def pass_kv(draft: Draft, layout: Layout, cycles: Sequence[Cycle]) -> None:
    """Rounds in which piece j of each rank's KV goes around cycles[j] of ranks, attended wherever it comes."""
    pass_kv_of_teams(draft, layout, cycles, [[r] for r in range(layout.num_ranks)], [layout.all_heads])


def pass_kv_of_teams(
    draft: Draft,
    layout: Layout,
    cycles: Sequence[Cycle],
    teams: Sequence[Sequence[int]],
    heads: Sequence[Heads],
    first_round: int = 0,
) -> None:
    """Rounds in which piece j of each team's KV goes around cycles[j] of teams.

    teams: the ranks of each team. heads: of the i-th rank of every team. In the first round each rank attends its
    team's KV whole.
    """
    number, rings, order = len(teams), np.arange(len(cycles)), np.array(cycles)
    ranks = np.array(teams)  # [team, slot]
    q = np.array([[c for r in team for c in layout.q_of(r)] for team in teams])
    kv = np.array([[c for r in team for c in layout.kv_of(r)] for team in teams])
    of_slot = tuple(np.array(heads).T)  # [slot]
    draft.attend(q[:, None], kv[:, None], round=first_round, rank=ranks, heads=of_slot)
    # below: [round, team, slot, ring]
    t, team = np.arange(number)[:, None, None, None], np.arange(number)[:, None, None]
    rank, of_slot = ranks[:, :, None], tuple(x[:, None] for x in of_slot)
    place = order.argsort(1)[rings, team]
    source, peer = order[rings, (place - t) % number], order[rings, (place + 1) % number]
    slot, when, piece = np.arange(ranks.shape[1])[:, None], first_round + t, (rings, len(cycles))
    draft.attend(q[team], kv[source[1:]], round=when[1:], rank=rank, heads=of_slot, piece=piece)
    to = ranks[peer, slot]
    draft.send(KV, kv[source[:-1]], round=when[:-1], src=rank, dst=to, heads=of_slot, piece=piece)
