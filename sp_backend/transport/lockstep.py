"""All ranks in one process, stepped by round: what is sent is there once every rank has done the round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import Tensor

from sp_backend.transport import Message, Pending


class LockstepNetwork:
    """The links between `size` ranks. Call `rank(r)` for each rank's end."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent: dict[tuple[int, int], dict[int, Tensor]] = defaultdict(dict)  # link -> message number -> data
        self.num_sent: dict[tuple[int, int], int] = defaultdict(int)
        self.num_received: dict[tuple[int, int], int] = defaultdict(int)

    def rank(self, rank: int) -> LockstepTransport:
        return LockstepTransport(self, rank)

    def assert_idle(self) -> None:
        """Every message sent was received."""
        assert not any(self.sent.values()) and self.num_sent == self.num_received, "messages left on the wire"


class LockstepTransport:
    def __init__(self, network: LockstepNetwork, rank: int) -> None:
        self._network = network
        self.rank = rank
        self.size = network.size

    def exchange(self, receives: Sequence[Message], sends: Iterable[Message]) -> tuple[list[Pending], list[Pending]]:
        network, pending = self._network, list[Pending]()
        for m in receives:
            link = (m.peer, self.rank)
            pending.append(_Receive(network, link, network.num_received[link], m.data))
            network.num_received[link] += 1
        done = list[Pending]()
        for m in sends:
            link = (self.rank, m.peer)
            network.sent[link][network.num_sent[link]] = m.data.clone()
            network.num_sent[link] += 1
            done.append(_Sent())
        return pending, done


class _Receive:
    def __init__(self, network: LockstepNetwork, link: tuple[int, int], number: int, data: Tensor) -> None:
        self._network, self._link, self._number, self._data = network, link, number, data
        self._done = False

    def wait(self) -> None:
        if self._done:
            return
        data = self._network.sent[self._link].pop(self._number, None)
        assert data is not None, f"waiting on link {self._link} for a message not sent yet"
        assert data.shape == self._data.shape, f"link {self._link}: sent {data.shape}, expected {self._data.shape}"
        self._data.copy_(data)
        self._done = True


class _Sent:
    def wait(self) -> None:
        return
