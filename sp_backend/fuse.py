"""Which attends of a rank and round become one kernel call. Pure: no torch, no sizes.

Received keys: put in order of how many query chunks see them, the ones that a chunk sees come first and its own
chunk last, so one call does for all that see no causal block and one for those that do. So do keys in pages, which
are joined without moving them. Other keys held from the start are not joined, since a long history is not worth
moving: attends that read the same keys become one call over several query chunks, and adjacent groups of heads that
meet the same keys are put side by side.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sp_backend.layout import CAUSAL, FULL, Block
from sp_backend.plan import Attend


@dataclass(frozen=True, slots=True)
class Fused:
    """Query chunks, each in one or more adjacent groups of heads, and the keys that they meet."""

    qs: tuple[tuple[Block, ...], ...]  # [query chunk][heads]
    kvs: tuple[Block, ...]
    num_seen: tuple[int, ...]  # [query chunk]: it meets so many of the kvs, from the first on
    causal: bool  # the last that each meets is its own chunk


def fuse(attends: Sequence[Attend], start: Callable[[Block], Block | None], paged: Sequence[int] = ()) -> list[Fused]:
    """start: the block held from the start that contains a given one, if any. paged: chunks whose keys are in pages,
    in the order of their positions."""
    received = [a for a in attends if start(a.kv) is None]
    pages = [a for a in attends if a.kv.chunk in paged]
    if len({a.q.heads for a in pages}) > 1:  # side by side is better
        pages = []
    held = [a for a in attends if a not in received and a not in pages]
    (local, alone), (joined, apart) = _nested(pages, paged), _nested(received)
    return local + _by_keys(held + alone + apart, start) + joined


def _nested(attends: Sequence[Attend], order: Sequence[int] = ()) -> tuple[list[Fused], list[Attend]]:
    """Calls over joined keys, and the attends that fit in none. order: of the chunks of keys that equally many see."""
    by_heads: dict[object, list[Attend]] = defaultdict(list)
    for a in attends:
        by_heads[a.q.heads].append(a)
    calls: list[Fused] = []
    apart: list[Attend] = []
    for group in by_heads.values():
        viewers = Counter(a.kv for a in group)
        own = {a.q: a.kv for a in group if a.mask == CAUSAL}
        kvs = sorted(
            viewers,
            key=lambda kv: (-viewers[kv], kv in own.values(), order.index(kv.chunk) if order else kv.chunk, kv),
        )
        seen: dict[Block, list[Attend]] = defaultdict(list)
        for a in group:
            seen[a.q].append(a)
        queries: dict[bool, list[Block]] = {False: [], True: []}
        for q, mine in seen.items():
            first = kvs[: len(mine)]
            if {a.kv for a in mine} == {*first} and own.get(q, first[-1]) == first[-1]:
                queries[q in own].append(q)
            else:
                apart += mine
        for causal, qs in queries.items():
            if qs:
                counts = tuple(len(seen[q]) for q in qs)
                calls.append(Fused(tuple((q,) for q in qs), tuple(kvs[: max(counts)]), counts, causal))
    return calls, apart


def _by_keys(attends: Sequence[Attend], start: Callable[[Block], Block | None]) -> list[Fused]:
    """Calls with one KV block each."""
    rows: dict[object, list[Attend]] = defaultdict(list)
    for a in attends:
        rows[(a.kv, a.q.heads) if a.mask == FULL else a].append(a)
    columns: dict[object, list[list[Attend]]] = defaultdict(list)
    for group in rows.values():
        first = group[0]
        columns[first.kv.chunk, first.kv.piece, first.mask, *(a.q.chunk for a in group)].append(group)
    calls: list[tuple[Block, list[list[Attend]]]] = []
    for groups in columns.values():
        groups.sort(key=lambda group: group[0].kv.heads)
        for i, group in enumerate(groups):
            kv = group[0].kv
            hull = kv._replace(heads=(calls[-1][0].heads[0], kv.heads[1])) if i else kv
            if i and calls[-1][0].heads[1] == kv.heads[0] and start(hull) is not None:
                calls[-1] = hull, [*calls[-1][1], group]
            else:
                calls.append((kv, [group]))
    return [_call(kv, groups) for kv, groups in calls]


def _call(kv: Block, groups: list[list[Attend]]) -> Fused:
    """groups: [heads][query chunk]."""
    qs = tuple(tuple(a.q for a in chunk) for chunk in zip(*groups, strict=True))
    return Fused(qs, (kv,), (1,) * len(qs), groups[0][0].mask == CAUSAL)
