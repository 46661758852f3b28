"""All ranks in one process, stepped by round: what is sent is there once every rank has done the round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sp_backend.transport import Expected, Message, Receiving, Sending


class LockstepNetwork:
    """The links between `size` ranks. Call `rank(r)` for each rank's end."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent: dict[tuple[int, int], dict[int, Tensor]] = defaultdict(dict)  # link -> message number -> data
        self.num_sent: dict[tuple[int, int], int] = defaultdict(int)
        self.num_received: dict[tuple[int, int], int] = defaultdict(int)
        self.num_unreleased = 0

    def rank(self, rank: int) -> LockstepTransport:
        return LockstepTransport(self, rank)

    def assert_idle(self) -> None:
        """Every message sent was received, and is no longer read."""
        assert not any(self.sent.values()) and self.num_sent == self.num_received, "messages left on the wire"
        assert not self.num_unreleased, f"{self.num_unreleased} messages were not released"


class LockstepTransport:
    name = "lockstep"

    def __init__(self, network: LockstepNetwork, rank: int) -> None:
        self._network = network
        self.rank = rank
        self.size = network.size

    def take(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def exchange(self, receives: Sequence[Expected], sends: Iterable[Message]) -> tuple[list[Receiving], list[Sending]]:
        network, pending = self._network, list[Receiving]()
        for e in receives:
            link = (e.peer, self.rank)
            pending.append(_Receive(network, link, network.num_received[link], e.num_bytes))
            network.num_received[link] += 1
        done = list[Sending]()
        for m in sends:
            link = (self.rank, m.peer)
            network.sent[link][network.num_sent[link]] = m.data.clone()
            network.num_sent[link] += 1
            done.append(_Sent())
        return pending, done


class _Receive:
    def __init__(self, network: LockstepNetwork, link: tuple[int, int], number: int, num_bytes: int) -> None:
        self._network, self._link, self._number, self._num_bytes = network, link, number, num_bytes
        self._data: Tensor | None = None
        network.num_unreleased += 1

    def wait(self) -> Tensor:
        if self._data is None:
            self._data = self._network.sent[self._link].pop(self._number, None)
            assert self._data is not None, f"waiting on link {self._link} for a message not sent yet"
            came = self._data.numel()
            assert came == self._num_bytes, f"link {self._link}: sent {came} bytes, expected {self._num_bytes}"
        return self._data

    def release(self) -> None:
        """Who reads it afterwards reads zeros."""
        assert self._data is not None, "released before it was waited for"
        self._data.zero_()
        self._network.num_unreleased -= 1


class _Sent:
    def wait(self) -> None:
        return
