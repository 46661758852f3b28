"""Edge-disjoint Hamiltonian cycles of the complete digraph: every ordered pair of ranks is a link, used by at most one.

P ranks have P-1 of them, except 4 and 6 ranks (Tillson 1980), which have 2 and 4. Found here:
    strides  r -> r + k for k coprime to P
    odd P    Walecki's (P-1)/2 zigzags around a hub, each walked both ways
    even P   a search among decompositions into permutations, seeded, so that all ranks find the same one; it takes
             milliseconds and is not attempted above 24 ranks, where strides are all
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from random import Random

from sp_backend.strategies.rings import Cycle

_MAX_SEARCHED = 24
_Permutation = list[int]  # the rank that follows each rank


@lru_cache(maxsize=64)
def edge_disjoint(num_ranks: int) -> tuple[Cycle, ...]:
    """As many edge-disjoint Hamiltonian cycles as are known for a number of ranks."""
    if num_ranks % 2:
        return _walecki(num_ranks)
    strides = stride_cycles(num_ranks)
    if num_ranks <= 4 or num_ranks > _MAX_SEARCHED:
        return strides
    return _search(num_ranks, num_ranks - (2 if num_ranks == 6 else 1))


def stride_cycles(num_ranks: int) -> tuple[Cycle, ...]:
    """r -> r + k, in pairs of opposite directions: 1, -1, and so on."""
    halves = [k for k in range(1, num_ranks // 2 + 1) if gcd(k, num_ranks) == 1]
    strides = dict.fromkeys(x for k in halves for x in (k, num_ranks - k))  # P = 2 has one, not two
    return tuple(tuple(k * i % num_ranks for i in range(num_ranks)) for k in strides)


def node_cycles(num_nodes: int, ranks_per_node: int) -> tuple[Cycle, ...]:
    """Cycles that leave each rank for another node, and reach it from one, at most once in all.

    Each cycle walks through a whole node on a Hamiltonian path before it goes on to the next. The paths have
    different first and last ranks: they are the cycles of one more rank, cut open there.
    """
    hub = ranks_per_node
    paths = []
    for cycle in edge_disjoint(ranks_per_node + 1) if ranks_per_node > 1 else ((1, 0),):
        cut = cycle.index(hub)
        paths.append(cycle[cut + 1 :] + cycle[:cut])
    return tuple(tuple(node * ranks_per_node + i for node in range(num_nodes) for i in path) for path in paths)


def check_cycles(cycles: Sequence[Sequence[int]], num_ranks: int) -> tuple[Cycle, ...]:
    """The cycles as they are. Raises ValueError that names the cycle and the rank or edge at fault."""
    if not cycles:
        raise ValueError("cycles (--sp-mapping): none are given; at least one is needed")
    edges: dict[tuple[int, int], int] = {}
    for i, cycle in enumerate(cycles):
        for rank in cycle:
            if rank not in range(num_ranks):
                raise ValueError(f"cycles[{i}] (--sp-mapping) has rank {rank}; there are ranks 0 to {num_ranks - 1}")
            if cycle.count(rank) > 1:
                raise ValueError(f"cycles[{i}] (--sp-mapping) visits rank {rank} {cycle.count(rank)} times, not once")
        missing = sorted(set(range(num_ranks)) - set(cycle))
        if missing:
            raise ValueError(f"cycles[{i}] (--sp-mapping) misses rank {', '.join(map(str, missing))}")
        for edge in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            if edge in edges:
                raise ValueError(
                    f"cycles[{i}] (--sp-mapping): edge {edge[0]}>{edge[1]} is in cycles[{edges[edge]}] too"
                )
            edges[edge] = i
    return tuple(tuple(cycle) for cycle in cycles)


def _walecki(num_ranks: int) -> tuple[Cycle, ...]:
    """The last rank is the hub; the others zigzag 0, 1, -1, 2, -2, ... and the zigzags are rotations of each other."""
    hub = num_ranks - 1
    zigzag = [(i + 1) // 2 * (1 if i % 2 else -1) for i in range(hub)]
    paths = [tuple((shift + z) % hub for z in zigzag) for shift in range(hub // 2)]
    return tuple((hub, *p) for path in paths for p in (path, path[::-1]))


def _search(num_ranks: int, wanted: int) -> tuple[Cycle, ...]:
    """Decompose the complete digraph into permutations of which at least `wanted` are Hamiltonian cycles.

    From the strides, two permutations at a time trade the targets of some ranks; a trade stays if they do not have
    more cycles after it. Such trades keep the parity of the sum of all cycle counts, so it is put right first.
    """
    random = Random(num_ranks)

    def pick(n: int) -> int:
        return int(random.random() * n)

    maps = [[(r + k) % num_ranks for r in range(num_ranks)] for k in range(1, num_ranks)]
    surplus = sum(_num_cycles(p) for p in maps) - len(maps)
    odd = surplus % 2 == 1 or wanted < len(maps)  # 6 ranks: the permutation left over has two cycles
    while odd:
        _trade(maps[pick(len(maps))], maps[pick(len(maps))], pick(num_ranks))
        odd = not _trade_rows(maps, pick(num_ranks), pick(num_ranks), pick(len(maps)))
    counts = [_num_cycles(p) for p in maps]
    while counts.count(1) < wanted:
        a, b, rank = pick(len(maps)), pick(len(maps)), pick(num_ranks)
        if counts[a] == counts[b] == 1:
            continue
        before = maps[a].copy(), maps[b].copy()
        _trade(maps[a], maps[b], rank)
        after = _num_cycles(maps[a]), _num_cycles(maps[b])
        if sum(after) <= counts[a] + counts[b] or random.random() < 0.03:  # a few bad ones lead out of dead ends
            counts[a], counts[b] = after
        else:
            maps[a], maps[b] = before
    return tuple(_walk(p) for p, n in zip(maps, counts, strict=True) if n == 1)


def _walk(following: _Permutation, start: int = 0) -> Cycle:
    """The cycle that a rank is on."""
    cycle = [start]
    while (rank := following[cycle[-1]]) != start:
        cycle.append(rank)
    return tuple(cycle)


def _num_cycles(following: _Permutation) -> int:
    left, count = set(range(len(following))), 0
    while left:
        left.difference_update(_walk(following, next(iter(left))))
        count += 1
    return count


def _trade(f: _Permutation, g: _Permutation, rank: int) -> None:
    """Swap the targets of a rank, and of those whose targets would then be met twice."""
    if f is g:
        return
    before = {target: r for r, target in enumerate(g)}
    first = g[rank]
    while True:
        f[rank], g[rank] = g[rank], f[rank]
        if g[rank] == first:
            return
        rank = before[g[rank]]


def _trade_rows(maps: list[_Permutation], x: int, y: int, k: int) -> bool:
    """Swap the targets of ranks x and y in an odd number of permutations, k among them, if that is possible."""
    at = {p[y]: i for i, p in enumerate(maps)}
    chosen = [k]
    while (i := at.get(maps[chosen[-1]][x])) is not None and i != k:
        chosen.append(i)
    if i is None or len(chosen) % 2 == 0 or x == y:
        return False  # one of them would follow itself, or the parity would stay
    for i in chosen:
        maps[i][x], maps[i][y] = maps[i][y], maps[i][x]
    return True
