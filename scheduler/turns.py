"""Which streams a decode step is of.

A stream whose pages all lie on one rank needs no other. While all are such, every rank decodes its own streams in steps
of its own: one that is slower, for its core has other work or its streams more history, holds up nobody else. As soon
as one stream needs several ranks, all go together: two steps would read the weights twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import accumulate

from scheduler.placement import Placement
from scheduler.sequence import Sequence

Ranks = frozenset[int]  # SP ranks


class Turns:
    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._everyone = frozenset(placement.all_ranks)
        self._owed: set[int] = set()  # ranks whose streams get a token before the next prefill step
        self._last: dict[Ranks, int] = {}  # id of the last stream of their previous step, where streams take turns

    def owe(self) -> None:
        """Prompts had their step, or cannot have one: streams come next."""
        self._owed = set(self._everyone)

    def are_owed(self, streams: Iterable[Sequence]) -> bool:
        """Whether some stream's turn comes before that of prompts."""
        return bool(self._owed) and any(not self._owed.isdisjoint(ranks) for ranks in self._split(streams))

    def next(self, streams: Seq[Sequence], free: Ranks, prompts_wait: bool) -> list[tuple[Ranks, list[Sequence]]]:
        """The decode steps that can be sent to `free` ranks, what is owed first: on which ranks, of which streams."""
        split = self._split(streams)
        steps = [(ranks, split[ranks]) for ranks in split if ranks <= free and (ranks & self._owed or not prompts_wait)]
        return sorted(steps, key=lambda step: not step[0] & self._owed)

    def take(self, ranks: Ranks, streams: Iterable[Sequence]) -> list[Sequence]:
        """All streams of a step, oldest first; or as many as have no more cached tokens between them than the pages
        hold.

        Kernels read a step's history in one piece, in which a prefix that many streams share stands once for each
        of them. Beyond the bound they take turns, so that sharing a prefix never costs more memory than not to.
        """
        capacity = self._placement.capacity
        streams = sorted(streams, key=lambda s: s.id)
        if sum(s.num_computed for s in streams) <= capacity:
            return streams
        last = self._last.get(ranks, -1)
        streams.sort(key=lambda s: s.id <= last)  # stable: those after the last one come first
        history = list(accumulate(s.num_computed for s in streams))
        turn = streams[: max(1, bisect_right(history, capacity))]
        self._last[ranks] = turn[-1].id
        return sorted(turn, key=lambda s: s.id)

    def taken(self, ranks: Ranks) -> None:
        """Their step is planned."""
        self._owed -= ranks

    def _split(self, streams: Iterable[Sequence]) -> dict[Ranks, list[Sequence]]:
        """The streams of each step that there would be if every rank were free."""
        own: dict[Ranks, list[Sequence]] = {}
        for stream in streams:
            rank = stream.owners[-1]
            if self._placement.heads or not stream.lies_on(range(rank, rank + 1)):
                return {self._everyone: list(streams)}
            own.setdefault(frozenset((rank,)), []).append(stream)
        return own
