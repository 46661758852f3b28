"""The worker processes: starts them, talks to them over ZMQ, notices their death, leaves nothing behind.

Every worker runs in a session of its own, so that Ctrl-C in a terminal reaches the server alone, which then stops
them in order. Commands go out from one ROUTER socket; a worker's DEALER has its rank as identity.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import zmq

from scheduler.worker_process import WorkerProcess, wait_all
from sp_backend.commands import (
    Failure,
    Loading,
    Ready,
    Report,
    Shutdown,
    Step,
    StepResult,
    WorkerStart,
    decode_report,
    encode,
)
from sp_backend.config import BackendConfig

CHECK_SECONDS = 0.2  # how often processes are looked at while their answers are awaited
WORKER_COMMAND = (sys.executable, "-m", "sp_backend.worker")
LONGEST_SOCKET_PATH = 100  # the kernel allows 107 bytes


class WorkerFailed(Exception):
    """A worker died, reported that it cannot go on, or did not answer."""


class Workers(Protocol):
    """What the controller needs of its workers."""

    def submit(self, steps: list[Step | None]) -> None:
        """Starts a step, or queues it behind what its ranks have; steps[r] goes to SP rank r, on every TP rank.

        None: the rank has no part in it. At least one has.
        """

    def poll(self, timeout: float) -> list[StepResult] | None:
        """Of a step that is done, the results of all who took part, by rank; each rank's in the order of its steps.
        None if there is none after `timeout` seconds.

        Raises WorkerFailed as soon as a worker cannot answer any more, also between steps.
        """


class WorkerPool:
    def __init__(self, config: BackendConfig, command: tuple[str, ...] = WORKER_COMMAND) -> None:
        self.ready: list[Ready] = []  # by rank, after start()
        self._config = config
        self._command = command
        self._processes: list[WorkerProcess] = []
        self._results: dict[int, dict[int, StepResult | None]] = {}  # of steps in flight, oldest first: by rank
        self._checked_at = 0.0
        self._directory: Path | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None

    @property
    def num_pages(self) -> int:
        """KV pages of each SP rank."""
        return min(ready.num_pages for ready in self.ready)

    def start(self, timeout: float = 1800.0, progress: Callable[[int, int], None] | None = None) -> None:
        """Returns when every worker is ready. progress: called with the tensors that rank 0 has
        loaded, and has to load.

        Raises WorkerFailed, with nothing left running, if one fails or is not ready in time. The calling thread must
        outlive the workers: they ask the kernel to end them with it.
        """
        atexit.register(self.stop)
        try:
            self._spawn()
            self._await_ready(time.monotonic() + timeout, progress or (lambda num_loaded, num_tensors: None))
            self._compare()
        except BaseException:
            self.stop(grace=0.0)
            raise

    def submit(self, steps: list[Step | None]) -> None:
        assert self._socket is not None and len(steps) == self._config.sp_size
        taking_part = {sp_rank: step for sp_rank, step in enumerate(steps) if step is not None}
        messages = {sp_rank: encode(step) for sp_rank, step in taking_part.items()}
        ranks = [rank for rank in range(self._config.world_size) if rank % self._config.sp_size in messages]
        self._results[next(iter(taking_part.values())).step_id] = dict.fromkeys(ranks)
        for rank in ranks:
            self._send(rank, messages[rank % self._config.sp_size])

    def poll(self, timeout: float) -> list[StepResult] | None:
        deadline = time.monotonic() + timeout
        while (results := self._done()) is None:
            if (report := self._receive(deadline)) is not None:
                assert isinstance(report, StepResult), f"unexpected {report}"
                assert report.rank in self._results.get(report.step_id, ()), f"unexpected {report}"
                self._results[report.step_id][report.rank] = report
            if time.monotonic() >= deadline:
                return self._done()
        return results

    def stop(self, grace: float = 5.0) -> None:
        """Ends all workers: asked, then told, then killed. Returns within `grace` and about 3 seconds."""
        atexit.unregister(self.stop)
        if self._socket is not None and grace > 0:
            for process in self._processes:
                with suppress(zmq.ZMQError):  # it never connected, or has gone
                    self._socket.send_multipart([_identity(process.rank), encode(Shutdown())])
        wait_all(self._processes, grace)
        for number, patience in ((signal.SIGTERM, 2.0 if grace > 0 else 0.5), (signal.SIGKILL, 1.0)):
            for process in self._processes:
                process.kill(number)
            wait_all(self._processes, patience)
        for process in self._processes:
            process.close()
        self._processes = []
        if self._context is not None and self._socket is not None:
            self._socket.close(linger=0)
            self._context.term()
            self._context = self._socket = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _spawn(self) -> None:
        self._directory = _private_directory()
        address = f"ipc://{self._directory}/controller"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(address)
        for rank in range(self._config.world_size):
            start = WorkerStart(self._config, rank, address, str(self._directory / "rendezvous"), os.getpid())
            self._processes.append(WorkerProcess(rank, self._command, encode(start), self._config))

    def _await_ready(self, deadline: float, progress: Callable[[int, int], None]) -> None:
        ready: dict[int, Ready] = {}
        while len(ready) < self._config.world_size:
            if time.monotonic() >= deadline:
                missing = sorted(set(range(self._config.world_size)) - set(ready))
                raise WorkerFailed(f"workers {missing} were not ready in time")
            report = self._receive(deadline)
            if isinstance(report, Ready):
                ready[report.rank] = report
            elif isinstance(report, Loading) and report.rank == 0:
                progress(report.num_loaded, report.num_tensors)
        self.ready = [ready[rank] for rank in range(self._config.world_size)]

    def _compare(self) -> None:
        first = self.ready[0]
        for other in self.ready[1:]:
            if other.plan_digests != first.plan_digests:
                raise WorkerFailed(f"workers 0 and {other.rank} would run different plans")
            if other.page_size != first.page_size:
                raise WorkerFailed(f"workers 0 and {other.rank} have pages of different sizes")

    def _done(self) -> list[StepResult] | None:
        """One rank may be ahead of another that took part in the same step: its next one waits here for that."""
        behind: set[int] = set()
        for step_id, results in self._results.items():
            if behind.isdisjoint(results) and None not in results.values():
                return [result for result in self._results.pop(step_id).values() if result is not None]
            behind |= results.keys()
        return None

    def _send(self, rank: int, message: bytes) -> None:
        assert self._socket is not None
        try:
            self._socket.send_multipart([_identity(rank), message])
        except zmq.ZMQError as error:  # the worker has disconnected
            self._check(force=True)
            raise WorkerFailed(f"worker {rank} cannot be reached: {error}") from error

    def _receive(self, deadline: float) -> Report | None:
        """The next message; waits for it until the deadline, but not long without looking around."""
        assert self._socket is not None
        self._check()
        wait = min(CHECK_SECONDS, max(0.0, deadline - time.monotonic()))
        self._socket.setsockopt(zmq.RCVTIMEO, int(wait * 1000))  # one call waits and reads: a poller takes three
        try:
            _, message = self._socket.recv_multipart()
        except zmq.Again:
            return None
        report: Report = decode_report(message)
        if isinstance(report, Failure):
            self._raise([report])
        return report

    def _take_messages(self) -> list[Report]:
        assert self._socket is not None
        reports: list[Report] = []
        with suppress(zmq.Again):
            while True:
                _, message = self._socket.recv_multipart(zmq.NOBLOCK)
                reports.append(decode_report(message))
        return reports

    def _check(self, force: bool = False) -> None:
        now = time.monotonic()
        if now - self._checked_at < CHECK_SECONDS and not force:
            return
        self._checked_at = now
        if any(process.exit_code is not None for process in self._processes):
            self._raise(self._take_messages())

    def _raise(self, reports: list[Report]) -> None:
        """One worker's end breaks the others' transfers: waits a moment, then names every cause it finds."""
        time.sleep(CHECK_SECONDS)
        failures = [r for r in reports + self._take_messages() if isinstance(r, Failure)]
        reported = {failure.rank for failure in failures}
        dead = [p for p in self._processes if p.exit_code is not None and p.rank not in reported]
        causes = [process.obituary() for process in dead]
        causes += [f"worker {failure.rank} failed: {failure.message}" for failure in failures]
        raise WorkerFailed("; ".join(causes))


def _identity(rank: int) -> bytes:
    return str(rank).encode()


def _private_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="sp-serve-"))
    if len(str(directory)) + len("/controller") > LONGEST_SOCKET_PATH:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="sp-serve-", dir="/tmp"))
    return directory
