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
from torch.distributed import ProcessGroup as ProcessGroup

from sp_backend.transport import Message, Pending


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

    def __init__(self, upward: ProcessGroup, downward: ProcessGroup, timeout: float) -> None:
        self._upward, self._downward = upward, downward
        self._timeout = timedelta(seconds=timeout)
        self.rank = upward.rank()
        self.size = upward.size()

    @classmethod
    def create(cls, world_size: int, sp_size: int, my_rank: int, timeout: float) -> GlooTransport:
        """Build the groups of all SP groups (every rank of the world must call this) and return my end."""
        mine: GlooTransport | None = None
        for ranks in sp_groups(world_size, sp_size):
            up, down = (dist.new_group(ranks, backend="gloo", timeout=timedelta(seconds=timeout)) for _ in range(2))
            if my_rank in ranks:
                mine = cls(up, down, timeout)
        assert mine is not None, f"rank {my_rank} is outside the world of {world_size}"
        return mine

    @classmethod
    def over(cls, group: ProcessGroup) -> GlooTransport:
        """My end of a process group of any backend, with its ranks, their order and its world's time limit.

        The group's ranks, and no others, must call this, which is why `new_group` will not do: it wants every rank of
        the world, or else equal numbers of groups on all ranks of this one.
        """
        store: Any = dist.distributed_c10d._get_default_store()  # Any: its stub lacks the time limit
        name = f"sp_backend/{group.group_name}"
        use = (store.add(f"{name}/uses", 1) - 1) // group.size()  # a name is good for one meeting
        up, down = (_gloo_group(f"{name}/{use}/{way}", store, group.rank(), group.size()) for way in ("up", "down"))
        return cls(up, down, store.timeout.total_seconds())

    def exchange(self, receives: Sequence[Message], sends: Iterable[Message]) -> tuple[list[Pending], list[Pending]]:
        receiving: list[Pending] = [
            _GlooPending(
                self._group(m.peer, self.rank).recv([m.data], m.peer, 0),
                f"rank {self.rank}: nothing came from rank {m.peer}",
                self._timeout,
            )
            for m in receives
        ]
        sending: list[Pending] = [
            _GlooPending(
                self._group(self.rank, m.peer).send([m.data], m.peer, 0),
                f"rank {self.rank}: rank {m.peer} took nothing",
                self._timeout,
            )
            for m in sends
        ]
        return receiving, sending

    def _group(self, src: int, dst: int) -> ProcessGroup:
        return self._upward if src < dst else self._downward


def _gloo_group(name: str, store: Any, rank: int, size: int) -> ProcessGroup:
    """A process group that meets under a name in the store."""
    meeting = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    group = ProcessGroup(meeting, rank, size)
    backend = dist.ProcessGroupGloo(meeting, rank, size, store.timeout)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, backend)
    return group


class _GlooPending:
    def __init__(self, work: dist.Work, failure: str, timeout: timedelta) -> None:
        self._work: dist.Work | None = work
        self._failure, self._timeout = failure, timeout

    def wait(self) -> None:
        work, self._work = self._work, None
        if work is None:
            return
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise RuntimeError(f"{self._failure} (time limit {self._timeout.total_seconds():g} s): {error}") from error
