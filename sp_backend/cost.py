"""Predicted time and bytes of a plan on a machine. Pure: no torch.

Round by round, each rank has a clock. It waits for what it sends on, posts its messages, computes (waiting for an
operand at its first use) and folds. A message starts when both its ends are posted. Messages of one round that use a
resource share it fairly (processor sharing: with sizes b_j, one of size b is through after sum(min(b_j, b)) bytes);
what an earlier round left on a resource goes first. Where a rank's cores carry its transfers, a transfer of d seconds
takes (1 - overlap) x d from its compute. No clock sees into a round, hence the name of an estimate; simulate.py does.

Everything is computed for many batches at once (the last axis of every array), so that a planner's table is cheap.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sp_backend.geometry import Geometry, block_bytes, piece_rows, predicted_bytes
from sp_backend.layout import STATE, Block
from sp_backend.operations import Fold, Operations, Part, RankOps, operations
from sp_backend.plan import Plan
from sp_backend.topology import Floats, Machine

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides its step times. Heads are those of one SP group: already divided by the TP size."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int = 1
    itemsize: int = 2  # bytes of an element of Q, K and V
    dense_flops: float = 0.0  # for a token, all layers, on one rank: everything but attention; 2 x its parameters


@dataclass(frozen=True, slots=True)
class Sizes:
    """Batches to be costed. rows [batches, sequences, chunks]; each sequence occurs `count` times [batches, sequences]
    in its batch.
    """

    rows: Ints
    count: Ints

    @classmethod
    def of(cls, geometry: Geometry) -> Sizes:
        rows = np.array([geometry.rows], np.int64)
        return cls(rows, np.ones(rows.shape[:2], np.int64))


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each batch [batches]: of one layer's attention, unless said otherwise."""

    attention: Floats
    exposed: Floats  # of those, the last rank's waits for others and what transfers took from its compute
    transfer: Floats  # of those, how long messages were on the last rank's links
    step: Floats  # a whole forward pass: all layers, dense work included


@dataclass(frozen=True, slots=True)
class RoundCost:
    """Seconds, each that of the rank where it is longest."""

    compute: float
    transfer: float
    wait: float


@dataclass(frozen=True, slots=True)
class Cost:
    """One batch under one plan: seconds of one layer's attention, bytes of one layer's."""

    seconds: float
    exposed: float  # communication that compute does not hide
    hidden: float
    step_seconds: float  # a whole forward pass: all layers, dense work included
    rounds: tuple[RoundCost, ...]
    link_bytes: Mapping[tuple[int, int], int]  # (src, dst) -> bytes
    resource_bytes: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.link_bytes.values())


class PlanCost:
    """A plan on a machine. Its structure is worked out once, for any number of batches."""

    def __init__(self, plan: Plan, machine: Machine, shape: ModelShape) -> None:
        if plan.layout.num_ranks != machine.num_ranks:
            raise ValueError(f"a plan of {plan.layout.num_ranks} ranks on a machine of {machine.num_ranks}")
        self.plan, self.machine, self.shape = plan, machine, shape
        self._ops = operations(plan)
        self._links = _Links(machine, self._ops)

    def times(self, sizes: Sizes) -> Times:
        return _Clock(self, self._ops, self._links, sizes).run()

    def cost(self, geometry: Geometry) -> Cost:
        clock = _Clock(self, self._ops, self._links, Sizes.of(geometry))
        times = clock.run()
        links: dict[tuple[int, int], int] = defaultdict(int)
        for r in predicted_bytes(self.plan, geometry, self.shape.head_dim, self.shape.itemsize):
            for pair, num_bytes in r.items():
                links[pair] += num_bytes
        resources: dict[str, int] = defaultdict(int)
        for link in self.machine.topology.links:
            for name in link.resources:
                resources[name] += links.get((link.src, link.dst), 0)
        exposed = float(times.exposed[0])
        return Cost(
            seconds=float(times.attention[0]),
            exposed=exposed,
            hidden=max(0.0, float(times.transfer[0]) - exposed),
            step_seconds=float(times.step[0]),
            rounds=tuple(RoundCost(*(float(x.max()) for x in r)) for r in clock.rounds),
            link_bytes=dict(links),
            resource_bytes={name: n for name, n in resources.items() if n},
        )


@dataclass(frozen=True, slots=True)
class _Groups:
    """Messages of some ranks: those of ranks[i] are messages[starts[i] : starts[i + 1]]."""

    ranks: NDArray[np.intp]
    messages: NDArray[np.intp]
    starts: NDArray[np.intp]

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]]) -> _Groups:
        """pairs: (rank, message), by ascending rank."""
        starts = [i for i, (rank, _) in enumerate(pairs) if i == 0 or rank != pairs[i - 1][0]]
        ranks, messages = [pairs[i][0] for i in starts], [message for _, message in pairs]
        return cls(np.array(ranks, np.intp), np.array(messages, np.intp), np.array(starts, np.intp))

    def reduce(self, ufunc: np.ufunc, values: Floats) -> Floats:
        """[ranks, batches] of values [messages, batches]"""
        return np.asarray(ufunc.reduceat(values[self.messages], self.starts, axis=0))


class _Links:
    """Which messages of a round meet on which resources, as index arrays."""

    def __init__(self, machine: Machine, ops: Operations) -> None:
        pairs = machine.topology.by_pair()
        names = list(machine.topology.resources)
        self.capacity = np.array([machine.topology.resources[n] for n in names])
        index = {n: i for i, n in enumerate(names)}
        self.src = np.array([m.src for m in ops.messages], np.intp)
        self.dst = np.array([m.dst for m in ops.messages], np.intp)
        self.latency = np.array([pairs[m.src, m.dst].latency for m in ops.messages])
        self.of_round: list[NDArray[np.intp]] = []
        self.at_rank: list[_Groups] = []  # messages that a rank sends or receives
        self.shared: list[list[tuple[NDArray[np.intp], NDArray[np.intp]]]] = []  # (resources, their messages) by number
        by_round: list[list[int]] = [[] for _ in ops.rounds]
        for k, m in enumerate(ops.messages):
            by_round[m.round].append(k)
        for mine in by_round:
            users: dict[int, list[int]] = defaultdict(list)
            for k in mine:
                for name in pairs[ops.messages[k].src, ops.messages[k].dst].resources:
                    users[index[name]].append(k)
            by_number: dict[int, list[int]] = defaultdict(list)
            for resource, messages in users.items():
                by_number[len(messages)].append(resource)
            self.of_round.append(np.array(mine, np.intp))
            ends = [(rank, k) for k in mine for rank in (ops.messages[k].src, ops.messages[k].dst)]
            self.at_rank.append(_Groups.of(sorted(ends)))
            self.shared.append(
                [(np.array(rs, np.intp), np.array([users[r] for r in rs], np.intp)) for rs in by_number.values()]
            )


class _Clock:
    """Runs all batches through all rounds. Arrays are [ranks, batches] or [messages, batches]."""

    def __init__(self, owner: PlanCost, ops: Operations, links: _Links, sizes: Sizes) -> None:
        self._plan, self._shape, self._rates = owner.plan, owner.shape, owner.machine.rates
        self._ops, self._links, self._sizes = ops, links, sizes
        batches, ranks = len(sizes.rows), owner.machine.num_ranks
        self._work = _Work(owner, sizes)
        self._bytes = np.zeros((len(ops.messages), batches))
        for k, m in enumerate(ops.messages):
            for block in m.blocks:
                self._bytes[k] += self._work.bytes_of(block)
        self._end = np.zeros_like(self._bytes)
        self._busy = np.zeros((len(links.capacity), batches))  # until when each resource is
        self._now = np.zeros((ranks, batches))
        self._exposed = np.zeros_like(self._now)
        self._transfer = np.zeros_like(self._now)
        self.rounds: list[tuple[Floats, Floats, Floats]] = []  # compute, transfer and wait of every rank

    def run(self) -> Times:
        for i, r in enumerate(self._ops.rounds):
            self._round(i, r)
        last = self._now.argmax(0), np.arange(self._now.shape[1])
        attention = self._now[last]
        shape, rates = self._shape, self._rates
        weight_bytes = shape.dense_flops / 2 * shape.itemsize
        tokens = self._work.tokens()
        dense = np.maximum(tokens * shape.dense_flops / rates.dense_flops, weight_bytes / rates.memory_bytes)
        step = (shape.num_layers * self._now + dense).max(0) + rates.step_seconds
        return Times(
            attention,
            self._exposed[last],
            self._transfer[last],
            step,
        )

    def _round(self, index: int, ranks: Sequence[RankOps]) -> None:
        rates, waited = self._rates, self._exposed.copy()
        received = self._now.copy()
        for r, ops in enumerate(ranks):
            messages = [*ops.receives, *ops.sends]
            sent = (self._bytes[messages] > 0).sum(0) if messages else 0
            received[r] += sent * rates.message_seconds + (rates.round_seconds if ops.calls or messages else 0.0)
        self._now[:] = received
        self._wait([(r, m) for r, ops in enumerate(ranks) for m in (*ops.needs, *_messages(ops.folds_before))])
        self._merge((r, f) for r, ops in enumerate(ranks) for f in ops.folds_before)
        for r, ops in enumerate(ranks):
            for c in ops.copies:
                beside = self._work.rows_of(c.beside) > 0
                self._now[r] += self._work.bytes_of(c.block) * beside / rates.copy_bytes
        transfer = self._send(index, self._now.copy(), received)
        compute = self._attend(ranks)
        if rates.overlap < 1:
            most = compute / rates.overlap - compute if rates.overlap else np.where(compute > 0, transfer, 0.0)
            taken = np.minimum(most, (1 - rates.overlap) * transfer)
            self._now += taken
            self._exposed += taken
        self._wait([(r, m) for r, ops in enumerate(ranks) for m in _messages(ops.folds)])
        self._merge((r, f) for r, ops in enumerate(ranks) for f in ops.folds)
        self._wait([(r, m) for r, ops in enumerate(ranks) for m in ops.settles])
        self._transfer += transfer
        self.rounds.append((compute, transfer, self._exposed - waited))

    def _wait(self, waits: Sequence[tuple[int, int]]) -> None:
        """waits: (rank, message), by ascending rank."""
        if waits:
            groups = _Groups.of(waits)
            before = self._now[groups.ranks]
            after = np.maximum(before, groups.reduce(np.maximum, self._end))
            self._now[groups.ranks] = after
            self._exposed[groups.ranks] += after - before

    def _merge(self, folds: Iterable[tuple[int, Fold]]) -> None:
        for rank, fold in folds:
            self._now[rank] += self._work.merge_seconds(fold.block)

    def _send(self, index: int, posted: Floats, received: Floats) -> Floats:
        """Ends of a round's messages; returns how long each rank's links are in use for them."""
        links, mine = self._links, self._links.of_round[index]
        busy = np.zeros_like(self._now)
        if not len(mine):
            return busy
        size = self._bytes[mine]
        start = np.zeros_like(self._bytes)
        start[mine] = np.maximum(posted[links.src[mine]], received[links.dst[mine]])
        for resources, messages in links.shared[index]:
            capacity, sizes = links.capacity[resources][:, None, None], self._bytes[messages]
            free = self._busy[resources]
            begin = np.where(sizes > 0, start[messages], np.inf).min(1)
            end = np.maximum(start[messages], free[:, None]) + _shared(sizes) / capacity
            for users, ends in zip(messages, end, strict=True):
                self._end[users] = np.maximum(self._end[users], ends)
            used = np.isfinite(begin)
            until = np.maximum(free, np.where(used, begin, 0.0)) + sizes.sum(1) / capacity[:, 0]
            self._busy[resources] = np.where(used, until, free)
        self._end[mine] = np.where(size > 0, self._end[mine] + links.latency[mine][:, None], 0.0)
        start[mine] = np.where(size > 0, start[mine], np.inf)
        ends_at = links.at_rank[index]
        first, last = ends_at.reduce(np.minimum, start), ends_at.reduce(np.maximum, self._end)
        busy[ends_at.ranks] = np.where(np.isfinite(first), last - np.where(np.isfinite(first), first, 0.0), 0.0)
        return busy

    def _attend(self, ranks: Sequence[RankOps]) -> Floats:
        """Kernel calls in order, the k-th of every rank together; returns each rank's seconds in them."""
        compute = np.zeros_like(self._now)
        for k in range(max(len(ops.calls) for ops in ranks)):
            calls = [(r, ops.calls[k]) for r, ops in enumerate(ranks) if k < len(ops.calls)]
            self._wait([(r, m) for r, call in calls for m in call.needs])
            for r, call in calls:
                for p in call.parts:
                    attended = self._work.attend_seconds(p)
                    merged = sum(self._work.merge_seconds(q) for q in p.merges)
                    compute[r] += attended
                    self._now[r] += attended + merged * (attended > 0)
        return compute


def _messages(folds: Iterable[Fold]) -> list[int]:
    return [f.message for f in folds]


def _shared(sizes: Floats) -> Floats:
    """Bytes that a shared resource has moved when each message is through; sizes [resources, messages, batches]."""
    number = sizes.shape[1]
    if number == 1:
        return sizes
    order = np.argsort(sizes, axis=1)
    ascending = np.take_along_axis(sizes, order, 1)
    larger = np.arange(number - 1, -1, -1)[None, :, None]
    moved = np.empty_like(sizes)
    np.put_along_axis(moved, order, np.cumsum(ascending, 1) + ascending * larger, 1)
    return moved


class _Work:
    """Rows, bytes and seconds of blocks [batches], each kind of block worked out once."""

    def __init__(self, owner: PlanCost, sizes: Sizes) -> None:
        self._layout, self._shape, self._rates = owner.plan.layout, owner.shape, owner.machine.rates
        self._rows, self._count = sizes.rows, sizes.count
        # chunks of equal sizes in all batches are one kind: a ring's pairs of blocks become a few
        flat = sizes.rows.transpose(2, 0, 1).reshape(sizes.rows.shape[2], -1)
        kinds: dict[bytes, int] = {}
        self._kind = [kinds.setdefault(row.tobytes(), chunk) for chunk, row in enumerate(np.ascontiguousarray(flat))]
        self._rows_of: dict[tuple[int, tuple[int, int]], Floats] = {}
        self._merge_seconds: dict[tuple[int, int], Floats] = {}
        self._attend_seconds: dict[tuple[object, ...], Floats] = {}

    def sequence_rows(self, block: Block) -> Ints:
        """[batches, sequences]"""
        first, last = piece_rows(self._rows[..., block.chunk], block.piece)  # type: ignore[arg-type]
        return np.asarray(last - first)

    def rows_of(self, block: Block) -> Floats:
        key = self._kind[block.chunk], block.piece
        if key not in self._rows_of:
            self._rows_of[key] = (self.sequence_rows(block) * self._count).sum(1).astype(float)
        return self._rows_of[key]

    def bytes_of(self, block: Block) -> Floats:
        return self.rows_of(block) * block_bytes(self._layout, block, 1, self._shape.head_dim, self._shape.itemsize)

    def merge_seconds(self, block: Block) -> Floats:
        heads = block.heads[1] - block.heads[0]
        key = self._kind[block.chunk], heads
        if key not in self._merge_seconds:
            rows, rates = self.rows_of(block), self._rates
            state_bytes = rows * heads * (self._shape.head_dim + 1) * 4
            self._merge_seconds[key] = state_bytes / rates.merge_bytes + (rows > 0) * rates.fold_seconds
        return self._merge_seconds[key]

    def tokens(self) -> Floats:
        """New tokens of each rank [ranks, batches]; layout heads: its share of the work on all of them."""
        layout = self._layout
        ranks = range(layout.num_ranks)
        chunks = [[self.rows_of(Block(STATE, c, layout.all_heads)) for c in layout.q_of(r)] for r in ranks]
        tokens = np.sum(chunks, axis=1)
        return np.asarray(tokens / layout.num_ranks if layout.kind == "heads" else tokens)

    def attend_seconds(self, part: Part) -> Floats:
        first, heads = part.qs[0], sum(q.heads[1] - q.heads[0] for q in part.qs)
        kvs = tuple(sorted((self._kind[kv.chunk], kv.piece) for kv in part.kvs[: len(part.kvs) - part.causal]))
        key = self._kind[first.chunk], kvs, part.causal, heads
        if key not in self._attend_seconds:
            kernel, queries = self._rates.kernel, self.sequence_rows(first)
            per_pair, seconds = 4 * self._shape.head_dim * heads, np.zeros(queries.shape)
            if kvs:
                keys = sum(self.sequence_rows(kv) for kv in part.kvs[: len(kvs)])
                seconds += per_pair * queries * keys / kernel.full_rate(queries, keys)
            if part.causal:
                seconds += per_pair * queries * (queries + 1) / 2 / kernel.causal_rate(queries)
            called = (seconds > 0).any(1)
            self._attend_seconds[key] = (seconds * self._count).sum(1) + called * self._rates.call_seconds
        return self._attend_seconds[key]
