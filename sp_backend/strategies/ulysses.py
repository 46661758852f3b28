"""Ulysses and hybrid: ranks of a team trade chunks for heads, so that each has all of the team's tokens for its heads.

ulysses: all ranks are one team: three rounds, no ring. hybrid: several teams, and KV goes around a ring of teams
(unified sequence parallelism, arXiv 2405.07719). Teams are neighbours, or with ring_inside the rings are.
Query heads are divided as evenly as they can be; KV heads are repeated only where two ranks read the same one.
Cached tokens are traded as new ones are. Source: DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import numpy as np

from sp_backend.columns import Draft, Rounds
from sp_backend.layout import KV, STATE, Heads, Layout, Q
from sp_backend.plan import Plan
from sp_backend.strategies.rings import down, pass_kv_of_teams


def build(layout: Layout) -> Plan:
    return Plan("ulysses", layout, _rounds(layout, [list(range(layout.num_ranks))]))


def build_hybrid(layout: Layout, ulysses_degree: int | None = None, ring_inside: bool = False) -> Plan:
    """ulysses_degree: ranks of a team; None: the divisor of the number of ranks nearest to its square root."""
    ranks = layout.num_ranks
    fit = [u for u in range(1, ranks + 1) if ranks % u == 0]
    if ulysses_degree is None:
        ulysses_degree = nearest_root(ranks, layout.num_heads)
    if ulysses_degree not in fit:
        raise ValueError(
            f"ulysses_degree (--sp-ulysses-degree): {ranks} ranks cannot be divided into teams of {ulysses_degree}; "
            f"sizes that fit: {', '.join(map(str, fit))}"
        )
    num_teams = ranks // ulysses_degree
    if ring_inside:
        teams = [list(range(i, ranks, num_teams)) for i in range(num_teams)]
    else:
        teams = [list(range(i * ulysses_degree, (i + 1) * ulysses_degree)) for i in range(num_teams)]
    return Plan("hybrid", layout, _rounds(layout, teams))


def nearest_root(num_ranks: int, most: int | None = None) -> int:
    """The divisor of the number of ranks nearest to its square root, from below, and at most `most`."""
    return max(u for u in range(1, min(isqrt(num_ranks), most or num_ranks) + 1) if num_ranks % u == 0)


def fits(num_ranks: int, num_heads: int) -> list[dict[str, int]]:
    """Options of ulysses: it has none, but may not fit."""
    return [] if num_ranks > num_heads else [{}]


def hybrids(num_ranks: int, num_heads: int) -> Iterator[dict[str, int | bool]]:
    """Options of hybrid that make neither a plain ring nor plain ulysses."""
    for degree in range(2, num_ranks):
        if num_ranks % degree == 0 and degree <= num_heads:
            yield {"ulysses_degree": degree}
            yield {"ulysses_degree": degree, "ring_inside": True}


def _rounds(layout: Layout, teams: list[list[int]]) -> Rounds:
    size, draft = len(teams[0]), Draft(layout)
    heads = _divide_heads(layout, size)
    trades = [(team[i], team[j], *heads[j]) for team in teams for i in range(size) for j in range(size) if i != j]
    owner, peer, lo, hi = np.array(trades, int).reshape(-1, 4).T
    q, kv = np.array(layout.all_q())[owner], np.array(layout.all_kv())[owner]
    draft.send(Q, q, round=0, src=owner, dst=peer, heads=(lo, hi))
    draft.send(KV, kv, round=0, src=owner, dst=peer, heads=(lo, hi))
    pass_kv_of_teams(draft, layout, [down(len(teams))], teams, heads, first_round=1)
    draft.send(STATE, q, round=len(teams) + 1, src=peer, dst=owner, heads=(lo, hi))
    return draft.rounds()


def _divide_heads(layout: Layout, size: int) -> list[Heads]:
    """Ranges of query heads for the ranks of a team, whose sizes differ by one at most."""
    heads = layout.num_heads
    if size > heads:
        fit = [u for u in range(1, heads + 1) if layout.num_ranks % u == 0]
        raise ValueError(
            f"{size} ranks cannot share {heads} query heads: each needs one; sizes that fit: {', '.join(map(str, fit))}"
        )
    return [(heads * i // size, heads * (i + 1) // size) for i in range(size)]
