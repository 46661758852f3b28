"""Which prompts are spread over how many ranks, and which plan the spread ones of a step run.

With a planner both are predictions for the links and kernels at hand; without one (one rank, tests) the strategy is
fixed and a prompt is spread from a number of new tokens on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import msgspec

from scheduler.sequence import Chunk
from sp_backend.commands import DECODE, LOCAL
from sp_backend.config import BackendConfig

SHORT = 384  # new tokens below which a prompt need not queue behind long ones; where spreading begins to pay on 2 cores
LONG = 8192  # new tokens from which a prompt is long, however high the threshold
REASONS = {
    LOCAL: "all tokens on one rank: nothing to exchange",
    DECODE: "few new tokens: queries go to the cached keys, which are on several ranks",
}


class Prediction(Protocol):
    @property
    def variant(self) -> Any: ...  # its str() is the plan's name
    @property
    def reason(self) -> str: ...
    @property
    def seconds(self) -> float: ...


@dataclass(frozen=True)
class PlanChoice:
    """A plan for some chunks of a step. What it is predicted to take is found when somebody asks: where nothing is to
    be chosen, that can wait until workers have the step.
    """

    plan: str
    told: str = ""  # the reason, if nothing is predicted
    predict: Callable[[], Prediction] | None = None

    @cached_property
    def prediction(self) -> Prediction | None:
        return None if self.predict is None else self.predict()

    @property
    def reason(self) -> str:
        return self.told if self.prediction is None else self.prediction.reason

    @property
    def seconds(self) -> float | None:
        """Of the whole step; None: not predicted."""
        return None if self.prediction is None else self.prediction.seconds


class StepPlanner(Protocol):
    """What the scheduler needs of sp_backend.planner.Planner."""

    def degree_for(self, num_new: int, num_cached: int) -> int: ...
    def choose(self, batch: Sequence[tuple[int, int]], degree: int) -> Prediction: ...


class PlanChooser:
    def __init__(self, backend: BackendConfig, threshold: int | None, planner: StepPlanner | None) -> None:
        """threshold: new tokens from which on a prompt is spread; None: where that is predicted to pay."""
        self._num_ranks = backend.sp_size
        self._always_spread = backend.layout == "heads"
        self._plan = str(backend.variant)
        self._short = SHORT if threshold is None else threshold
        self._threshold = self._short if planner is None else threshold
        self._planner = planner

    def is_short(self, num_new: int) -> bool:
        return num_new < min(self._short, LONG)

    def degree(self, num_new: int, num_cached: int) -> int:
        """How many ranks should share a prompt's new tokens; 1: it stays on one."""
        if self._threshold is None and not self._always_spread:
            assert self._planner is not None
            return self._planner.degree_for(num_new, num_cached)
        return self._num_ranks if self._always_spread or num_new >= self._short else 1

    def assign(self, chunks: Sequence[Chunk]) -> tuple[list[Chunk], tuple[PlanChoice, ...]]:
        """The chunks of a step with a plan each, and why; those that have one, because of where they lie, keep it."""
        batches: dict[str | int, list[tuple[int, int]]] = defaultdict(list)  # by plan, or degree: new and cached tokens
        for chunk in chunks:
            batches[chunk.plan or len(chunk.home)].append((chunk.num_new, chunk.start))
        choices = {key: self._choose(key, batch) for key, batch in batches.items()}
        planned = [c if c.plan else msgspec.structs.replace(c, plan=choices[len(c.home)].plan) for c in chunks]
        return planned, tuple(choices.values())

    def _choose(self, key: str | int, batch: Sequence[tuple[int, int]]) -> PlanChoice:
        if self._planner is not None and (isinstance(key, int) or (key == LOCAL and max(batch)[0] > 1)):
            if not isinstance(key, int):
                return PlanChoice(key, predict=partial(self._planner.choose, batch, 1))
            choice = self._planner.choose(batch, key)
            return PlanChoice(str(choice.variant), predict=lambda: choice)
        if isinstance(key, int):
            return PlanChoice(self._plan, "the only plan for spread prompts here")
        return PlanChoice(key, REASONS[key])
