"""One live request: its tokens so far, and where its pages lie."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from scheduler.prefix_cache import Node
from scheduler.request import GeneratedToken, GenerateRequest, StepReport

NOWHERE = range(0)
UNDRAWN = -1


@dataclass(slots=True, eq=False)
class Sequence:
    """Prefilling while more than the newest token is not yet in the KV cache, else decoding.

    A retracted sequence loses its pages, keeps its tokens, and prefills prompt and generated tokens alike. Steps are
    planned ahead: what a step in flight computes counts as computed, and the token that it draws is UNDRAWN so far.
    """

    id: int  # order of arrival; also names the request to the workers
    request: GenerateRequest
    max_length: int  # prompt and generated tokens at which it ends
    tokens: array[int]  # prompt, then generated
    num_computed: int = 0  # tokens in the KV cache, once the steps in flight are done
    home: range = NOWHERE  # SP ranks that share its prefill
    owners: bytearray = field(default_factory=bytearray)  # SP rank of each page
    pages: list[int] = field(default_factory=list)  # its index on that rank
    pages_on: list[int] = field(default_factory=list)  # pages on each SP rank
    node: Node | None = None  # the newest page that the prefix cache knows, or a root; None: not admitted
    num_cached: int = 0  # pages that it knows
    has_twins: bool = False  # another request was faster: its next page is cached from there
    cached_tokens: int = 0  # of the prompt, found at the first admission
    was_admitted: bool = False
    num_stays: int = 0  # how often it has left the batch: steps planned for an earlier stay mean nothing to it
    reports: list[StepReport] = field(default_factory=list)  # of steps that no output has told yet
    scores: dict[int, GeneratedToken] = field(default_factory=dict)  # position -> prompt token, not told yet
    pooled: NDArray[np.float64] | float = 0.0  # sum of the states of its embedding's tokens so far

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_known(self) -> int:
        """Tokens without those that steps in flight will draw."""
        known = len(self.tokens)
        while self.tokens[known - 1] == UNDRAWN:
            known -= 1
        return known

    @property
    def is_complete(self) -> bool:
        """Whether its last token is drawn, if only by a step in flight."""
        return len(self.tokens) >= self.max_length

    @property
    def num_remaining(self) -> int:
        """Tokens to be computed before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    def take_reports(self) -> list[StepReport]:
        reports, self.reports = self.reports, []
        return reports

    def take_scores(self) -> list[GeneratedToken]:
        """Of the whole prompt but its first token; none before they are there, or once they were taken."""
        if len(self.scores) < self.num_prompt - 1:
            return []
        scores, self.scores = self.scores, {}
        return [token for _, token in sorted(scores.items())]

    def lies_on(self, ranks: range) -> bool:
        """Whether no page is on another rank."""
        return sum(self.pages_on[ranks.start : ranks.stop]) == len(self.pages)

    def add_page(self, rank: int, page: int) -> None:
        self.owners.append(rank)
        self.pages.append(page)
        self.pages_on[rank] += 1

    def forget_pages(self) -> None:
        """Back to the state before admission."""
        self.num_computed = self.num_cached = 0
        self.pooled = 0.0
        self.home = NOWHERE
        self.owners = bytearray()
        self.pages, self.pages_on = [], []
        self.has_twins = False
        self.node = None
        self.num_stays += 1


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """A sequence's part of a step: `num_new` tokens after `start` computed ones."""

    sequence: Sequence
    start: int
    num_new: int
    home: range  # SP ranks of the new tokens
    plan: str | None  # None: chosen when the whole step is known
    samples: bool  # whether a token is drawn after it
    stay: int  # Sequence.num_stays when it was planned

    @classmethod
    def of(cls, sequence: Sequence, num_new: int, home: range, plan: str | None) -> Chunk:
        """The next `num_new` tokens."""
        start = sequence.num_computed
        samples = start + num_new == len(sequence.tokens)
        return cls(sequence, start, num_new, home, plan, samples, sequence.num_stays)

    @property
    def end(self) -> int:
        return self.start + self.num_new

    @property
    def is_current(self) -> bool:
        """Whether the sequence has not ended or been retracted since."""
        return self.stay == self.sequence.num_stays
