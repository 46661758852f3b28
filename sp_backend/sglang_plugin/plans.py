"""The plans of one CP group, their executors, and the choice among them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from sp_backend.buffers import BufferPool
from sp_backend.config import AUTO
from sp_backend.cost import PlanCost
from sp_backend.execute import Executor
from sp_backend.geometry import Geometry, predicted_bytes
from sp_backend.kernels import get_kernel
from sp_backend.measure import machine_of
from sp_backend.native import choose_kernel
from sp_backend.plan import Plan
from sp_backend.prune import prune
from sp_backend.schedule import Schedule
from sp_backend.shape import ModelShape
from sp_backend.strategies import plan_for
from sp_backend.transport import Transport
from sp_backend.transport.gather import gather_bytes

logger = logging.getLogger(__name__)

CANDIDATES = ("ring_pass_kv", "ring_pass_kv_both", "all_gather_kv", "token_ring", "ring_pass_q")  # of AUTO

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch's sizes under the plan that runs it: the same in every layer."""

    executor: Executor
    schedule: Schedule
    num_rounds: int  # in which this rank sends or receives
    copy_bytes: int  # that this rank sends in a layer only because every rank keeps all keys


class GroupPlans:
    """All ranks of the group make it together, and prepare the same batches in the same order."""

    def __init__(
        self, strategy: str, transport: Transport, shape: ModelShape, dtype: torch.dtype, scale: float
    ) -> None:
        """shape: heads are those of one rank. Raises RuntimeError if a rank does not answer in time."""
        self.transport, self._shape = transport, shape
        pool, kernel = BufferPool(), get_kernel(choose_kernel()[0])
        self._executors = {
            name: Executor(
                _plan(name, transport.size, shape),
                transport.rank,
                kernel,
                transport,
                head_dim=shape.head_dim,
                dtype=dtype,
                scale=scale,
                pool=pool,
            )
            for name in (CANDIDATES if strategy == AUTO else (strategy,))
        }
        self._needed = {name: without_copies(executor.plan) for name, executor in self._executors.items()}
        self._costs: dict[str, PlanCost] = {}
        if strategy == AUTO:
            machine = machine_of(transport, choose_kernel()[0], shape, dtype)
            self._costs = {name: PlanCost(e.plan, machine, shape) for name, e in self._executors.items()}
        self._prepare = lru_cache(maxsize=32)(self._prepare_rows)

    @property
    def bytes_sent(self) -> int:
        """By this rank, since these were made."""
        return sum(executor.counters.bytes_sent for executor in self._executors.values())

    def prepare(self, geometry: Geometry) -> Prepared:
        """Collective when it meets sizes for the first time, which is on all ranks in the same call."""
        return self._prepare(tuple(map(tuple, geometry.rows)))

    def _prepare_rows(self, rows: Rows) -> Prepared:
        geometry = Geometry(rows)
        name = self._choose(geometry)
        executor = self._executors[name]
        schedule = executor.schedule(geometry)
        return Prepared(
            executor,
            schedule,
            sum(1 for r in schedule.rounds if r.receives or r.sends),
            self._sent(executor.plan, geometry) - self._sent(self._needed[name], geometry),
        )

    def _choose(self, geometry: Geometry) -> str:
        """Rank 0 predicts and tells the others, whose processors might round a near tie the other way."""
        names = list(self._executors)
        if len(names) == 1:
            return names[0]
        chosen = b""
        if self.transport.rank == 0:
            seconds = {name: cost.cost(geometry).seconds for name, cost in self._costs.items()}
            best = min(seconds, key=seconds.__getitem__)
            shown = ", ".join(f"{name} {s * 1e3:.3g} ms" for name, s in seconds.items())
            logger.info("sp_auto: %s; a layer is predicted to take %s", best, shown)
            chosen = bytes([names.index(best)])
        return names[gather_bytes(self.transport, chosen)[0][0]]

    def _sent(self, plan: Plan, geometry: Geometry) -> int:
        """Bytes that this rank sends in a layer."""
        rounds = predicted_bytes(plan, geometry, self._shape.head_dim, self._shape.itemsize)
        return sum(n for links in rounds for (src, _), n in links.items() if src == self.transport.rank)


def _plan(strategy: str, num_ranks: int, shape: ModelShape) -> Plan:
    return plan_for(
        strategy,
        num_ranks=num_ranks,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        kind="zigzag",
        copies=True,
    )


def without_copies(plan: Plan) -> Plan:
    """What of a plan's transfers attention needs: pruned under a layout in which no rank has to keep keys."""
    return prune(replace(plan, layout=replace(plan.layout, history="all")))
