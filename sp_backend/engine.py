"""What is made once for a process group and used by every call over it: connections, proved plans, worked-out sizes.

Ranks that call with different arguments would wait for messages that never come, so they compare digests of their
arguments whenever a rank meets a batch's sizes for the first time, which is on all ranks in the same call.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sp_backend.buffers import BufferPool
from sp_backend.config import AUTO
from sp_backend.counting import Counters
from sp_backend.execute import Executor
from sp_backend.geometry import Geometry
from sp_backend.kernels import get_kernel
from sp_backend.layout import Kind
from sp_backend.measure import machine_of
from sp_backend.native import choose_kernel
from sp_backend.planner import Planner
from sp_backend.schedule import Schedule
from sp_backend.shape import ModelShape
from sp_backend.shards import cut
from sp_backend.state import AttentionState
from sp_backend.strategies import STRATEGIES, Variant, plan_for, variants
from sp_backend.transport import Transport
from sp_backend.transport.gather import gather_bytes
from sp_backend.transport.gloo import GlooTransport, ProcessGroup, process_group
from sp_backend.transport.shared_memory import shared_memory

logger = logging.getLogger(__name__)

Lengths = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """What a plan and its executor are made for."""

    strategy: Variant
    layout: Kind
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    causal: bool
    scale: float | None


class Batch(NamedTuple):
    """A batch's sizes, worked out: run it once a layer."""

    executor: Executor
    schedule: Schedule
    chunks: dict[int, slice]
    by_chunk: Tensor | None

    def run(self, q: Tensor, k: Tensor, v: Tensor, history: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """out [rows, heads, head_dim] in q's dtype and lse [rows, heads] fp32, of packed rows, in their order.

        history: this rank's cached keys and values, [rows, kv_heads, head_dim] each.
        """
        if self.by_chunk is not None:
            q, k, v = (x.index_select(0, self.by_chunk) for x in (q, k, v))
        q, kv = q.contiguous(), torch.stack((k, v), 1)
        held = {chunk: kv[rows] for chunk, rows in self.chunks.items()}
        if history is not None:
            layout, rank = self.executor.plan.layout, self.executor.rank
            held[layout.history_of(rank)] = torch.stack(history, 1)
        state = AttentionState(torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32))
        results = {c: state.rows(rows.start, rows.stop) for c, rows in self.chunks.items()}
        self.executor.run(self.schedule, {c: q[rows] for c, rows in self.chunks.items()}, held, results=results)
        if self.by_chunk is None:
            return state.out, state.lse
        out, lse = torch.empty_like(state.out), torch.empty_like(state.lse)
        out[self.by_chunk], lse[self.by_chunk] = state.out, state.lse
        return out, lse


class Engine:
    """One group: this rank's connections, and what earlier calls have made."""

    def __init__(self, group: ProcessGroup) -> None:
        gloo = GlooTransport.over(group)
        self.transport: Transport = shared_memory(gloo, gloo.timeout) or gloo
        self.kernel, why = choose_kernel()
        logger.info("attention kernel: %s (%s)", self.kernel, why)
        self._pool = BufferPool()
        self._executors: dict[Problem, Executor] = {}
        self._planners: dict[Problem, Planner | None] = {}
        self.prepare = lru_cache(maxsize=32)(self._prepare)  # equal on all ranks, as their calls are

    def counters(self) -> Counters:
        parts = [executor.counters for executor in self._executors.values()]
        return Counters(*(sum(getattr(part, f.name) for part in parts) for f in fields(Counters)))

    def _prepare(self, problem: Problem, lengths: Lengths, cached: tuple[Lengths, ...]) -> Batch:
        rank, size = self.transport.rank, self.transport.size
        arguments = {f.name: getattr(problem, f.name) for f in fields(Problem)}
        agree(self.transport, arguments | {"lengths": lengths, "history's lengths": cached})
        if problem.strategy.strategy == AUTO:
            problem = replace(problem, strategy=self._choose(problem, lengths, cached))
        if problem not in self._executors:
            self._executors[problem] = self._executor(problem)
        executor, shards = self._executors[problem], cut(problem.layout, size, lengths)
        geometry = Geometry([(*new, *old) for new, old in zip(shards.rows, cached, strict=True)])
        return Batch(executor, executor.schedule(geometry), shards.chunks(rank), shards.by_chunk(rank))

    def _choose(self, problem: Problem, lengths: Lengths, cached: tuple[Lengths, ...]) -> Variant:
        """Rank 0 predicts and tells the others, whose processors might round a near tie the other way."""
        size = self.transport.size
        if problem.strategy.options.given():
            raise ValueError("options: strategy 'auto' chooses them; name the strategy that is to take them")
        candidates = [v for v in variants(size, problem.num_heads) if v.degree is None]
        if size == 1:
            return candidates[0]
        planner = self._planner(replace(problem, scale=None), candidates)
        chosen = b""
        if planner is not None:
            batch = [(new, sum(old)) for new, old in zip(lengths, cached, strict=True)]
            choice = planner.choose(batch, degree=size)
            logger.debug("%d tokens: %s", sum(lengths), choice.reason)
            chosen = bytes([candidates.index(choice.variant)])
        return candidates[gather_bytes(self.transport, chosen)[0][0]]

    def _planner(self, problem: Problem, candidates: Sequence[Variant]) -> Planner | None:
        """Rank 0's; all ranks measure."""
        if problem not in self._planners:
            shape = ModelShape(
                num_heads=problem.num_heads,
                num_kv_heads=problem.num_kv_heads,
                head_dim=problem.head_dim,
                itemsize=problem.dtype.itemsize,
            )
            machine = machine_of(self.transport, self.kernel, shape, problem.dtype)
            self._planners[problem] = None
            if self.transport.rank == 0:
                self._planners[problem] = Planner(
                    machine,
                    shape,
                    self.transport.size,
                    kind=problem.layout,
                    causal=problem.causal,
                    page_size=1,
                    candidates=candidates,
                )
        return self._planners[problem]

    def _executor(self, problem: Problem) -> Executor:
        name = problem.strategy.strategy
        known = [name for name, strategy in STRATEGIES.items() if strategy.layout == "tokens"]
        if name not in known:
            raise ValueError(f"strategy is {name!r}: choose one of {', '.join([AUTO, *known])}")
        plan = plan_for(
            problem.strategy,
            num_ranks=self.transport.size,
            num_heads=problem.num_heads,
            num_kv_heads=problem.num_kv_heads,
            causal=problem.causal,
            kind=problem.layout,
        )
        return Executor(
            plan,
            self.transport.rank,
            get_kernel(self.kernel),
            self.transport,
            head_dim=problem.head_dim,
            dtype=problem.dtype,
            scale=problem.scale,
            pool=self._pool,
        )


_ENGINES: WeakKeyDictionary[ProcessGroup, Engine] = WeakKeyDictionary()


def engine_of(group: ProcessGroup | None) -> Engine:
    """Made, by all ranks of the group, at the first call. Raises ValueError if this rank is in no group."""
    group = process_group(group)
    if group not in _ENGINES:
        _ENGINES[group] = Engine(group)
    return _ENGINES[group]


def agree(transport: Transport, arguments: Mapping[str, object]) -> None:
    """Raise ValueError, on every rank, if one's arguments differ from another's."""
    mine = [hashlib.sha256(repr(value).encode()).digest() for value in arguments.values()]
    for rank, theirs in enumerate(gather_bytes(transport, b"".join(mine))):
        for i, (name, digest) in enumerate(zip(arguments, mine, strict=True)):
            if theirs[i * len(digest) : (i + 1) * len(digest)] != digest:
                raise ValueError(f"{name}: ranks {transport.rank} and {rank} differ; all must pass the same")
