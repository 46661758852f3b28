"""What the controller tells about itself: one snapshot, and the log lines of its steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.plans import PlanChoice

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
    num_finished: dict[str, int]  # by FinishReason.value
    num_retractions: int
    num_steps: dict[str, int]  # by kind: prefill, decode
    capacity_tokens: int  # the longest prompt and output that fit
    plans: dict[str, PlanStats] = field(default_factory=dict)
    last_choice: LastChoice | None = None


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
        for choice in choices:
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
