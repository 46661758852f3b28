"""What the steps of a server consist of: work, waits, and whose processor time they take."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from benchmarks.launched import LaunchedServer
from benchmarks.prefill import time_to_first_token
from benchmarks.streams import gaps, read_streams

TOKENS = 200  # of each stream
ONE_TOKEN_REQUESTS = 256


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step of the rank that had most, on average."""

    num_steps: int
    wall: float
    idle: float  # of the rank that waited longest for its steps
    busy: float  # of the rank that worked longest
    cpu: dict[str, float]  # processor time of all workers, of the server and of this process

    def __str__(self) -> str:
        cores = os.cpu_count() or 1
        cpu = ", ".join(f"{label} {1000 * seconds:.2f} ms" for label, seconds in self.cpu.items())
        return (
            f"{self.num_steps} steps of {1000 * self.wall:.2f} ms: a rank waits {1000 * self.idle:.2f} ms and works "
            f"{1000 * self.busy:.2f} ms; processor time {cpu}, together {1000 * sum(self.cpu.values()):.2f} of the "
            f"{1000 * cores * self.wall:.2f} ms that {cores} cores have"
        )


class Watch:
    """Counters and processor clocks as they are now: for the steps from here on."""

    def __init__(self, server: LaunchedServer) -> None:
        self._server = server
        self._pids = {"server": [server.process.pid], "workers": _children(server.process.pid), "client": [os.getpid()]}
        self._before = self._read()

    def steps(self) -> StepTimes:
        before, after = self._before, self._read()

        def most(name: str) -> float:
            return max(b - a for a, b in zip(before.counters[name], after.counters[name], strict=True))

        num_steps = round(most("sp:rank_num_steps_total"))
        return StepTimes(
            num_steps,
            (after.at - before.at) / num_steps,
            most("sp:rank_idle_seconds_total") / num_steps,
            most("sp:rank_busy_seconds_total") / num_steps,
            {label: (after.cpu[label] - before.cpu[label]) / num_steps for label in before.cpu},
        )

    def _read(self) -> _Reading:
        cpu = {label: sum(map(_cpu_seconds, pids)) for label, pids in self._pids.items()}
        return _Reading(time.perf_counter(), cpu, _counters(self._server))


@dataclass(frozen=True, slots=True)
class _Reading:
    at: float
    cpu: dict[str, float]
    counters: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Streams:
    """Steps while all of many streams run."""

    steps: StepTimes
    median: float  # seconds between two tokens of a stream ...
    slowest: float  # ... of which one in a hundred is above this

    def __str__(self) -> str:
        return f"{self.steps}; between tokens p50 {1000 * self.median:.2f} ms, p99 {1000 * self.slowest:.2f} ms"


def streams(server: LaunchedServer, num_streams: int, prompt_tokens: int) -> Streams:
    prompts = _prompts(server, num_streams, prompt_tokens)
    watch, steps = Watch(server), list[StepTimes]()

    def look(all_run: bool) -> None:
        nonlocal watch
        if all_run:
            watch = Watch(server)
        else:
            steps.append(watch.steps())

    between = gaps(server.port, prompts, TOKENS, look)
    return Streams(*steps, *map(float, np.quantile(between, (0.5, 0.99))))


def prefill(server: LaunchedServer, prompt_tokens: int) -> StepTimes:
    watch = Watch(server)
    time_to_first_token(server, prompt_tokens, seed=1)
    return watch.steps()


def one_token_requests(server: LaunchedServer) -> float:
    """How many requests of one token in and one out are served in a second, all sent at once."""
    prompts = _prompts(server, ONE_TOKEN_REQUESTS, 1)
    began = time.perf_counter()
    read_streams(server.port, prompts, 1)
    return ONE_TOKEN_REQUESTS / (time.perf_counter() - began)


def _prompts(server: LaunchedServer, num_prompts: int, length: int) -> list[list[int]]:
    vocab_size = httpx.get(f"{server.url}/model_info", timeout=30).json()["vocab_size"]
    found: list[list[int]] = np.random.default_rng(length).integers(vocab_size, size=(num_prompts, length)).tolist()
    return found


def _counters(server: LaunchedServer) -> dict[str, list[float]]:
    """Values of the counters in /metrics, by name."""
    values: dict[str, list[float]] = {}
    for line in httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines():
        if line.startswith("sp:rank_"):
            name, value = line.split("{", 1)[0], line.rsplit(" ", 1)[1]
            values.setdefault(name, []).append(float(value))
    return values


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _cpu_seconds(pid: int) -> float:
    """Of all threads of a process, to the nanosecond: Linux's clock_getcpuclockid(3), which Python does not have."""
    return time.clock_gettime((~pid << 3) | 2)
