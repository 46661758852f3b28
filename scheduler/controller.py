"""The one place that owns requests: takes them in, runs step after step on the workers, hands their tokens out.

Every request that submit() takes ends in exactly one Output with a finish_reason. `step` is synchronous and does all
the work; a thread calls it as long as there is some. A rank has at most two steps: while it runs one, its next is
planned and sent, so that it never waits for this thread. Aborts and new requests take effect with the next step that is
planned.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from scheduler.batching import Batcher, PlannedStep, failed
from scheduler.config import CHUNK, SchedulerConfig
from scheduler.inbox import SHUT_DOWN, Inbox
from scheduler.plans import StepPlanner
from scheduler.request import GenerateRequest, Output
from scheduler.stats import Stats, StepLog, Totals
from scheduler.steps import StepWriter
from scheduler.turns import Ranks
from scheduler.worker_pool import WorkerFailed, Workers
from sp_backend.commands import StepResult
from sp_backend.config import BackendConfig

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # how soon a closing controller stops waiting for a step
IDLE_SECONDS = 0.5  # how often idle workers are looked at
PLANNED_AT = 0.5  # of a prefill step's expected time, the next one is planned: later arrivals miss it


@dataclass(slots=True, eq=False)
class InFlight:
    """A step that the workers have, or will take next."""

    planned: PlannedStep
    ranks: Ranks  # that take part
    follows: Ranks  # of them, those that had the step before, or had requests and waited for this one
    began: float  # when it was sent, or the one before it was done
    is_followed: bool = False  # its successors are planned, or there were none when they could have been


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
        self._workers = workers
        self._on_outputs = on_outputs
        self._clock = clock
        self._inbox = Inbox(config, backend, self.batcher)
        self._totals = Totals(backend)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._step_id = 0
        self._in_flight: dict[int, InFlight] = {}  # by step id, oldest first
        self._queues: list[deque[InFlight]] = [deque() for _ in range(backend.sp_size)]  # of each SP rank
        self._waiting: set[int] = set()  # SP ranks that were done with a step and have requests, but no step since
        self._due: list[Output] = []  # not handed out yet
        self._log = StepLog(config.decode_log_interval, clock())

    # Any thread

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: GenerateRequest) -> None:
        """Takes a request in. Raises Refused with the reason, or ValueError for a malformed one.

        Its id must differ from those of all requests that have not ended.
        """
        self._inbox.submit(request)

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step, whatever it is doing; one that has ended is left alone."""
        self._inbox.abort(request_id)

    def flush_cache(self) -> None:
        """Forgets every cached prefix that no request is using."""
        self._inbox.flush()

    def drain(self) -> None:
        """Takes no more requests; those that it has go on."""
        self._inbox.drain()

    def close(self, timeout: float = 5.0) -> None:
        """Ends the thread, and every request with an error."""
        self.drain()
        self._closing = True
        self._inbox.wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._fail(SHUT_DOWN)

    def healthy(self) -> str | None:
        """None, or why no request can be served any more."""
        return self._inbox.failure

    def stats(self) -> Stats:
        """A snapshot. Taken while a step is planned, its numbers may be one step apart."""
        return self._totals.stats(self.batcher, self._inbox.num_submitted)

    # The controller's thread

    def step(self) -> bool:
        """Completes one step, with those after it sent before; False if there was nothing to do.

        While requests are left, its outputs are handed out in the next call, after more steps are sent. A failure ends
        every request.
        """
        with self._failures():
            results = None
            while results is None and not self._closing:
                self._send_next()
                self.hand_out()
                if not self._in_flight:
                    self._waiting.clear()
                    return False
                results = self._await_results()
            if results is not None:
                self._complete(results)
            if not self.batcher.has_requests:
                self.hand_out()
            return True
        return False

    def hand_out(self) -> None:
        """Tell requests what has come of them. The listener then needs the interpreter, so planning goes first."""
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
            self._inbox.wake.clear()  # before anything it announces is read, so that nothing is missed
            if self._closing or self._inbox.failure:
                return
            if not self.step() and not self._inbox.wake.wait(IDLE_SECONDS):
                self._look_after_workers()

    def _look_after_workers(self) -> None:
        with self._failures():
            self._workers.poll(0.0)

    def _take_in(self) -> None:
        aborted = self._inbox.take_aborted()  # first: whatever it ends is then among the requests
        while (request := self._inbox.next_request()) is not None:
            self.batcher.add(request)
        self._due += [output for output in map(self.batcher.abort, aborted) if output]
        if self._inbox.take_flush():
            self.batcher.placement.cache.flush()

    def _send_next(self) -> None:
        """All steps that can be planned now. That of a rank which runs a prefill step is planned late, with who has
        arrived meanwhile; of others at once.
        """
        self._take_in()
        now = self._clock()
        free = {rank for rank, queue in enumerate(self._queues) if self._plan_at(queue) <= now}
        while free:
            idle = frozenset(rank for rank in free if not self._queues[rank])
            if (planned := self.batcher.next_step(frozenset(free), idle)) is None:
                break
            free -= {rank for rank in self._send(planned) if self._plan_at(self._queues[rank]) > now}
        for queue in self._queues:
            if queue and not queue[0].is_followed and (len(queue) > 1 or self._plan_at(queue) <= now):
                queue[0].is_followed = True
                queue[0].planned.predict()  # not before: workers that are being woken need this thread's core

    def _plan_at(self, queue: deque[InFlight]) -> float:
        """When the next step of a rank with these may be planned."""
        if not queue:
            return -math.inf
        planned = queue[0].planned
        if len(queue) > 1:
            return math.inf
        if planned.kind == "decode":
            return -math.inf
        return queue[0].began + PLANNED_AT * self.batcher.prefill_time.expected(planned.tokens, planned.pairs)

    def _send(self, planned: PlannedStep) -> Ranks:
        """On which ranks it runs."""
        self._step_id += 1
        steps = self._writer.write(self._step_id, planned.chunks, self.batcher.take_ended())
        ranks = frozenset(rank for rank, step in enumerate(steps) if step is not None)
        self._workers.submit(steps)
        self.batcher.sent(planned)
        follows = frozenset(rank for rank in ranks if self._queues[rank] or rank in self._waiting)
        sent = self._in_flight[self._step_id] = InFlight(planned, ranks, follows, self._clock())
        for rank in ranks:
            self._queues[rank].append(sent)
        self._waiting -= ranks
        if planned.kind == "prefill":
            self._log.prefill(self.stats(), self._clock(), planned.num_new, len(planned.chunks), planned.num_cached)
        return ranks

    def _await_results(self) -> list[StepResult] | None:
        """Of a step that is done; None if more can be planned before one is, or the controller is being closed."""
        oldest = next(iter(self._in_flight.values()))
        patience = self._patience(oldest.planned)
        late = oldest.began + patience
        plan_at = [self._plan_at(queue) for queue in self._queues if queue and not queue[0].is_followed]
        results = self._poll_until(min([late, *plan_at]))
        if results is None and not self._closing and self._clock() >= late:
            raise WorkerFailed(
                f"a {oldest.planned.kind} step of {oldest.planned.num_new} tokens took longer than the watchdog's "
                f"{patience:g} s"
            )
        return results

    def _patience(self, planned: PlannedStep) -> float:
        """Seconds that a step may take: a prompt that is not cut gets those of the chunks it would be cut into."""
        chunk = self._config.chunked_prefill_size if self._config.chunked_prefill_size > 0 else CHUNK
        num_chunks = planned.num_new / chunk if planned.kind == "prefill" else 1.0
        return self._config.watchdog_timeout * max(1.0, num_chunks)

    def _poll_until(self, deadline: float) -> list[StepResult] | None:
        """A step's results; None if they are not there by then, or the controller is being closed."""
        while not self._closing and (left := deadline - self._clock()) > 0:
            results = self._workers.poll(min(left, POLL_SECONDS))
            if results is not None:
                return results
        return None

    def _complete(self, results: list[StepResult]) -> None:
        step = self._in_flight.pop(results[0].step_id)
        for queue in (self._queues[rank] for rank in step.ranks):
            assert queue.popleft() is step, "ranks take steps in order"
            if queue:
                queue[0].began = self._clock()
        planned, seconds = step.planned, max(result.seconds for result in results)
        self._totals.add(planned, results, step.follows)
        if planned.kind == "prefill":
            self.batcher.prefill_time.observe(planned.tokens, planned.pairs, seconds)
        self._log.plan(planned.kind, planned.num_new, planned.choices, seconds)
        sampled = {token.request_id: token for result in results for token in result.tokens}
        self.batcher.pool(planned, results)
        outputs = self.batcher.complete(planned, sampled, seconds)
        self._due += outputs
        self._waiting.update(r for r in step.ranks if not self._queues[r] and self.batcher.has_requests_on(r))
        if planned.kind == "decode" and self._log.decode_is_due(len(outputs)):
            self._log.decode(self.stats(), self._clock())

    def _fail(self, why: str) -> None:
        submitted = self._inbox.fail(why)
        if submitted is None:
            return
        self._in_flight.clear()
        self._queues = [deque() for _ in self._queues]
        self._due += self.batcher.fail_all(why) + [failed(request.request_id, why) for request in submitted]
        self.hand_out()
        if why != SHUT_DOWN:
            logger.error("cannot go on: %s", why)
