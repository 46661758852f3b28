"""CPU ranks over torch.distributed's gloo backend (TCP).

One gloo process group uses the connection of a pair of ranks in one direction at a time, so messages to
higher and to lower ranks go through a group each: full duplex. Waiting twice for a gloo receive hangs, so
each is waited for once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup as ProcessGroup

from sp_backend.buffers import BufferPool
from sp_backend.transport import Expected, Message, Receiving, Sending


def process_group(group: ProcessGroup | None) -> ProcessGroup:
    """The group itself, or the default one. Raises ValueError if this rank is in none."""
    if not dist.is_initialized():
        raise ValueError("group: call torch.distributed.init_process_group first, and start ranks with torchrun")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, ProcessGroup):
        raise ValueError(f"group is {group!r}: give a ProcessGroup that this rank is in, or None for the default one")
    return group


def sp_groups(world_size: int, sp_size: int) -> list[list[int]]:
    """The world's SP groups: runs of neighbouring ranks."""
    if sp_size < 1 or world_size % sp_size:
        raise ValueError(f"{world_size} ranks cannot be divided into groups of {sp_size}")
    return [list(range(first, first + sp_size)) for first in range(0, world_size, sp_size)]


class GlooTransport:
    """One rank's end of an SP group. Both process groups hold exactly that group's ranks, in order."""

    name = "gloo"

    def __init__(self, upward: ProcessGroup, downward: ProcessGroup, timeout: float) -> None:
        """timeout: seconds that a rank waits for another."""
        self._upward, self._downward = upward, downward
        self.timeout = timeout
        self.pool = BufferPool()
        self._taken: dict[int, Tensor] = {}  # by address: to be sent
        self.rank = upward.rank()
        self.size = upward.size()

    @classmethod
    def create(cls, world_size: int, sp_size: int, my_rank: int, timeout: float) -> GlooTransport:
        """My end of this rank's SP group of the default group's ranks; all of its ranks must call this."""
        ranks = next(ranks for ranks in sp_groups(world_size, sp_size) if my_rank in ranks)
        return cls._meet(f"ranks {ranks[0]} to {ranks[-1]}", ranks.index(my_rank), sp_size, timeout)

    @classmethod
    def over(cls, group: ProcessGroup) -> GlooTransport:
        """My end of a process group of any backend, with its ranks, their order and its world's time limit.

        All of the group's ranks must call this, and no others.
        """
        timeout = dist.distributed_c10d._get_default_store().timeout.total_seconds()  # type: ignore[attr-defined]
        return cls._meet(group.group_name, group.rank(), group.size(), timeout)

    @classmethod
    def _meet(cls, name: str, rank: int, size: int, timeout: float) -> GlooTransport:
        """Not with `new_group`, which wants every rank of the world, or else equal numbers of groups on all ranks of
        this one, and which keeps what it makes: a gloo group's thread wakes a hundred times a second.
        """
        store: Any = dist.distributed_c10d._get_default_store()
        use = (store.add(f"sp_backend/{name}/uses", 1) - 1) // size  # a name is good for one meeting
        up, down = (_gloo_group(f"sp_backend/{name}/{use}/{way}", store, rank, size, timeout) for way in ("up", "down"))
        return cls(up, down, timeout)

    def take(self, num_bytes: int) -> Tensor:
        buffer = self.pool.take(num_bytes)
        self._taken[buffer.data_ptr()] = buffer
        return buffer

    def exchange(self, receives: Sequence[Expected], sends: Iterable[Message]) -> tuple[list[Receiving], list[Sending]]:
        return [self._receive(e) for e in receives], [self._send(m) for m in sends]

    def _receive(self, e: Expected) -> Receiving:
        buffer = self.pool.take(e.num_bytes)
        work = self._group(e.peer, self.rank).recv([buffer], e.peer, 0)
        return _Receive(self.pool, buffer, work, f"rank {self.rank}: nothing came from rank {e.peer}", self.timeout)

    def _send(self, m: Message) -> Sending:
        buffer = self._taken.pop(m.data.data_ptr(), None)
        work = self._group(self.rank, m.peer).send([m.data], m.peer, 0)
        return _Send(self.pool, buffer, work, f"rank {self.rank}: rank {m.peer} took nothing", self.timeout)

    def _group(self, src: int, dst: int) -> ProcessGroup:
        return self._upward if src < dst else self._downward


def _gloo_group(name: str, store: Any, rank: int, size: int, timeout: float) -> ProcessGroup:
    """A process group that meets under a name in the store, and ends with its last reference."""
    meeting = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    group = ProcessGroup(meeting, rank, size)
    backend = dist.ProcessGroupGloo(meeting, rank, size, timedelta(seconds=timeout))
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, backend)
    return group


class _Receive:
    def __init__(self, pool: BufferPool, buffer: Tensor, work: dist.Work, failure: str, timeout: float) -> None:
        self._pool, self._buffer, self._timeout, self._failure = pool, buffer, timeout, failure
        self._work: dist.Work | None = work

    def wait(self) -> Tensor:
        work, self._work = self._work, None
        if work is not None:
            _wait(work, self._failure, self._timeout)
        return self._buffer

    def release(self) -> None:
        assert self._work is None, "released before it was waited for"
        self._pool.give(self._buffer)


class _Send:
    def __init__(self, pool: BufferPool, buffer: Tensor | None, work: dist.Work, failure: str, timeout: float) -> None:
        """buffer: the pool's, if that is what is sent."""
        self._pool, self._buffer, self._timeout, self._failure = pool, buffer, timeout, failure
        self._work: dist.Work | None = work

    def wait(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            _wait(work, self._failure, self._timeout)
            if self._buffer is not None:
                self._pool.give(self._buffer)


def _wait(work: dist.Work, failure: str, timeout: float) -> None:
    try:
        work.wait(timedelta(seconds=timeout))
    except RuntimeError as error:
        raise RuntimeError(f"{failure} (time limit {timeout:g} s): {error}") from error
