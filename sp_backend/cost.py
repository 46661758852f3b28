"""Predicted time and bytes of a plan on a machine. Pure: no torch.

Round by round, each rank has a clock. It waits for what it sends on, posts its messages, computes (waiting for an
operand at its first use) and folds. A message starts when both its ends are posted. Messages of one round that use a
resource share it fairly (processor sharing: with sizes b_j, one of size b is through after sum(min(b_j, b)) bytes);
what an earlier round left on a resource goes first. Where a rank's cores carry its transfers, a transfer of d seconds
takes (1 - overlap) x d from its compute. No clock sees into a round, hence the name of an estimate; simulate.py does.

Everything is computed for many batches at once (the last axis of every array), so that a planner's table is cheap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sp_backend.columns import Index
from sp_backend.flow import Flow, Messages, flow_of
from sp_backend.geometry import Geometry, block_bytes, piece_rows
from sp_backend.grouping import bounds, run_starts
from sp_backend.layout import Layout
from sp_backend.plan import Plan
from sp_backend.topology import Floats, Machine, Rates

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
    kv_flops: float = 0.0  # of those: projections to keys and values, which redundant KV repeats on every rank

    def dense_share(self, layout: Layout) -> float:
        """Which part of the dense work on the tokens whose queries it holds is a rank's."""
        if layout.kind != "heads":
            return 1.0
        repeated = self.kv_flops / self.dense_flops if layout.redundant_kv and self.dense_flops else 0.0
        return (1 - repeated) / layout.num_ranks + repeated


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


def least_seconds(
    machine: Machine,
    shape: ModelShape,
    batch: Sequence[tuple[int, int]],
    degree: int,
    *,
    causal: bool = True,
    queries: Sequence[int] | None = None,
    rounds: int = 0,
) -> tuple[float, float]:
    """What any plan that shares each prompt over `degree` ranks takes at least, for one layer's attention and a whole
    step: its work, evenly spread, at the best rate that the kernel reaches, and its rounds.

    batch: (new, cached) tokens. queries: of each prompt, the most that are attended at once (None: all). rounds: those
    in which every rank takes part.
    """
    rates, attention = machine.rates, []
    for (new, cached), most in zip(batch, queries or [new for new, _ in batch], strict=True):
        pairs = new * (cached + ((new + 1) / 2 if causal else new))
        attention.append(4 * shape.head_dim * shape.num_heads * pairs / rates.kernel.best_rate(most))
    dense = [new * shape.dense_flops / rates.dense_flops for new, _ in batch]
    step = [shape.num_layers * a + d for a, d in zip(attention, dense, strict=True)]
    attends, steps = (max(max(x) / degree, sum(x) / machine.num_ranks) for x in (attention, step))
    fixed = rounds * rates.round_seconds
    return attends + fixed, steps + shape.num_layers * fixed + rates.step_seconds


class PlanCost:
    """A plan on a machine. Its structure is worked out once, for any number of batches."""

    def __init__(self, plan: Plan, machine: Machine, shape: ModelShape) -> None:
        if plan.layout.num_ranks != machine.num_ranks:
            raise ValueError(f"a plan of {plan.layout.num_ranks} ranks on a machine of {machine.num_ranks}")
        self.plan, self.machine, self.shape = plan, machine, shape
        self._flow = flow_of(plan)

    def on(self, machine: Machine) -> PlanCost:
        """The same plan on a machine of as many ranks, its structure as worked out before."""
        assert machine.num_ranks == self.machine.num_ranks
        other = copy(self)
        other.machine = machine
        vars(other).pop("_links", None)
        return other

    @cached_property
    def _links(self) -> _Links:
        return _Links(self.machine, self._flow.messages, self._flow.num_rounds)

    def least_seconds(self, geometry: Geometry) -> tuple[float, float]:
        """One layer's attention and a whole step if no rank ever waited: quicker to tell than what they cost."""
        work = _Work(self.plan.layout, self._flow, self.shape, self.machine.rates, Sizes.of(geometry))
        busy = work.busy_seconds(self.machine.num_ranks)
        return float(busy.max()), float(work.step_seconds(busy)[0])

    def times(self, sizes: Sizes) -> Times:
        return _Clock(self, self._flow, self._links, sizes).run()

    def cost(self, geometry: Geometry) -> Cost:
        clock = _Clock(self, self._flow, self._links, Sizes.of(geometry))
        times = clock.run()
        exposed = float(times.exposed[0])
        messages, size = self._flow.messages, clock.message_bytes[:, 0].astype(int)
        ranks, wires = self.machine.num_ranks, self.machine.topology.wires
        sent = np.bincount(messages.src * ranks + messages.dst, size, ranks * ranks).astype(np.int64)
        links = {divmod(pair, ranks): int(sent[pair]) for pair in np.flatnonzero(sent).tolist()}
        through = wires.uses.reshape(ranks * ranks, -1)
        pair, place = np.nonzero(through >= 0)
        carried = np.bincount(through[pair, place], sent[pair], len(wires.capacity)).astype(int).tolist()
        resources = dict(zip(self.machine.topology.resources, carried, strict=True))
        return Cost(
            seconds=float(times.attention[0]),
            exposed=exposed,
            hidden=max(0.0, float(times.transfer[0]) - exposed),
            step_seconds=float(times.step[0]),
            rounds=tuple(RoundCost(*(float(x.max()) for x in r)) for r in clock.rounds),
            link_bytes=links,
            resource_bytes={name: n for name, n in resources.items() if n},
        )


@dataclass(frozen=True, slots=True)
class _Groups:
    """Messages of some ranks: those of ranks[i] are messages[starts[i] : starts[i + 1]]."""

    ranks: Index
    messages: Index
    starts: Index

    @classmethod
    def of(cls, ranks: Index, messages: Index) -> _Groups:
        """ranks ascend."""
        starts = run_starts(ranks)
        return cls(ranks[starts], messages, starts)

    def reduce(self, ufunc: np.ufunc, values: Floats) -> Floats:
        """[ranks, batches] of values [messages, batches]"""
        return np.asarray(ufunc.reduceat(values[self.messages], self.starts, axis=0))


class _Links:
    """Which messages of a round meet on which resources, as index arrays."""

    def __init__(self, machine: Machine, messages: Messages, num_rounds: int) -> None:
        wires = machine.topology.wires
        self.capacity, self.latency = wires.capacity, wires.latency[messages.src, messages.dst]
        used = wires.uses[messages.src, messages.dst]  # [messages, resources of its link]
        self.at_rank: list[_Groups] = []  # messages that a rank sends or receives
        self.shared: list[list[tuple[Index, Index]]] = []  # (resources, their messages) by number
        self.of_round = [slice(*x) for x in bounds(messages.round, num_rounds)]
        for mine in self.of_round:
            numbers = np.arange(mine.start, mine.stop)
            ranks, both = np.concatenate([messages.src[mine], messages.dst[mine]]), np.concatenate([numbers, numbers])
            order = np.argsort(ranks, kind="stable")
            self.at_rank.append(_Groups.of(ranks[order], both[order]))
            self.shared.append(_users(used[mine], mine.start))


def _users(used: Index, first: int) -> list[tuple[Index, Index]]:
    """used [messages, resources]. The resources that as many messages use, and those, counted from `first`."""
    resource = used.ravel()
    message = np.repeat(np.arange(len(used)) + first, used.shape[1])[resource >= 0]
    resource = resource[resource >= 0]
    order = np.argsort(resource, kind="stable")
    resource, message = resource[order], message[order]
    starts = run_starts(resource)
    counts = np.diff(np.append(starts, len(resource)))
    found = []
    for number in np.unique(counts):
        chosen = starts[counts == number]
        found.append((resource[chosen], message[chosen[:, None] + np.arange(number)]))
    return found


class _Clock:
    """Runs all batches through all rounds. Arrays are [ranks, batches] or [messages, batches]."""

    def __init__(self, owner: PlanCost, flow: Flow, links: _Links, sizes: Sizes) -> None:
        self._layout, self._shape, self._rates = owner.plan.layout, owner.shape, owner.machine.rates
        self._flow, self._links, self._sizes = flow, links, sizes
        self._work = _Work(owner.plan.layout, flow, owner.shape, owner.machine.rates, sizes)
        self.message_bytes = self._work.message_bytes()
        self._sent = self.message_bytes > 0
        self._end = np.zeros_like(self.message_bytes)
        self._busy = np.zeros((len(links.capacity), self.message_bytes.shape[1]))  # until when each resource is
        self._now = np.zeros((owner.machine.num_ranks, self.message_bytes.shape[1]))
        self._exposed = np.zeros_like(self._now)
        self._transfer = np.zeros_like(self._now)
        self.rounds: list[tuple[Floats, Floats, Floats]] = []  # compute, transfer and wait of every rank

    def run(self) -> Times:
        flow, number = self._flow, self._flow.num_rounds
        self._folds, self._folding = self._work.fold_seconds(), bounds(flow.folds.round, number)
        self._copied, self._copying = self._work.copy_seconds(), bounds(flow.copies.round, number)
        self._attended, self._called = self._work.call_seconds()
        self._calling = bounds(flow.calls.round, number)
        self._waiting = bounds(flow.waits.round, number)
        for i in range(number):
            self._round(i)
        last = self._now.argmax(0), np.arange(self._now.shape[1])
        step = self._work.step_seconds(self._now)
        return Times(self._now[last], self._exposed[last], self._transfer[last], step)

    def _round(self, index: int) -> None:
        rates, waited, flow = self._rates, self._exposed.copy(), self._flow
        received, ends, calls = self._now.copy(), self._links.at_rank[index], slice(*self._calling[index])
        if len(ends.ranks):
            received[ends.ranks] += ends.reduce(np.add, self._sent.astype(float)) * rates.message_seconds
        received[np.union1d(ends.ranks, flow.calls.rank[calls])] += rates.round_seconds
        self._now[:] = received
        mine = slice(*self._waiting[index])
        self._wait(flow.waits.rank[mine], flow.waits.message[mine])
        folds = np.arange(*self._folding[index])
        before = flow.folds.before[folds]
        self._add(flow.folds.rank, self._folds, folds[before])
        self._add(flow.copies.rank, self._copied, np.arange(*self._copying[index]))
        transfer = self._send(index, self._now.copy(), received)
        compute = self._attend(calls)
        if rates.overlap < 1:
            most = compute / rates.overlap - compute if rates.overlap else np.where(compute > 0, transfer, 0.0)
            taken = np.minimum(most, (1 - rates.overlap) * transfer)
            self._now += taken
            self._exposed += taken
        late = folds[~before]
        order = np.argsort(flow.folds.rank[late], kind="stable")
        self._wait(flow.folds.rank[late][order], flow.folds.message[late][order])
        self._add(flow.folds.rank, self._folds, late)
        if index:
            sent = self._links.of_round[index - 1]
            order = np.argsort(flow.messages.src[sent], kind="stable")
            self._wait(flow.messages.src[sent][order], order + sent.start)
        self._transfer += transfer
        self.rounds.append((compute, transfer, self._exposed - waited))

    def _wait(self, ranks: Index, messages: Index) -> None:
        """ranks ascend."""
        if len(ranks):
            groups = _Groups.of(ranks, messages)
            before = self._now[groups.ranks]
            after = np.maximum(before, groups.reduce(np.maximum, self._end))
            self._now[groups.ranks] = after
            self._exposed[groups.ranks] += after - before

    def _add(self, ranks: Index, seconds: Floats, rows: Index) -> None:
        if len(rows):
            np.add.at(self._now, ranks[rows], seconds[rows])

    def _send(self, index: int, posted: Floats, received: Floats) -> Floats:
        """Ends of a round's messages; returns how long each rank's links are in use for them."""
        links, mine, messages = self._links, self._links.of_round[index], self._flow.messages
        busy = np.zeros_like(self._now)
        if mine.start == mine.stop:
            return busy
        sent = self._sent[mine]
        start = np.maximum(posted[messages.src[mine]], received[messages.dst[mine]])
        finish = np.zeros_like(start)
        for resources, users in links.shared[index]:
            capacity, sizes, local = (
                links.capacity[resources][:, None, None],
                self.message_bytes[users],
                users - mine.start,
            )
            free = self._busy[resources]
            begin = np.where(sizes > 0, start[local], np.inf).min(1)
            end = np.maximum(start[local], free[:, None]) + _shared(sizes) / capacity
            np.maximum.at(finish, local.ravel(), end.reshape(-1, end.shape[-1]))
            used = np.isfinite(begin)
            until = np.maximum(free, np.where(used, begin, 0.0)) + sizes.sum(1) / capacity[:, 0]
            self._busy[resources] = np.where(used, until, free)
        self._end[mine] = np.where(sent, finish + links.latency[mine][:, None], 0.0)
        ends_at = links.at_rank[index]
        here = _Groups(ends_at.ranks, ends_at.messages - mine.start, ends_at.starts)
        first = here.reduce(np.minimum, np.where(sent, start, np.inf))
        last = here.reduce(np.maximum, self._end[mine])
        busy[ends_at.ranks] = np.where(np.isfinite(first), last - np.where(np.isfinite(first), first, 0.0), 0.0)
        return busy

    def _attend(self, calls: slice) -> Floats:
        """Kernel calls in order, the k-th of every rank together; returns each rank's seconds in them."""
        flow, compute = self._flow, np.zeros_like(self._now)
        ranks, turn = flow.calls.rank[calls], flow.calls.turn[calls]
        needs = slice(*np.searchsorted(flow.call_waits.round, (calls.start, calls.stop)))
        waiting = flow.call_waits.round[needs] - calls.start
        for k in range(int(turn.max(initial=-1)) + 1):
            rows = np.flatnonzero(turn == k)
            asked = turn[waiting] == k
            self._wait(flow.call_waits.rank[needs][asked], flow.call_waits.message[needs][asked])
            compute[ranks[rows]] += self._attended[calls.start + rows]
            self._now[ranks[rows]] += self._called[calls.start + rows]
        return compute


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
    """Bytes and seconds of a plan's instructions [instructions, batches]; equal ones are worked out once."""

    def __init__(self, layout: Layout, flow: Flow, shape: ModelShape, rates: Rates, sizes: Sizes) -> None:
        self._layout, self._flow, self._shape, self._rates, self._count = layout, flow, shape, rates, sizes.count
        chunks = sizes.rows.transpose(2, 0, 1)  # [chunk, batch, sequence]
        rows = np.stack([np.subtract(*piece_rows(chunks, cut)[::-1]) for cut in flow.forms.cuts])
        flat = rows.reshape(-1, rows[0, 0].size)
        kinds: dict[bytes, int] = {}
        kind = [kinds.setdefault(row.tobytes(), len(kinds)) for row in flat]
        first = np.unique(kind, return_index=True)[1]
        self._kind = np.array(kind).reshape(len(flow.forms.cuts), -1)  # [cut, chunk]: of blocks with equal rows
        self._sequence_rows = flat[first].reshape(-1, *sizes.count.shape)  # [kind, batch, sequence]
        self._rows = (self._sequence_rows * sizes.count).sum(2).astype(float)  # [kind, batch]
        self._whole = self._kind[flow.forms.cuts.index((0, 1))]  # [chunk]
        t, forms = flow.columns.transfers, flow.forms
        self._sent = self._kind[forms.sent_cut, t.chunk]
        width = [
            block_bytes(layout, forms.block(form, 0), 1, shape.head_dim, shape.itemsize) for form in range(forms.number)
        ]
        self._width = np.array(width)[forms.transfer]  # bytes of a row

    def message_bytes(self) -> Floats:
        message, number = self._flow.message_of, len(self._flow.messages.round)
        if not number:
            return np.zeros((0, self._rows.shape[1]))
        order = np.argsort(message, kind="stable")
        starts = run_starts(message[order])
        return np.asarray(np.add.reduceat(self._rows[self._sent[order]] * self._width[order, None], starts))

    def fold_seconds(self) -> Floats:
        return self._merge_seconds(self._whole[self._flow.folds.chunk], self._flow.folds.heads)

    def copy_seconds(self) -> Floats:
        copies = self._flow.copies
        packed = self._rows[self._sent[copies.transfer]] * self._width[copies.transfer, None]
        return np.asarray(packed * (self._rows[self._sent[copies.beside]] > 0) / self._rates.copy_bytes)

    def call_seconds(self) -> tuple[Floats, Floats]:
        """[calls]: in kernels, and with the merges of what they return."""
        parts, calls = self._flow.parts, self._flow.calls
        if not len(calls.round):
            return np.zeros((0, self._rows.shape[1])), np.zeros((0, self._rows.shape[1]))
        attended = self._attend_seconds()
        merged = self._merge_seconds(self._whole[parts.q], parts.heads) * parts.merges[:, None] * (attended > 0)
        starts = run_starts(parts.call)
        in_kernel = np.add.reduceat(attended, starts)
        in_kernel += (in_kernel > 0) * self._rates.call_seconds
        return in_kernel, in_kernel + np.add.reduceat(merged, starts)

    def busy_seconds(self, num_ranks: int) -> Floats:
        """[ranks, batches]: all that a rank does itself."""
        flow, rates = self._flow, self._rates
        busy = np.zeros((num_ranks, self._rows.shape[1]))
        np.add.at(busy, flow.calls.rank, self.call_seconds()[1])
        np.add.at(busy, flow.folds.rank, self.fold_seconds())
        np.add.at(busy, flow.copies.rank, self.copy_seconds())
        posted = (self.message_bytes() > 0) * rates.message_seconds
        there = np.zeros((flow.num_rounds, num_ranks), bool)
        there[flow.calls.round, flow.calls.rank] = True
        for rank in (flow.messages.src, flow.messages.dst):
            np.add.at(busy, rank, posted)
            there[flow.messages.round, rank] = True
        return np.asarray(busy + there.sum(0)[:, None] * rates.round_seconds)

    def step_seconds(self, attention: Floats) -> Floats:
        """[batches]: a forward pass, of attention [ranks, batches] and each rank's dense work."""
        layout, shape, rates = self._layout, self._shape, self._rates
        tokens = self._rows[self._whole[layout.all_q()]].sum(1) * shape.dense_share(layout)
        weights = shape.dense_flops / 2 * shape.itemsize / rates.memory_bytes
        dense = np.maximum(tokens * shape.dense_flops / rates.dense_flops, weights)
        return np.asarray((shape.num_layers * attention + dense).max(0) + rates.step_seconds)

    def _merge_seconds(self, kind: Index, heads: Index) -> Floats:
        rows, rates = self._rows[kind], self._rates
        state_bytes = rows * heads[:, None] * (self._shape.head_dim + 1) * 4
        return np.asarray(state_bytes / rates.merge_bytes + (rows > 0) * rates.fold_seconds)

    def _attend_seconds(self) -> Floats:
        """[parts, batches]. What a part costs depends on the kind of its queries and on how many keys of each kind it
        meets, which one number stands for: a sum of 64 random bits for each kind.
        """
        parts, keys = self._flow.parts, self._flow.keys
        random = np.random.default_rng(0).integers(1 << 62, size=self._kind.max() + 1)
        met = self._kind[keys.cut, keys.chunk]
        signature = np.zeros(len(parts.q), np.int64)
        np.add.at(signature, keys.part, random[met])
        asked = np.stack([self._whole[parts.q], parts.heads, parts.causal, signature], 1)
        one = np.ascontiguousarray(asked, np.int64).view("V32").ravel()
        _, sample, which = np.unique(one, return_index=True, return_inverse=True)
        place = np.full(len(parts.q), -1)
        place[sample] = np.arange(len(sample))
        mine = place[keys.part] >= 0
        num_keys = np.zeros((len(sample), *self._count.shape), np.int64)
        np.add.at(num_keys, place[keys.part[mine]], self._sequence_rows[met[mine]])
        queries = self._sequence_rows[self._whole[parts.q[sample]]]
        kernel, per_pair = self._rates.kernel, 4 * self._shape.head_dim * parts.heads[sample][:, None, None]
        seconds = per_pair * queries * num_keys / kernel.full_rate(queries, num_keys)
        own = np.flatnonzero(parts.causal[sample])
        pairs = queries[own] * (queries[own] + 1) / 2
        seconds[own] += per_pair[own] * pairs / kernel.causal_rate(queries[own])
        return np.asarray((seconds * self._count).sum(2)[which.ravel()])
