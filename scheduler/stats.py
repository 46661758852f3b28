"""What the controller tells about itself: one snapshot, and the log lines of its steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

from scheduler.batching import Batcher, PlannedStep
from scheduler.page_pool import PagePool
from scheduler.plans import PlanChoice
from sp_backend.commands import StepResult
from sp_backend.config import BackendConfig

logger = logging.getLogger("scheduler")


@dataclass(frozen=True, slots=True)
class RankStats:
    """Counters are totals since the worker started."""

    rank: int
    sp_rank: int
    tp_rank: int
    num_pages: int
    pages_used: int  # held by requests
    pages_cached: int = 0  # kept for the prefix cache alone
    num_steps: int = 0  # that it took part in
    query_key_pairs: int = 0
    bytes_sent: int = 0
    wait_seconds: float = 0.0
    busy_seconds: float = 0.0
    idle_seconds: float = 0.0  # between two steps in a row that it took part in


@dataclass(slots=True)
class PlanStats:
    """Steps that ran one plan, or one set of plans side by side. Totals."""

    num_steps: int = 0
    num_tokens: int = 0  # new ones
    seconds: float = 0.0
    predicted_seconds: float = 0.0  # of the steps that were predicted ...
    measured_seconds: float = 0.0  # ... and what those took


@dataclass(frozen=True, slots=True)
class LastChoice:
    """The plan of the newest step that was chosen by prediction."""

    plan: str
    reason: str
    predicted_seconds: float
    measured_seconds: float


@dataclass(frozen=True, slots=True)
class Stats:
    num_running: int  # prefilling and decoding
    num_waiting: int
    page_size: int  # tokens
    num_pages: int  # of all SP ranks
    pages_used: int  # held by requests
    pages_cached: int  # kept for the prefix cache alone; given up when a request needs room
    per_rank: list[RankStats]
    prompt_tokens: int
    cached_tokens: int  # of them, from the prefix cache
    generated_tokens: int
    num_finished: dict[str, int]  # by FinishReason.value; a stop string, which the server finds, is an abort here
    num_retractions: int
    num_steps: dict[str, int]  # by kind: prefill, decode
    capacity_tokens: int  # the longest prompt and output that fit
    plans: dict[str, PlanStats] = field(default_factory=dict)
    last_choice: LastChoice | None = None


class Totals:
    """What the workers have told of their steps so far."""

    def __init__(self, backend: BackendConfig) -> None:
        self._backend = backend
        self._results: dict[int, StepResult] = {}  # the last of each rank
        self._num_steps = [0] * backend.world_size
        self._busy_seconds = [0.0] * backend.world_size
        self._idle_seconds = [0.0] * backend.world_size
        self._plans: dict[str, PlanStats] = {}
        self._last_chosen: tuple[PlanChoice, float] | None = None  # and what its step took

    def add(self, planned: PlannedStep, results: Sequence[StepResult], follows: frozenset[int]) -> None:
        """follows: SP ranks that had the step before, or had requests and waited for this one."""
        for result in results:
            self._results[result.rank] = result
            self._num_steps[result.rank] += 1
            self._busy_seconds[result.rank] += result.seconds
            if result.rank % self._backend.sp_size in follows:
                self._idle_seconds[result.rank] += result.idle_seconds
        seconds = max(result.seconds for result in results)
        plan = self._plans.setdefault(planned.plan, PlanStats())
        plan.num_steps += 1
        plan.num_tokens += planned.num_new
        plan.seconds += seconds
        predicted = planned.predicted_seconds
        if predicted is not None:
            plan.predicted_seconds += predicted
            plan.measured_seconds += seconds
            self._last_chosen = planned.choices[0], seconds

    def stats(self, batcher: Batcher, num_submitted: int) -> Stats:
        """num_submitted: requests that the batcher has not got yet."""
        pool, lanes, counters = batcher.placement.pool, batcher.lanes, batcher.counters
        return Stats(
            num_running=len(batcher.running) + len(lanes.prefilling),
            num_waiting=lanes.num_waiting + num_submitted,
            page_size=self._backend.page_size,
            num_pages=pool.num_pages,
            pages_used=sum(map(pool.num_used, range(pool.num_ranks))),
            pages_cached=sum(map(pool.num_idle, range(pool.num_ranks))),
            per_rank=[self._rank_stats(rank, pool) for rank in range(self._backend.world_size)],
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generated_tokens=counters.generated_tokens,
            num_finished=dict(counters.num_finished),
            num_retractions=counters.num_retractions,
            num_steps=dict(counters.num_steps),
            capacity_tokens=batcher.max_length,
            plans={plan: copy(stats) for plan, stats in self._plans.copy().items()},
            last_choice=self._last_choice(),
        )

    def _last_choice(self) -> LastChoice | None:
        """Its reason is written here, not while somebody waits for the step's tokens."""
        if self._last_chosen is None:
            return None
        choice, measured = self._last_chosen
        assert choice.seconds is not None, "predicted"
        return LastChoice(choice.plan, choice.reason, choice.seconds, measured)

    def _rank_stats(self, rank: int, pool: PagePool) -> RankStats:
        sp_rank = rank % self._backend.sp_size
        result = self._results.get(rank)
        return RankStats(
            rank=rank,
            sp_rank=sp_rank,
            tp_rank=rank // self._backend.sp_size,
            num_pages=pool.pages_per_rank,
            pages_used=pool.num_used(sp_rank),
            pages_cached=pool.num_idle(sp_rank),
            num_steps=self._num_steps[rank],
            query_key_pairs=result.query_key_pairs if result else 0,
            bytes_sent=result.bytes_sent if result else 0,
            wait_seconds=result.wait_seconds if result else 0.0,
            busy_seconds=self._busy_seconds[rank],
            idle_seconds=self._idle_seconds[rank],
        )


class StepLog:
    """Log lines in the words that operators of SGLang know."""

    def __init__(self, decode_interval: int, now: float) -> None:
        self._decode_interval = decode_interval
        self._prefilled_at = now
        self._num_prefilled = 0
        self._decoded_at = now
        self._num_decode_steps = 0
        self._num_decoded = 0

    def prefill(self, stats: Stats, now: float, num_new: int, num_sequences: int, num_cached: int) -> None:
        """A step that begins. As in SGLang, the throughput is that since the one before."""
        logger.info(
            "Prefill batch, #new-seq: %d, #new-token: %d, #cached-token: %d, token usage: %.2f, "
            "#running-req: %d, #queue-req: %d, input throughput (token/s): %.2f",
            num_sequences,
            num_new,
            num_cached,
            stats.pages_used / stats.num_pages,
            stats.num_running,
            stats.num_waiting,
            self._num_prefilled / max(now - self._prefilled_at, 1e-9),
        )
        self._num_prefilled, self._prefilled_at = num_new, now

    def plan(self, kind: str, num_tokens: int, choices: Sequence[PlanChoice], seconds: float) -> None:
        for choice in choices if logger.isEnabledFor(logging.DEBUG) else ():
            predicted = "not" if choice.seconds is None else f"{1000 * choice.seconds:.2f} ms"
            logger.debug(
                "%s step of %d tokens: %s (%s); predicted %s, measured %.2f ms",
                kind,
                num_tokens,
                choice.plan,
                choice.reason,
                predicted,
                1000 * seconds,
            )

    def decode_is_due(self, num_tokens: int) -> bool:
        """Counts a decode step; True every `decode_interval` of them."""
        self._num_decoded += num_tokens
        self._num_decode_steps += 1
        return self._num_decode_steps % self._decode_interval == 0

    def decode(self, stats: Stats, now: float) -> None:
        logger.info(
            "Decode batch, #running-req: %d, #token: %d, token usage: %.2f, gen throughput (token/s): %.2f, "
            "#queue-req: %d",
            stats.num_running,
            stats.pages_used * stats.page_size,
            stats.pages_used / stats.num_pages,
            self._num_decoded / max(now - self._decoded_at, 1e-9),
            stats.num_waiting,
        )
        self._num_decoded, self._decoded_at = 0, now
