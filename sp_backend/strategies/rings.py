"""KV in pieces, each piece on its own ring of teams: what the strategies that pass KV have in common.

A team is some ranks that hold each other's chunks for one group of heads a rank (for a plain ring: one rank with all
heads). Rings are written as in the literature on Hamiltonian cycles: the order in which a piece visits the teams.
"""

from __future__ import annotations

from collections.abc import Sequence

from sp_backend.layout import KV, Block, Heads, Layout, Q
from sp_backend.plan import Attend, Round, Transfer, visible

Cycle = tuple[int, ...]


def up(num_teams: int) -> Cycle:
    return tuple(range(num_teams))


def down(num_teams: int) -> Cycle:
    return tuple(-i % num_teams for i in range(num_teams))


def pass_kv(layout: Layout, cycles: Sequence[Cycle]) -> list[Round]:
    """Rounds in which piece j of each rank's KV goes around cycles[j] of ranks, attended wherever it comes."""
    return pass_kv_of_teams(layout, cycles, [[r] for r in range(layout.num_ranks)], [layout.all_heads])


def pass_kv_of_teams(
    layout: Layout, cycles: Sequence[Cycle], teams: Sequence[Sequence[int]], heads: Sequence[Heads]
) -> list[Round]:
    """Rounds in which piece j of each team's KV goes around cycles[j] of teams.

    teams: the ranks of each team. heads: of the i-th rank of every team. In the first round each rank attends its
    team's KV whole.
    """
    place = [{team: i for i, team in enumerate(cycle)} for cycle in cycles]
    kv = [[c for r in team for c in layout.kv_of(r)] for team in teams]
    rounds = []
    for t in range(len(teams)):
        transfers: list[Transfer] = []
        attends: list[Attend] = []
        for i, team in enumerate(teams):
            queries = [c for r in team for c in layout.q_of(r)]
            for slot, rank in enumerate(team):
                h = heads[slot]
                q = [Block(Q, c, h) for c in queries]
                if t == 0:
                    attends += visible(layout, rank, q, [Block(KV, c, h) for c in kv[i]])
                for j, cycle in enumerate(cycles):
                    source, peer = cycle[place[j][i] - t], cycle[(place[j][i] + 1) % len(cycle)]
                    held = [Block(KV, c, h, (j, len(cycles))) for c in kv[source]]
                    if t > 0:
                        attends += visible(layout, rank, q, held)
                    if t < len(teams) - 1:
                        transfers += [Transfer(b, rank, teams[peer][slot]) for b in held]
        rounds.append(Round(tuple(transfers), tuple(attends)))
    return rounds
