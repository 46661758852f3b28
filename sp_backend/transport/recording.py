"""Wraps a transport and counts the bytes it sends to each peer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from sp_backend.transport import Expected, Message, Receiving, Sending, Transport


class RecordingTransport:
    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.name = inner.name
        self.rank = inner.rank
        self.size = inner.size
        self.bytes: Counter[tuple[int, int]] = Counter()  # (src, dst) -> bytes sent

    def take(self, num_bytes: int) -> Tensor:
        return self._inner.take(num_bytes)

    def exchange(self, receives: Sequence[Expected], sends: Iterable[Message]) -> tuple[list[Receiving], list[Sending]]:
        return self._inner.exchange(receives, self._counted(sends))

    def _counted(self, sends: Iterable[Message]) -> Iterator[Message]:
        for m in sends:
            self.bytes[self.rank, m.peer] += m.data.nbytes
            yield m
