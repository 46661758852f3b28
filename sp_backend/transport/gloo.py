"""CPU ranks over torch.distributed's gloo backend (TCP).

One gloo process group uses the connection of a pair of ranks in one direction at a time, so messages to
higher and to lower ranks go through a group each: full duplex. Waiting twice for a gloo receive hangs, so
each is waited for once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch.distributed as dist

from sp_backend.transport import Message, Pending


def sp_groups(world_size: int, sp_size: int) -> list[list[int]]:
    """The world's SP groups: runs of neighbouring ranks."""
    if sp_size < 1 or world_size % sp_size:
        raise ValueError(f"{world_size} ranks cannot be divided into groups of {sp_size}")
    return [list(range(first, first + sp_size)) for first in range(0, world_size, sp_size)]


class GlooTransport:
    """One rank's end of an SP group. Both process groups hold exactly that group's ranks, in order."""

    def __init__(self, upward: dist.ProcessGroup, downward: dist.ProcessGroup, timeout: float) -> None:
        self._upward, self._downward = upward, downward
        self._timeout = timedelta(seconds=timeout)
        self.rank = dist.get_rank(upward)
        self.size = dist.get_world_size(upward)

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

    def exchange(self, receives: Sequence[Message], sends: Iterable[Message]) -> tuple[list[Pending], list[Pending]]:
        receiving: list[Pending] = [
            _GlooPending(
                dist.irecv(m.data, group=self._group(m.peer, self.rank), group_src=m.peer),
                f"rank {self.rank}: nothing came from rank {m.peer}",
                self._timeout,
            )
            for m in receives
        ]
        sending: list[Pending] = [
            _GlooPending(
                dist.isend(m.data, group=self._group(self.rank, m.peer), group_dst=m.peer),
                f"rank {self.rank}: rank {m.peer} took nothing",
                self._timeout,
            )
            for m in sends
        ]
        return receiving, sending

    def _group(self, src: int, dst: int) -> dist.ProcessGroup:
        return self._upward if src < dst else self._downward


class _GlooPending:
    def __init__(self, work: dist.Work | None, failure: str, timeout: timedelta) -> None:
        assert work is not None, "a message to a rank outside the group"
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
