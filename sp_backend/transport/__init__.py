"""How bytes get from rank to rank: one method, so that a new transport is one small class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Message:
    """peer: the other end, as a rank of this transport. data: contiguous uint8, never empty."""

    peer: int
    data: Tensor  # [bytes] uint8


class Pending(Protocol):
    def wait(self) -> None:
        """Return once the data is there (receive) or may be overwritten (send). Later calls do nothing."""


class Transport(Protocol):
    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def exchange(self, receives: Sequence[Message], sends: Iterable[Message]) -> tuple[list[Pending], list[Pending]]:
        """Post all receives, then draw and post the sends one by one: drawing one may wait for its data.

        On every link, messages arrive in the order in which they were posted.
        """
