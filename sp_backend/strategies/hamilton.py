"""Hamilton: KV in pieces, each on its own Hamiltonian cycle of the ranks; no two cycles share a link.

Bytes are those of a ring, spread over as many links of each rank as there are cycles: for ranks that reach many
others directly. Cycles come from cycles.py or from the user. Where there are not enough (4 ranks have 2 and 6 have 4;
an even number above 24, those that are strides), each rank sends the j-th piece of its own KV straight to all others in
round j: the same bytes, and as many on every link.
Source: TASP (arXiv 2509.26541) and Hamilton attention in MindSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sp_backend.columns import Draft
from sp_backend.layout import KV, Layout
from sp_backend.plan import Plan
from sp_backend.strategies.cycles import check_cycles, edge_disjoint, node_cycles, stride_cycles
from sp_backend.strategies.rings import Cycle, pass_kv, up

_MOST_BY_DEFAULT = 15  # smaller pieces are all latency


def build(
    layout: Layout,
    num_rings: int | None = None,
    cycles: tuple[Cycle, ...] | None = None,
    ranks_per_node: int | None = None,
) -> Plan:
    """num_rings: None is as many as there are, up to 15. Which ones, cycles or ranks_per_node say, else cycles.py."""
    ranks = layout.num_ranks
    if cycles is not None and ranks_per_node is not None:
        raise ValueError("cycles (--sp-mapping) say already which ranks are neighbours; leave out ranks_per_node")
    if cycles is not None:
        there, most = check_cycles(cycles, ranks), len(cycles)
    elif ranks_per_node is not None:
        there = _of_nodes(ranks, ranks_per_node)
        most = len(there)
    else:
        there, most = _cycles(ranks, num_rings), max(ranks - 1, 1)
    wanted = min(most, _MOST_BY_DEFAULT) if num_rings is None else num_rings
    if not 1 <= wanted <= most:
        raise ValueError(f"num_rings (--sp-num-rings): 1 to {most} rings share no link here, not {num_rings}")
    draft = Draft(layout)
    if wanted <= len(there):
        pass_kv(draft, layout, there[:wanted])
    else:
        _exchange(draft, layout, wanted)
    return Plan("hamilton", layout, draft.rounds())


def least_rounds(num_ranks: int, num_rings: int | None) -> int:
    """Of build: a ring takes as many as there are ranks, pieces that go straight to all others one more than pieces."""
    return min(num_ranks, 1 + (num_rings or min(num_ranks - 1, _MOST_BY_DEFAULT)))


def ring_counts(num_ranks: int, num_heads: int) -> Iterator[dict[str, int]]:
    """Options worth trying: powers of two, all rings, and nodes of every size."""
    counts = {n for n in (2, 4, 8, min(num_ranks - 1, _MOST_BY_DEFAULT)) if 2 <= n < num_ranks}
    yield from ({"num_rings": n} for n in sorted(counts))
    yield from ({"ranks_per_node": n} for n in range(2, min(num_ranks, 17)) if num_ranks % n == 0)


def _cycles(num_ranks: int, num_rings: int | None) -> tuple[Cycle, ...]:
    """Strides where they suffice: opposite directions of a link are used in pairs."""
    if num_ranks == 1:
        return (up(1),)
    strides = stride_cycles(num_ranks)
    return strides if num_rings is not None and num_rings <= len(strides) else edge_disjoint(num_ranks)


def _of_nodes(num_ranks: int, ranks_per_node: int) -> tuple[Cycle, ...]:
    fit = [n for n in range(1, num_ranks) if num_ranks % n == 0]
    if ranks_per_node not in fit:
        raise ValueError(
            f"ranks_per_node: {num_ranks} ranks cannot be divided into several nodes of {ranks_per_node}; "
            f"sizes that fit: {', '.join(map(str, fit)) or 'none'}"
        )
    return node_cycles(num_ranks // ranks_per_node, ranks_per_node)


def _exchange(draft: Draft, layout: Layout, num_pieces: int) -> None:
    """In round j each rank sends piece j of its own KV to all others; own KV is attended in the first round."""
    ranks, q, kv = range(layout.num_ranks), np.array(layout.all_q()), np.array(layout.all_kv())
    r, s = np.array([(r, s) for r in ranks for s in ranks if r != s], int).reshape(-1, 2).T
    piece = np.arange(num_pieces)[:, None]
    draft.attend(q, kv, round=0, rank=ranks)
    draft.attend(q[r], kv[s], round=piece + 1, rank=r, piece=(piece, num_pieces))
    draft.send(KV, kv[r], round=piece, src=r, dst=s, piece=(piece, num_pieces))
