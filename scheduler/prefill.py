"""Picks the chunks of one prefill step.

Two lanes, each first come first served: short prompts (PlanChooser.is_short) and long ones. A step holds
at most `chunked_prefill_size` new tokens and, while streams run, is predicted to take at most `max_prefill_seconds`.
While both lanes have work, short prompts get at most half of a step, and when they leave no room for a long one, the
next step is its own: so a long prefill delays a short prompt by a step or two, and short ones at most about halve the
speed of a long one. Memory knows no lanes: who waits for pages is overtaken by nobody who came later.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

from scheduler.config import SchedulerConfig
from scheduler.placement import Placement
from scheduler.plans import PlanChooser
from scheduler.prefill_time import PrefillTime
from scheduler.prefix_cache import Node
from scheduler.sequence import Chunk, Sequence

LOOKAHEAD = 128  # waiting prompts of a lane that one step considers
GROWTH_TOKENS = 128  # how far ahead a stream's room is thought of when a prompt is admitted


@dataclass(slots=True, eq=False)
class Lane:
    waiting: list[Sequence] = field(default_factory=list)  # retracted ones first
    prefilling: list[Sequence] = field(default_factory=list)  # admitted, prompt not complete
    out_of_pages: Sequence | None = None  # who waits for pages: the first of the lane that could go on otherwise

    def __bool__(self) -> bool:
        return bool(self.waiting or self.prefilling)

    def remove(self, sequence: Sequence) -> None:
        for queue in (self.prefilling, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
                break
        if self.out_of_pages is sequence:
            self.out_of_pages = None


class Draft:
    """A prefill step in the making. Work is counted for the busiest rank, which the others wait for."""

    def __init__(self, placement: Placement) -> None:
        self.chunks: list[Chunk] = []
        self.num_tokens = 0
        self.num_history = 0  # cached tokens that its chunks read
        self.num_cached = 0  # tokens that its new sequences found in the prefix cache
        self.tokens = [0.0] * placement.num_ranks  # computed by each rank
        self.pairs = [0.0] * placement.num_ranks  # (query, key) pairs of each rank
        self._placement = placement
        self._first_pages: set[tuple[int, bytes]] = set()

    def size_with(self, start: int, num_new: int, home: range) -> tuple[float, float]:
        """Tokens and pairs of the busiest rank if this chunk were added."""
        pairs = num_new * (start + num_new / 2)
        return (
            max(max(self.tokens), max(self.tokens[r] for r in home) + num_new / len(home)),
            max(max(self.pairs), max(self.pairs[r] for r in home) + pairs / len(home)),
        )

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.num_tokens += chunk.num_new
        self.num_history += chunk.start
        for rank in chunk.home:
            self.tokens[rank] += chunk.num_new / len(chunk.home)
            self.pairs[rank] += chunk.num_new * (chunk.start + chunk.num_new / 2) / len(chunk.home)
        page = chunk.start // self._placement.page_size
        self._first_pages.add((page, self._placement.cache.key(chunk.sequence.tokens, page)))

    def computes(self, sequence: Sequence, page: int) -> bool:
        """Whether a prompt whose first uncached page is `page` would find that one cached after this step."""
        if (page + 1) * self._placement.page_size >= len(sequence.tokens):
            return False
        return (page, self._placement.cache.key(sequence.tokens, page)) in self._first_pages


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may hold, counting what it holds already."""

    tokens: int
    seconds: float
    num_running: int  # streams
    reserved: int  # pages that are left to them


class PrefillLanes:
    def __init__(
        self, config: SchedulerConfig, placement: Placement, plans: PlanChooser, prefill_time: PrefillTime
    ) -> None:
        self.short = Lane()
        self.long = Lane()
        self._config = config
        self._placement = placement
        self._plans = plans
        self._prefill_time = prefill_time
        self._long_went_without = False
        if 0 < config.chunked_prefill_size < placement.page_size:
            raise ValueError(
                f"chunked_prefill_size {config.chunked_prefill_size} is less than a page of "
                f"{placement.page_size} tokens"
            )

    def __bool__(self) -> bool:
        """Whether some prompt is not complete."""
        return bool(self.short or self.long)

    @property
    def prefilling(self) -> list[Sequence]:
        return self.short.prefilling + self.long.prefilling

    @property
    def num_waiting(self) -> int:
        return len(self.short.waiting) + len(self.long.waiting)

    def add(self, sequence: Sequence) -> None:
        self._lane_of(sequence).waiting.append(sequence)

    def add_first(self, sequence: Sequence) -> None:
        self._lane_of(sequence).waiting.insert(0, sequence)

    def remove(self, sequence: Sequence) -> None:
        self.short.remove(sequence)
        self.long.remove(sequence)

    def clear(self) -> None:
        self.short, self.long = Lane(), Lane()

    def select(self, running: list[Sequence]) -> Draft:
        """The next prefill step, with pages taken; empty if nobody can go on. running: the streams."""
        if not self:
            return Draft(self._placement)
        most = self._config.chunked_prefill_size if self._config.chunked_prefill_size > 0 else sys.maxsize
        seconds = math.inf if all(s.is_complete for s in running) else self._config.max_prefill_seconds
        reserved = sum(map(self._growth, running))
        whole = Limits(most, seconds, len(running), reserved)
        half = Limits(max(most // 2, self._placement.page_size), seconds / 2, len(running), reserved)
        draft = Draft(self._placement)
        long_first = self._long_went_without and bool(self.long)
        if not long_first:
            self._fill(self.short, draft, half if self.long else whole)
        num_short = len(draft.chunks)
        self._fill(self.long, draft, whole)
        self._long_went_without = bool(self.long) and 0 < num_short == len(draft.chunks)
        if long_first and not draft.chunks:
            self._fill(self.short, draft, whole)
        return draft

    def _lane_of(self, sequence: Sequence) -> Lane:
        num_cached = len(self._placement.find_prefix(sequence)) * self._placement.page_size
        return self.short if self._plans.is_short(len(sequence.tokens) - num_cached) else self.long

    def _fill(self, lane: Lane, draft: Draft, limits: Limits) -> None:
        lane.out_of_pages = None
        for sequence in lane.prefilling:
            if not self._extend(lane, sequence, draft, limits):
                return
        for sequence in lane.waiting[:LOOKAHEAD]:
            if not self._may_start(lane, sequence, draft, limits):
                return
            path = self._placement.find_prefix(sequence)
            if self._placement.reads_cache(sequence) and draft.computes(sequence, len(path)):
                if lane is self.long:
                    return
                continue  # cheaper a step later
            if not self._admit(lane, sequence, path, draft, limits):
                return
            if not self._extend(lane, sequence, draft, limits):
                return

    def _may_start(self, lane: Lane, sequence: Sequence, draft: Draft, limits: Limits) -> bool:
        other = self.long if lane is self.short else self.short
        if other.out_of_pages and other.out_of_pages.id < sequence.id:
            return False
        num_live = limits.num_running + len(self.prefilling)
        return num_live < self._config.max_running_requests and draft.num_tokens < limits.tokens

    def _admit(self, lane: Lane, sequence: Sequence, path: list[Node], draft: Draft, limits: Limits) -> bool:
        pages_for, prefilling = self._placement.pages_for, self.prefilling
        spare = limits.reserved + sum(pages_for(len(s.tokens)) - len(s.pages) + self._growth(s) for s in prefilling)
        if limits.num_running or prefilling:
            spare += self._growth(sequence)
        if not self._placement.admit(sequence, path, spare, draft.tokens):
            lane.out_of_pages = sequence
            return False
        if not sequence.was_admitted:
            sequence.was_admitted, sequence.cached_tokens = True, sequence.num_computed
        draft.num_cached += sequence.num_computed
        lane.waiting.remove(sequence)
        lane.prefilling.append(sequence)
        return True

    def _extend(self, lane: Lane, sequence: Sequence, draft: Draft, limits: Limits) -> bool:
        """Adds the sequence's next chunk; False if the lane should stop here."""
        num_new = self._cut(sequence, draft, limits)
        if not num_new:
            return False
        if draft.chunks and draft.num_history + sequence.num_computed > self._placement.capacity:
            return False  # see Turns.take
        if self._placement.heads and draft.chunks:  # layout heads runs one plan a step
            as_intended = self._placement.has_room_as_intended(sequence, num_new)
            if draft.chunks[0].plan is not None or not as_intended:
                return False
        chunk = self._placement.place(sequence, num_new)
        if chunk is None:
            lane.out_of_pages = sequence
            return False
        draft.add(chunk)
        # the next long prompt waits for the end of this one; short ones may go on, on other ranks
        return chunk.samples or len(chunk.home) == 1

    def _cut(self, sequence: Sequence, draft: Draft, limits: Limits) -> int:
        """Length of the next chunk: whole pages, except at the end of the prompt. A prompt that may not be cut runs
        beside others where the limit allows it, or alone.
        """
        if self._placement.whole_prompts:
            fits = draft.num_tokens + sequence.num_remaining <= limits.tokens
            return sequence.num_remaining if fits or not draft.chunks else 0
        ps, remaining, home = self._placement.page_size, sequence.num_remaining, sequence.home
        granule = len(home)  # then every rank gets as many pages
        room = min(remaining, limits.tokens - draft.num_tokens)
        num_pages = self._placement.pages_for(room) if room == remaining else room // ps
        if limits.seconds < math.inf and num_pages > 0:
            start = sequence.num_computed
            fitting = self._prefill_time.largest(
                limits.seconds, num_pages, lambda n: draft.size_with(start, min(n * ps, remaining), home)
            )
            smallest = min(num_pages, granule)
            num_pages = fitting if fitting >= smallest else 0 if draft.chunks else smallest
        if num_pages * ps < remaining:
            num_pages = num_pages - num_pages % granule or (0 if draft.chunks else num_pages)
        return min(num_pages * ps, remaining)

    def _growth(self, sequence: Sequence) -> int:
        """Pages that a stream will soon need: left free, so that few prompts are admitted only to be retracted."""
        return self._placement.pages_for(min(sequence.max_length - len(sequence.tokens), GROWTH_TOKENS))
