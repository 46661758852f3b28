"""A discrete-event simulation of one layer under a plan: every message, kernel call and wait. Pure: no torch.

Ranks run their operations in order and block at the first use of what has not arrived. A message starts when both its
ends are posted; after its latency, and after what its link still carries, its bytes flow at a rate that is max-min
fair among all messages in flight (progressive filling: Bertsekas and Gallager, Data Networks, 6.5.2). A rank whose
cores carry its transfers computes at the machine's `overlap` of its speed meanwhile. Shares the machine's description
with cost.py, and no timing: what that estimates round by round is followed here from event to event, so that each can
be judged by the other.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from random import Random

from sp_backend.geometry import Geometry
from sp_backend.plan import Plan
from sp_backend.script import Kind, Post, Script, Step, Wait, Work
from sp_backend.shape import ModelShape
from sp_backend.topology import Link, Machine

_EPSILON = 1e-12  # seconds: what ends together, ends together


@dataclass(frozen=True, slots=True)
class Event:
    """rank: for a send, its sender. name: what was computed, sent or waited for."""

    rank: int
    kind: Kind
    name: str
    start: float  # seconds
    end: float
    peer: int | None = None  # of a send: who receives it


@dataclass(frozen=True, slots=True)
class Simulation:
    seconds: float  # until the last rank is done
    timeline: tuple[Event, ...]
    step_seconds: float  # a whole forward pass: as many times that as there are layers, and the step's fixed time

    def spent(self, rank: int, kind: Kind) -> float:
        return sum(e.end - e.start for e in self.timeline if e.rank == rank and e.kind == kind)


def simulate(
    plan: Plan,
    machine: Machine,
    shape: ModelShape,
    geometry: Geometry,
    *,
    dense: bool = False,
    jitter: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """One layer. dense: with its part of the step's other work before attention, on each rank for its own tokens.

    jitter: standard deviation of a factor on every computation and latency, drawn with `seed`; 0: none.
    """
    if plan.layout.num_ranks != machine.num_ranks:
        raise ValueError(f"a plan of {plan.layout.num_ranks} ranks on a machine of {machine.num_ranks}")
    engine = _Engine(plan, machine, shape, geometry, Random(seed), jitter)
    return engine.run(dense)


def perturbed(machine: Machine, spread: float, seed: int) -> Machine:
    """The machine with every capacity, latency, rate and fixed time off by a factor of its own in 1 ± spread."""
    random = Random(seed)

    def off(value: float) -> float:
        return value * random.uniform(1 - spread, 1 + spread)

    kernel, rates = off(1.0), machine.rates
    rates = replace(
        rates,
        kernel=rates.kernel.scaled(kernel),
        **{name: off(getattr(rates, name)) for name in rates.__slots__ if name not in ("kernel", "overlap")},
    )
    topology, bandwidth, latency = machine.topology, off(1.0), off(1.0)
    return replace(machine, rates=rates, topology=topology.scaled(bandwidth, latency))


@dataclass(slots=True, eq=False)
class _Message:
    """It may start when `ends` reaches two; it is through when `left` bytes are."""

    number: int
    src: int
    dst: int
    name: str
    link: Link
    left: float
    ends: int = 0
    start: float = 0.0
    rate: float = 0.0
    done: bool = False
    waiting: list[tuple[int, float]] = field(default_factory=list)  # (rank, since when)


@dataclass(slots=True)
class _Computing:
    work: Work
    start: float
    left: float  # seconds at full speed


class _Engine:
    def __init__(
        self, plan: Plan, machine: Machine, shape: ModelShape, geometry: Geometry, random: Random, jitter: float
    ) -> None:
        self._machine, self._shape = machine, shape
        self._random, self._jitter = random, jitter
        self._script = Script(plan, machine.rates, shape, geometry)
        self._now = 0.0
        self._events: list[Event] = []
        links, script = machine.topology.by_pair(), self._script
        self._messages = [
            _Message(i, src, dst, script.names[i], links[src, dst], float(script.bytes[i]))
            for i, (src, dst) in enumerate(script.ends)
        ]
        self._computing: dict[int, _Computing] = {}
        self._ready: list[int] = list(range(machine.num_ranks))
        self._latent: list[tuple[float, int]] = []  # (when its bytes start, message)
        self._flowing: dict[int, _Message] = {}
        # a link's messages, first the one flowing
        self._queues: dict[tuple[int, int], deque[_Message]] = defaultdict(deque)
        self._touching = [0] * machine.num_ranks  # messages in flight at each rank
        self._changed = False

    def run(self, dense: bool) -> Simulation:
        ranks = [self._steps(r, dense) for r in range(self._machine.num_ranks)]
        while True:
            while self._ready:
                self._resume(ranks, self._ready.pop(0))
            if not (self._computing or self._latent or self._flowing):
                break
            if self._changed:
                _share(self._flowing.values(), self._machine.topology.resources)
                self._changed = False
            self._advance()
        stuck = [m.name for m in self._messages if m.waiting]
        assert not stuck, f"ranks wait for what is never sent: {stuck}; was the plan proven?"
        shape, rates = self._shape, self._machine.rates
        events = tuple(sorted(self._events, key=lambda e: (e.start, e.rank)))
        return Simulation(self._now, events, shape.num_layers * self._now + rates.step_seconds)

    def _steps(self, rank: int, dense: bool) -> Iterator[Step]:
        before = [self._script.dense(rank)] if dense else []
        return chain(before, self._script.attention(rank))

    def _resume(self, ranks: list[Iterator[Step]], rank: int) -> None:
        """Runs a rank until it computes, waits or ends."""
        for step in ranks[rank]:
            match step:
                case Work() if (seconds := self._vary(step.seconds)) > 0:
                    self._computing[rank] = _Computing(step, self._now, seconds)
                    return
                case Post(number):
                    self._post(self._messages[number])
                case Wait(number) if not self._messages[number].done:
                    self._messages[number].waiting.append((rank, self._now))
                    return

    def _advance(self) -> None:
        """To the next end of something."""
        speed = self._machine.rates.overlap
        slowed = {r: speed if self._touching[r] else 1.0 for r in self._computing}
        times = [c.left / slowed[r] for r, c in self._computing.items() if slowed[r] > 0]
        times += [m.left / m.rate for m in self._flowing.values()]
        if self._latent:
            times.append(self._latent[0][0] - self._now)
        step = max(0.0, min(times))
        self._now += step
        for rank, computing in list(self._computing.items()):
            computing.left -= step * slowed[rank]
            if computing.left <= _EPSILON:
                del self._computing[rank]
                self._events.append(Event(rank, computing.work.kind, computing.work.name, computing.start, self._now))
                self._ready.append(rank)
        for message in list(self._flowing.values()):
            message.left -= step * message.rate
            if message.left <= _EPSILON * message.rate:
                self._finish(message)
        while self._latent and self._latent[0][0] <= self._now + _EPSILON:
            message = self._messages[heapq.heappop(self._latent)[1]]
            queue = self._queues[message.src, message.dst]
            queue.append(message)
            if len(queue) == 1:
                self._start(message)

    def _post(self, message: _Message) -> None:
        message.ends += 1
        if message.ends == 2:
            message.start = self._now
            heapq.heappush(self._latent, (self._now + self._vary(message.link.latency), message.number))
            for rank in (message.src, message.dst):
                self._touching[rank] += 1

    def _start(self, message: _Message) -> None:
        self._flowing[message.number] = message
        self._changed = True

    def _finish(self, message: _Message) -> None:
        del self._flowing[message.number]
        self._changed = message.done = True
        queue = self._queues[message.src, message.dst]
        queue.popleft()
        if queue:
            self._start(queue[0])
        for rank in (message.src, message.dst):
            self._touching[rank] -= 1
        name = f"{message.name} > {message.dst}"
        self._events.append(Event(message.src, "send", name, message.start, self._now, message.dst))
        for rank, since in message.waiting:
            self._events.append(Event(rank, "wait", f"{message.name} from {message.src}", since, self._now))
            self._ready.append(rank)
        message.waiting = []

    def _vary(self, seconds: float) -> float:
        return seconds * max(0.0, self._random.gauss(1.0, self._jitter)) if self._jitter else seconds


def _share(messages: Iterable[_Message], capacity: Mapping[str, float]) -> None:
    """Max-min fair rates: the resource that gives each of its users least decides theirs, then the next."""
    free = dict(capacity)
    users: dict[str, list[_Message]] = defaultdict(list)
    for message in messages:
        message.rate = 0.0
        for name in message.link.resources:
            users[name].append(message)
    number = {name: len(list_) for name, list_ in users.items()}
    while number:
        tightest = min(number, key=lambda name: free[name] / number[name])
        rate = free[tightest] / number[tightest]
        for message in users[tightest]:
            if message.rate == 0.0:
                message.rate = rate
                for name in message.link.resources:
                    free[name] = max(0.0, free[name] - rate)
                    number[name] -= 1
        number = {name: n for name, n in number.items() if n}
