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
from random import Random
from typing import Literal

from sp_backend.cost import ModelShape
from sp_backend.geometry import Geometry, block_bytes, visible_pairs
from sp_backend.layout import Block
from sp_backend.operations import CallOp, Copy, Fold, Operations, Part, RankOps, operations
from sp_backend.plan import Plan
from sp_backend.topology import Link, Machine

Kind = Literal["dense", "overhead", "pack", "attend", "merge", "send", "wait"]
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
class _Flow:
    """A message. It may start when `ends` reaches two; it is through when `left` bytes are."""

    message: int
    src: int
    dst: int
    name: str
    link: Link
    left: float
    ends: int = 0
    start: float = 0.0
    rate: float = 0.0
    done: bool = False
    waiting: list[int] = field(default_factory=list)  # ranks


@dataclass(slots=True)
class _Work:
    kind: Kind
    name: str
    start: float
    left: float  # seconds at full speed


@dataclass(slots=True)
class _Wait:
    flow: _Flow


class _Engine:
    def __init__(
        self, plan: Plan, machine: Machine, shape: ModelShape, geometry: Geometry, random: Random, jitter: float
    ) -> None:
        self._plan, self._machine, self._shape, self._geometry = plan, machine, shape, geometry
        self._random, self._jitter = random, jitter
        self._ops: Operations = operations(plan)
        self._now = 0.0
        self._events: list[Event] = []
        links = machine.topology.by_pair()
        self._flows = [
            _Flow(i, m.src, m.dst, _names(m.blocks), links[m.src, m.dst], float(sum(map(self._bytes, m.blocks))))
            for i, m in enumerate(self._ops.messages)
        ]
        self._computing: dict[int, _Work] = {}
        self._ready: list[int] = list(range(machine.num_ranks))
        self._latent: list[tuple[float, int]] = []  # (when its bytes start, message)
        self._flowing: dict[int, _Flow] = {}
        self._queues: dict[tuple[int, int], deque[_Flow]] = defaultdict(
            deque
        )  # a link's messages, first the one flowing
        self._touching = [0] * machine.num_ranks  # messages in flight at each rank
        self._changed = False
        self._rates: dict[tuple[int, int, bool], float] = {}  # of the kernel, by block

    def run(self, dense: bool) -> Simulation:
        ranks = [self._rank(r, dense) for r in range(self._machine.num_ranks)]
        while True:
            while self._ready:
                self._resume(ranks, self._ready.pop(0))
            if not (self._computing or self._latent or self._flowing):
                break
            if self._changed:
                _share(self._flowing.values(), self._machine.topology.resources)
                self._changed = False
            self._advance()
        stuck = [f.name for f in self._flows if f.waiting]
        assert not stuck, f"ranks wait for what is never sent: {stuck}; was the plan proven?"
        shape, rates = self._shape, self._machine.rates
        events = tuple(sorted(self._events, key=lambda e: (e.start, e.rank)))
        return Simulation(self._now, events, shape.num_layers * self._now + rates.step_seconds)

    def _resume(self, ranks: list[Iterator[_Work | _Wait]], rank: int) -> None:
        """Runs a rank until it computes, waits or ends."""
        for op in ranks[rank]:
            if isinstance(op, _Work):
                if op.left > 0:
                    self._computing[rank] = op
                    return
            elif not op.flow.done:
                op.flow.waiting.append(rank)
                return

    def _advance(self) -> None:
        """To the next end of something."""
        speed = self._machine.rates.overlap
        slowed = {r: speed if self._touching[r] else 1.0 for r in self._computing}
        times = [w.left / slowed[r] for r, w in self._computing.items() if slowed[r] > 0]
        times += [f.left / f.rate for f in self._flowing.values()]
        if self._latent:
            times.append(self._latent[0][0] - self._now)
        step = max(0.0, min(times))
        self._now += step
        for rank, work in list(self._computing.items()):
            work.left -= step * slowed[rank]
            if work.left <= _EPSILON:
                del self._computing[rank]
                self._events.append(Event(rank, work.kind, work.name, work.start, self._now))
                self._ready.append(rank)
        for flow in list(self._flowing.values()):
            flow.left -= step * flow.rate
            if flow.left <= _EPSILON * flow.rate:
                self._finish(flow)
        while self._latent and self._latent[0][0] <= self._now + _EPSILON:
            flow = self._flows[heapq.heappop(self._latent)[1]]
            queue = self._queues[flow.src, flow.dst]
            queue.append(flow)
            if len(queue) == 1:
                self._flow(flow)

    def _flow(self, flow: _Flow) -> None:
        self._flowing[flow.message] = flow
        self._changed = True

    def _finish(self, flow: _Flow) -> None:
        del self._flowing[flow.message]
        self._changed = flow.done = True
        queue = self._queues[flow.src, flow.dst]
        queue.popleft()
        if queue:
            self._flow(queue[0])
        for rank in (flow.src, flow.dst):
            self._touching[rank] -= 1
        self._events.append(Event(flow.src, "send", f"{flow.name} > {flow.dst}", flow.start, self._now, flow.dst))
        self._ready += flow.waiting
        flow.waiting = []

    def _post(self, message: int) -> None:
        flow = self._flows[message]
        flow.ends += 1
        if flow.ends == 2:
            flow.start = self._now
            heapq.heappush(self._latent, (self._now + self._vary(flow.link.latency), message))
            for rank in (flow.src, flow.dst):
                self._touching[rank] += 1

    # One rank, operation by operation

    def _rank(self, rank: int, dense: bool) -> Iterator[_Work | _Wait]:
        rates = self._machine.rates
        if dense:
            yield self._work("dense", "all but attention", self._dense_seconds(rank))
        for i, by_rank in enumerate(self._ops.rounds):
            ops = by_rank[rank]
            receives, sends = self._filled(ops.receives), self._filled(ops.sends)
            if ops.calls or ops.receives or ops.sends:
                yield self._work("overhead", f"round {i}", rates.round_seconds)
            for message in receives:
                yield self._work("overhead", f"receive {self._flows[message].name}", rates.message_seconds)
                self._post(message)
            yield from self._prepare(rank, ops)
            for message in sends:
                yield self._work("overhead", f"send {self._flows[message].name}", rates.message_seconds)
                self._post(message)
            for call in ops.calls:
                yield from self._call(rank, call)
            yield from self._fold(rank, ops.folds)
            yield from self._wait(rank, ops.settles)

    def _filled(self, messages: tuple[int, ...]) -> list[int]:
        return [m for m in messages if self._flows[m].left > 0]

    def _prepare(self, rank: int, ops: RankOps) -> Iterator[_Work | _Wait]:
        yield from self._wait(rank, ops.needs)
        yield from self._fold(rank, ops.folds_before)
        for copy in ops.copies:
            yield self._work("pack", _names((copy.block,)), self._copy_seconds(copy))

    def _call(self, rank: int, call: CallOp) -> Iterator[_Work | _Wait]:
        yield from self._wait(rank, call.needs)
        for p in call.parts:
            name = f"{_names(p.qs[:1])}: {_names(p.kvs)}{'*' if p.causal else ''}"
            seconds = self._attend_seconds(p)
            yield self._work("attend", name, seconds)
            for q in p.merges if seconds else ():
                yield self._work("merge", _names((q,)), self._merge_seconds(q))

    def _fold(self, rank: int, folds: tuple[Fold, ...]) -> Iterator[_Work | _Wait]:
        for fold in folds:
            yield from self._wait(rank, (fold.message,))
            yield self._work("merge", _names((fold.block,)), self._merge_seconds(fold.block))

    def _wait(self, rank: int, messages: tuple[int, ...]) -> Iterator[_Wait]:
        for message in messages:
            flow = self._flows[message]
            if not flow.done and (flow.left > 0):
                since = self._now
                yield _Wait(flow)
                self._events.append(Event(rank, "wait", f"{flow.name} from {flow.src}", since, self._now))

    def _work(self, kind: Kind, name: str, seconds: float) -> _Work:
        return _Work(kind, name, self._now, self._vary(seconds))

    def _vary(self, seconds: float) -> float:
        return seconds * max(0.0, self._random.gauss(1.0, self._jitter)) if self._jitter else seconds

    # Sizes and durations

    def _bytes(self, block: Block) -> int:
        rows = self._geometry.num_rows(block)
        return block_bytes(self._plan.layout, block, rows, self._shape.head_dim, self._shape.itemsize)

    def _copy_seconds(self, copy: Copy) -> float:
        if not self._geometry.num_rows(copy.beside):
            return 0.0
        return self._bytes(copy.block) / self._machine.rates.copy_bytes

    def _merge_seconds(self, block: Block) -> float:
        rows, rates = self._geometry.num_rows(block), self._machine.rates
        width = (block.heads[1] - block.heads[0]) * 4 * (self._shape.head_dim + 1)
        return rows * width / rates.merge_bytes + rates.fold_seconds if rows else 0.0

    def _dense_seconds(self, rank: int) -> float:
        layout, shape, rates = self._plan.layout, self._shape, self._machine.rates
        tokens = float(sum(row[c] for row in self._geometry.rows for c in layout.q_of(rank)))
        tokens *= shape.dense_share(layout)
        weights = shape.dense_flops / 2 * shape.itemsize / rates.memory_bytes
        return max(tokens * shape.dense_flops / rates.dense_flops, weights) / shape.num_layers

    def _attend_seconds(self, part: Part) -> float:
        geometry = self._geometry
        per_pair = 4 * self._shape.head_dim * sum(q.heads[1] - q.heads[0] for q in part.qs)
        seconds = 0.0
        for s, (lo, hi) in enumerate(geometry.spans(part.qs[0])):
            keys = [b - a for a, b in (geometry.spans(kv)[s] for kv in part.kvs)]
            own = keys.pop() if part.causal else 0
            queries, others = hi - lo, sum(keys)
            if queries and others:
                seconds += per_pair * queries * others / self._rate(queries, others, False)
            if queries and own:
                seconds += per_pair * visible_pairs(queries, own, True) / self._rate(queries, own, True)
        return seconds + self._machine.rates.call_seconds if seconds else 0.0

    def _rate(self, queries: int, keys: int, causal: bool) -> float:
        kernel, key = self._machine.rates.kernel, (queries, keys, causal)
        if key not in self._rates:
            self._rates[key] = float(kernel.causal_rate(queries) if causal else kernel.full_rate(queries, keys))
        return self._rates[key]


def _share(flows: Iterable[_Flow], capacity: Mapping[str, float]) -> None:
    """Max-min fair rates: the resource that gives each of its users least decides theirs, then the next."""
    free = dict(capacity)
    users: dict[str, list[_Flow]] = defaultdict(list)
    for flow in flows:
        flow.rate = 0.0
        for name in flow.link.resources:
            users[name].append(flow)
    number = {name: len(list_) for name, list_ in users.items()}
    while number:
        tightest = min(number, key=lambda name: free[name] / number[name])
        rate = free[tightest] / number[tightest]
        for flow in users[tightest]:
            if flow.rate == 0.0:
                flow.rate = rate
                for name in flow.link.resources:
                    free[name] = max(0.0, free[name] - rate)
                    number[name] -= 1
        number = {name: n for name, n in number.items() if n}


def _names(blocks: tuple[Block, ...]) -> str:
    """Operands and chunks, as kv0,3(1/2)."""
    by_operand: dict[str, list[str]] = defaultdict(list)
    for b in blocks:
        piece = "" if b.piece == (0, 1) else f"({b.piece[0]}/{b.piece[1]})"
        by_operand[b.operand.lower()].append(f"{b.chunk}{piece}")
    return " ".join(f"{operand}{','.join(chunks)}" for operand, chunks in by_operand.items())
