"""Predicted time and bytes of a plan on a machine. Pure: no torch.

flow.py says what ranks do, work.py what each of it takes, clock.py when it is done. Everything is computed for many
batches at once (the last axis of every array), so that a planner's table is cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sp_backend.clock import Clock, Links, Times
from sp_backend.flow import flow_of
from sp_backend.geometry import Geometry
from sp_backend.plan import Plan
from sp_backend.shape import ModelShape, Sizes
from sp_backend.topology import Floats, Machine
from sp_backend.work import Work


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
        self._flow = flow_of(plan)

    def on(self, machine: Machine) -> PlanCost:
        """The same plan on a machine of as many ranks, its structure as worked out before."""
        assert machine.num_ranks == self.machine.num_ranks
        other = copy(self)
        other.machine = machine
        vars(other).pop("_links", None)
        return other

    @cached_property
    def _links(self) -> Links:
        return Links(self.machine.topology, self._flow.messages, self._flow.num_rounds)

    def least_seconds(self, sizes: Sizes) -> tuple[float, float]:
        """One layer's attention and a whole step if no rank ever waited, of the batch that takes longest so: quicker to
        tell than what they cost.
        """
        work = self._work(sizes)
        busy = work.busy_seconds(self.machine.num_ranks)
        return float(busy.max()), float(work.step_seconds(busy).max())

    def times(self, sizes: Sizes) -> Times:
        return self._clock(sizes).run()

    def _work(self, sizes: Sizes) -> Work:
        return Work(self.plan.layout, self._flow, self.shape, self.machine.rates, sizes)

    def _clock(self, sizes: Sizes) -> Clock:
        return Clock(self._flow, self._links, self._work(sizes), self.machine.rates)

    def cost(self, geometry: Geometry) -> Cost:
        clock = self._clock(Sizes.of(geometry))
        times = clock.run()
        exposed = float(times.exposed[0])
        links, resources = self._bytes(clock.message_bytes[:, 0])
        return Cost(
            seconds=float(times.attention[0]),
            exposed=exposed,
            hidden=max(0.0, float(times.transfer[0]) - exposed),
            step_seconds=float(times.step[0]),
            rounds=tuple(RoundCost(*(float(x.max()) for x in r)) for r in clock.rounds),
            link_bytes=links,
            resource_bytes=resources,
        )

    def _bytes(self, of_messages: Floats) -> tuple[dict[tuple[int, int], int], dict[str, int]]:
        """Through each link and each resource that anything goes through."""
        messages, ranks, wires = self._flow.messages, self.machine.num_ranks, self.machine.topology.wires
        sent = np.bincount(messages.src * ranks + messages.dst, of_messages, ranks * ranks)
        links = {divmod(pair, ranks): int(sent[pair]) for pair in np.flatnonzero(sent).tolist()}
        through = wires.uses.reshape(ranks * ranks, -1)
        pair, place = np.nonzero(through >= 0)
        carried = np.bincount(through[pair, place], sent[pair], len(wires.capacity))
        names = zip(self.machine.topology.resources, carried.astype(int).tolist(), strict=True)
        return links, {name: n for name, n in names if n}
