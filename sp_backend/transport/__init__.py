"""How bytes get from rank to rank: few methods, so that a new transport is one small class."""

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


@dataclass(frozen=True, slots=True)
class Expected:
    """A message to come, of a size that both ends know."""

    peer: int
    num_bytes: int


class Receiving(Protocol):
    def wait(self) -> Tensor:
        """The message, [bytes] uint8, to be read until it is released. Later calls give the same."""

    def release(self) -> None:
        """It was waited for and will not be read again. Call it once."""


class Sending(Protocol):
    def wait(self) -> None:
        """Return once the data may be overwritten. Later calls do nothing."""


class Transport(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def take(self, num_bytes: int) -> Tensor:
        """[bytes] uint8, not initialised, to be written and sent once; it is the transport's again when it has left.

        Other memory can be sent too, but may be copied.
        """

    def exchange(self, receives: Sequence[Expected], sends: Iterable[Message]) -> tuple[list[Receiving], list[Sending]]:
        """Post all receives, then draw and post the sends one by one: drawing one may wait for its data.

        On every link, messages arrive in the order in which they were posted.
        """
