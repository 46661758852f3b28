"""The one place that owns requests: takes them in, runs step after step on the workers, hands their tokens out.

Every request that submit() takes ends in exactly one Output with a finish_reason. `step` is synchronous and does all
the work; a thread calls it as long as there is some. While a step runs, the next one is planned and sent, so that the
workers never wait for this thread. Aborts and new requests take effect with the next step that is planned.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

from scheduler.batching import Batcher, PlannedStep, failed
from scheduler.config import SchedulerConfig
from scheduler.plans import StepPlanner
from scheduler.request import Draining, GenerateRequest, Output, QueueFull, RequestTooLong, Unavailable
from scheduler.stats import LastChoice, PlanStats, RankStats, Stats, StepLog
from scheduler.steps import StepWriter
from scheduler.worker_pool import WorkerFailed, Workers
from sp_backend.commands import StepResult
from sp_backend.config import BackendConfig

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # how soon a closing controller stops waiting for a step
IDLE_SECONDS = 0.5  # how often idle workers are looked at
PLANNED_AT = 0.5  # of a prefill step's expected time, the next one is planned: later arrivals miss it
SHUT_DOWN = "the server is shutting down"


@dataclass(slots=True)
class InFlight:
    """A step that the workers have, or will take next."""

    planned: PlannedStep
    began: float  # when it was sent, or the one before it was done
    follows: frozenset[int]  # SP ranks that took part in the step before, if there was no pause


class Controller:
    def __init__(
        self,
        config: SchedulerConfig,
        backend: BackendConfig,
        workers: Workers,
        pages_per_rank: int,
        on_outputs: Callable[[list[Output]], None],
        clock: Callable[[], float] = time.monotonic,
        planner: StepPlanner | None = None,
    ) -> None:
        self.batcher = Batcher(config, backend, pages_per_rank, planner)
        self._writer = StepWriter(self.batcher.placement)
        self._config = config
        self._backend = backend
        self._workers = workers
        self._on_outputs = on_outputs
        self._clock = clock
        self._lock = threading.Lock()  # guards what other threads change: the next four
        self._submitted: deque[GenerateRequest] = deque()
        self._aborted: deque[str] = deque()
        self._draining = False
        self._failure: str | None = None
        self._flush = False
        self._closing = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._step_id = 0
        self._results: dict[int, StepResult] = {}  # the last of each rank
        self._busy_seconds = [0.0] * backend.world_size
        self._idle_seconds = [0.0] * backend.world_size
        self._in_flight: deque[InFlight] = deque()  # at most two: one runs, one is next
        self._last_ranks = frozenset[int]()  # SP ranks of the newest step; none after a pause
        self._plans: dict[str, PlanStats] = {}
        self._last_choice: LastChoice | None = None
        self._due: list[Output] = []  # not handed out yet
        self._log = StepLog(config.decode_log_interval, clock())

    # Any thread

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: GenerateRequest) -> None:
        """Takes a request in. Raises Refused with the reason, or ValueError for a malformed one.

        Its id must differ from those of all requests that have not ended.
        """
        self._validate(request)
        with self._lock:
            if self._failure:
                raise Unavailable(self._failure)
            if self._draining:
                raise Draining(SHUT_DOWN)
            if self._queue_is_full():
                raise QueueFull(f"the queue of {self._config.max_queued_requests} waiting requests is full")
            self._submitted.append(request)
        self._wake.set()

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step, whatever it is doing; one that has ended is left alone."""
        with self._lock:
            self._aborted.append(request_id)
        self._wake.set()

    def flush_cache(self) -> None:
        """Forgets every cached prefix that no request is using."""
        self._flush = True
        self._wake.set()

    def drain(self) -> None:
        """Takes no more requests; those that it has go on."""
        with self._lock:
            self._draining = True

    def close(self, timeout: float = 5.0) -> None:
        """Ends the thread, and every request with an error."""
        self.drain()
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._fail(SHUT_DOWN)

    def healthy(self) -> str | None:
        """None, or why no request can be served any more."""
        return self._failure

    def stats(self) -> Stats:
        """A snapshot. Taken while a step is planned, its numbers may be one step apart."""
        pool, lanes, counters = self.batcher.placement.pool, self.batcher.lanes, self.batcher.counters
        return Stats(
            num_running=len(self.batcher.running) + len(lanes.prefilling),
            num_waiting=lanes.num_waiting + len(self._submitted),
            page_size=self._backend.page_size,
            num_pages=pool.num_pages,
            pages_used=sum(map(pool.num_used, range(pool.num_ranks))),
            pages_cached=sum(map(pool.num_idle, range(pool.num_ranks))),
            per_rank=[self._rank_stats(rank) for rank in range(self._backend.world_size)],
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generated_tokens=counters.generated_tokens,
            num_finished=dict(counters.num_finished),
            num_retractions=counters.num_retractions,
            num_steps=dict(counters.num_steps),
            capacity_tokens=self.batcher.max_length,
            plans={plan: copy(stats) for plan, stats in self._plans.copy().items()},
            last_choice=self._last_choice,
        )

    # The controller's thread

    def step(self) -> bool:
        """Completes one step, with the next one sent before; False if there was nothing to do.

        Its outputs may be handed out in the next call, after one more step is sent. A failure ends every request.
        """
        with self._failures():
            if not self._in_flight:
                self._send_next()
            if not self._in_flight:
                self.hand_out()
                self._last_ranks = frozenset()
                return False
            results = self._results_before_next_is_planned()
            if results is None and not self._closing:
                self._send_next()
                self.hand_out()
                results = self._await_results()
            if results is not None:
                self._complete(self._in_flight.popleft(), results)
            if not (self._in_flight and self._in_flight[0].planned.kind == "decode"):
                self.hand_out()  # else the next step is planned at once, and goes first: workers may be waiting for it
            return True
        return False

    def hand_out(self) -> None:
        """Tell requests what has come of them. After it the listener needs the interpreter: planning goes first."""
        due, self._due = self._due, []
        if due:
            self._on_outputs(due)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Whatever goes wrong is told to every request; the thread must not die in silence."""
        try:
            yield
        except WorkerFailed as error:
            self._fail(str(error))
        except Exception as error:
            logger.exception("the controller failed")
            self._fail(f"the controller failed: {error!r}")

    def _run(self) -> None:
        while True:
            self._wake.clear()  # before anything it announces is read, so that nothing is missed
            if self._closing or self._failure:
                return
            if not self.step() and not self._wake.wait(IDLE_SECONDS):
                self._look_after_workers()

    def _look_after_workers(self) -> None:
        with self._failures():
            self._workers.poll(0.0)

    def _take_in(self) -> None:
        with self._lock:
            num_submitted = len(self._submitted)
            aborted, self._aborted = self._aborted, deque()
        for _ in range(num_submitted):  # one by one: should one raise, the others are still there to be told
            self.batcher.add(self._submitted.popleft())
        self._due += [output for output in map(self.batcher.abort, aborted) if output]
        if self._flush:
            self._flush = False
            self.batcher.placement.cache.flush()

    def _send_next(self) -> None:
        self._take_in()
        planned = self.batcher.next_step()
        if planned is None:
            return
        self._step_id += 1
        steps = self._writer.write(self._step_id, planned.chunks, self.batcher.take_ended())
        self._workers.submit(steps)
        self.batcher.sent(planned)
        self._in_flight.append(InFlight(planned, self._clock(), self._last_ranks))
        self._last_ranks = frozenset(rank for rank, step in enumerate(steps) if step is not None)
        if planned.kind == "prefill":
            self._log.prefill(self.stats(), self._clock(), planned.num_new, len(planned.chunks), planned.num_cached)

    def _results_before_next_is_planned(self) -> list[StepResult] | None:
        """A long step's successor is planned late, with who has arrived meanwhile; None: the time has come."""
        step = self._in_flight[0]
        if step.planned.kind == "decode":
            return None
        expected = self.batcher.prefill_time.expected(step.planned.tokens, step.planned.pairs)
        return self._poll_until(step.began + PLANNED_AT * expected)

    def _await_results(self) -> list[StepResult] | None:
        """None if the controller is being closed."""
        step = self._in_flight[0]
        patience = self._patience(step.planned)
        results = self._poll_until(step.began + patience)
        if results is None and not self._closing:
            raise WorkerFailed(
                f"a {step.planned.kind} step of {step.planned.num_new} tokens took longer than the watchdog's "
                f"{patience:g} s"
            )
        return results

    def _patience(self, planned: PlannedStep) -> float:
        """Seconds that a step may take: a prompt that may not be cut gets those of the chunks it would be cut into."""
        most = self._config.chunked_prefill_size
        num_chunks = planned.num_new / most if planned.kind == "prefill" and most > 0 else 1.0
        return self._config.watchdog_timeout * max(1.0, num_chunks)

    def _poll_until(self, deadline: float) -> list[StepResult] | None:
        """The oldest step's results; None if they are not there by then, or the controller is being closed."""
        while not self._closing and (left := deadline - self._clock()) > 0:
            results = self._workers.poll(min(left, POLL_SECONDS))
            if results is not None:
                return results
        return None

    def _complete(self, step: InFlight, results: list[StepResult]) -> None:
        for result in results:
            self._results[result.rank] = result
            self._busy_seconds[result.rank] += result.seconds
            if result.rank % self._backend.sp_size in step.follows:
                self._idle_seconds[result.rank] += result.idle_seconds
        if self._in_flight:
            self._in_flight[0].began = self._clock()
        seconds, planned = max(result.seconds for result in results), step.planned
        if planned.kind == "prefill":
            self.batcher.prefill_time.observe(planned.tokens, planned.pairs, seconds)
        self._count(planned, seconds)
        sampled = {token.request_id: token for result in results for token in result.tokens}
        self.batcher.pool(planned, results)
        outputs = self.batcher.complete(planned, sampled, seconds)
        self._due += outputs
        if planned.kind == "decode" and self._log.decode_is_due(len(outputs)):
            self._log.decode(self.stats(), self._clock())

    def _count(self, planned: PlannedStep, seconds: float) -> None:
        stats = self._plans.setdefault(planned.plan, PlanStats())
        stats.num_steps += 1
        stats.num_tokens += planned.num_new
        stats.seconds += seconds
        predicted = planned.predicted_seconds
        if predicted is not None:
            stats.predicted_seconds += predicted
            stats.measured_seconds += seconds
            self._last_choice = LastChoice(planned.plan, planned.choices[0].reason, predicted, seconds)
        self._log.plan(planned.kind, planned.num_new, planned.choices, seconds)

    def _fail(self, why: str) -> None:
        with self._lock:
            if self._failure:
                return
            self._failure = why
            submitted, self._submitted = self._submitted, deque()
        self._in_flight.clear()
        self._due += self.batcher.fail_all(why) + [failed(request.request_id, why) for request in submitted]
        self.hand_out()
        if why != SHUT_DOWN:
            logger.error("cannot go on: %s", why)

    def _validate(self, request: GenerateRequest) -> None:
        if not request.prompt:
            raise ValueError("the prompt is empty")
        if request.pooling is not None and request.max_tokens != 0:
            raise ValueError(f"max_tokens must be 0 for an embedding, not {request.max_tokens}")
        if request.pooling is None and request.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {request.max_tokens}")
        if request.pooling is None and not self._backend.causal:
            raise ValueError("under a full mask there is no next token: only embeddings can be made")
        num_prompt, context = len(request.prompt), self._backend.context_length
        if num_prompt + request.max_tokens > context:
            raise RequestTooLong(
                num_prompt + request.max_tokens,
                context,
                f"{num_prompt} prompt tokens and {request.max_tokens} tokens to generate exceed the context "
                f"length of {context} tokens",
            )
        fits = self.batcher.max_length - (request.pooling is None)  # room for a token to be generated
        if num_prompt > fits:
            message = f"the prompt has {num_prompt} tokens; at most {fits} fit in the KV cache"
            raise RequestTooLong(num_prompt, fits, message)

    def _queue_is_full(self) -> bool:
        if self._config.max_queued_requests is None:
            return False
        lanes = self.batcher.lanes
        num_free = self._config.max_running_requests - len(self.batcher.running) - len(lanes.prefilling)
        return lanes.num_waiting + len(self._submitted) >= self._config.max_queued_requests + max(num_free, 0)

    def _rank_stats(self, rank: int) -> RankStats:
        pool, sp_rank = self.batcher.placement.pool, rank % self._backend.sp_size
        result = self._results.get(rank)
        return RankStats(
            rank=rank,
            sp_rank=sp_rank,
            tp_rank=rank // self._backend.sp_size,
            num_pages=pool.pages_per_rank,
            pages_used=pool.num_used(sp_rank),
            pages_cached=pool.num_idle(sp_rank),
            query_key_pairs=result.query_key_pairs if result else 0,
            bytes_sent=result.bytes_sent if result else 0,
            wait_seconds=result.wait_seconds if result else 0.0,
            busy_seconds=self._busy_seconds[rank],
            idle_seconds=self._idle_seconds[rank],
        )
