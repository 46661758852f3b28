"""The clocks of all ranks while they run a plan, round by round. Pure: no torch.

A rank waits for what it sends on, posts its messages, computes (waiting for an operand at its first use) and folds. A
message starts when both its ends are posted. Messages of one round that use a resource share it fairly (processor
sharing: with sizes b_j, one of size b is through after sum(min(b_j, b)) bytes); what an earlier round left on a
resource goes first. Where a rank's cores carry its transfers, a transfer of d seconds takes (1 - overlap) x d from its
compute. No clock sees into a round, hence the name of an estimate; simulate.py does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sp_backend.columns import Index
from sp_backend.flow import Flow, Messages
from sp_backend.grouping import bounds, classes, run_starts
from sp_backend.topology import Floats, Rates, Topology
from sp_backend.work import Work


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each batch [batches]: of one layer's attention, unless said otherwise."""

    attention: Floats
    exposed: Floats  # of those, the last rank's waits for others and what transfers took from its compute
    transfer: Floats  # of those, how long messages were on the last rank's links
    step: Floats  # a whole forward pass: all layers, dense work included
    tokens: Floats  # not seconds: those whose dense work the rank with most of it does


@dataclass(frozen=True, slots=True)
class _Groups:
    """Messages of some ranks: those of ranks[i] are messages[starts[i] : starts[i + 1]]."""

    ranks: Index
    messages: Index
    starts: Index

    @classmethod
    def of(cls, ranks: Index, messages: Index) -> _Groups:
        order = np.argsort(ranks, kind="stable")
        starts = run_starts(ranks[order])
        return cls(ranks[order][starts], messages[order], starts)

    def reduce(self, ufunc: np.ufunc, values: Floats) -> Floats:
        """[ranks, batches] of values [messages, batches]"""
        return np.asarray(ufunc.reduceat(values[self.messages], self.starts, axis=0))


class Links:
    """Which messages of a round meet on which resources, as index arrays."""

    def __init__(self, topology: Topology, messages: Messages, num_rounds: int) -> None:
        wires = topology.wires
        self.num_ranks, self.capacity = topology.num_ranks, wires.capacity
        self.latency = wires.latency[messages.src, messages.dst]
        used = wires.uses[messages.src, messages.dst]  # [messages, resources of its link]
        self.at_rank: list[_Groups] = []  # messages that a rank sends or receives
        self.shared: list[list[tuple[Index, Index]]] = []  # (resources, their messages) by number
        self.of_round = [slice(*x) for x in bounds(messages.round, num_rounds)]
        for mine in self.of_round:
            numbers = np.arange(mine.start, mine.stop)
            ranks, both = np.concatenate([messages.src[mine], messages.dst[mine]]), np.concatenate([numbers, numbers])
            self.at_rank.append(_Groups.of(ranks, both))
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
    for number in classes(counts)[0]:
        chosen = starts[counts == number]
        found.append((resource[chosen], message[chosen[:, None] + np.arange(number)]))
    return found


class Clock:
    """Runs all batches through all rounds. Arrays are [ranks, batches] or [messages, batches]."""

    def __init__(self, flow: Flow, links: Links, work: Work, rates: Rates) -> None:
        self._flow, self._links, self._work, self._rates = flow, links, work, rates
        self.message_bytes = self._work.message_bytes()
        self._sent = self.message_bytes > 0
        self._end = np.zeros_like(self.message_bytes)
        self._busy = np.zeros((len(links.capacity), self.message_bytes.shape[1]))  # until when each resource is
        self._now = np.zeros((links.num_ranks, self.message_bytes.shape[1]))
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
        self._messages = bounds(flow.messages.round, number)
        for i in range(number):
            self._round(i)
        last = self._now.argmax(0), np.arange(self._now.shape[1])
        step = self._work.step_seconds(self._now)
        tokens = self._work.dense_tokens().max(0)
        return Times(self._now[last], self._exposed[last], self._transfer[last], step, tokens)

    def _round(self, index: int) -> None:
        flow, waited = self._flow, self._exposed.copy()
        received, ends, calls = self._now.copy(), self._links.at_rank[index], slice(*self._calling[index])
        if len(ends.ranks):
            received[ends.ranks] += ends.reduce(np.add, self._sent.astype(float)) * self._rates.message_seconds
        there = np.zeros(len(received), bool)
        there[ends.ranks] = there[flow.calls.rank[calls]] = True
        received[there] += self._rates.round_seconds
        self._now[:] = received
        mine = slice(*self._waiting[index])
        self._wait(flow.waits.rank[mine], flow.waits.message[mine])
        folds = np.arange(*self._folding[index])
        before = flow.folds.before[folds]
        self._add(flow.folds.rank, self._folds, folds[before])
        self._add(flow.copies.rank, self._copied, np.arange(*self._copying[index]))
        transfer = self._send(index, self._now.copy(), received)
        compute = self._attend(calls)
        self._carry(transfer, compute)
        late = folds[~before]
        self._wait(flow.folds.rank[late], flow.folds.message[late])
        self._add(flow.folds.rank, self._folds, late)
        if index:  # the memory that was sent from is needed again
            sent = np.arange(*self._messages[index - 1])
            self._wait(flow.messages.src[sent], sent)
        self._transfer += transfer
        self.rounds.append((compute, transfer, self._exposed - waited))

    def _carry(self, transfer: Floats, compute: Floats) -> None:
        """What transfers take from the compute of the ranks whose cores carry them."""
        overlap = self._rates.overlap
        if overlap < 1:
            most = compute / overlap - compute if overlap else np.where(compute > 0, transfer, 0.0)
            taken = np.minimum(most, (1 - overlap) * transfer)
            self._now += taken
            self._exposed += taken

    def _wait(self, ranks: Index, messages: Index) -> None:
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
