"""Where the tokens of a step's prompts lie: which group of ranks shares a prompt, and how it is cut. Pure: no torch."""

from __future__ import annotations

from collections.abc import Sequence

from sp_backend.geometry import Geometry
from sp_backend.layout import Layout

Batch = Sequence[tuple[int, int]]  # (new, cached) tokens of each prompt


def lay_out(layout: Layout, batch: Batch, page_size: int = 1, dense_pairs: float = 0.0) -> Geometry:
    """Rows of each prompt in each chunk: prompts are given to groups of ranks, the largest first, each to the group
    with the least work; new tokens are cut between pages, cached ones are even over the group's ranks.

    dense_pairs: (query, key) pairs that a new token's other work is worth.
    """
    size, groups = layout.group_size, layout.num_groups
    rows: list[list[int]] = [[]] * len(batch)
    for group, indices in enumerate(assign(work_of(batch, dense_pairs), groups)):
        for i in indices:
            new, cached = batch[i]
            if layout.kind == "home":
                chunks = [new if c == group * size else 0 for c in range(layout.num_new)]
            else:
                chunks = list(layout.cut_pages(new, page_size, group))
            if layout.history != "none":
                shares = [cached * (r + 1) // size - cached * r // size for r in range(size)]
                if layout.history == "copies":
                    shares = [cached] * size
                before, after = group * size, (groups - 1 - group) * size
                chunks += [0] * before + shares + [0] * after
            rows[i] = chunks
    return Geometry(rows)


def work_of(batch: Batch, dense_pairs: float) -> list[float]:
    """Of each prompt, in (query, key) pairs."""
    return [new * (cached + new / 2 + dense_pairs) for new, cached in batch]


def assign(work: Sequence[float], num_groups: int) -> list[list[int]]:
    """Indices of the prompts of each group that has any, those with the most work first."""
    order = sorted(range(len(work)), key=work.__getitem__, reverse=True)
    if num_groups == 1:
        return [order]
    if num_groups >= len(order):
        return [[i] for i in order]
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    load = [0.0] * num_groups
    for i in order:
        least = load.index(min(load))
        groups[least].append(i)
        load[least] += work[i]
    return [group for group in groups if group]
