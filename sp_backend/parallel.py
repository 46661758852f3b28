"""Which part of the weights a rank holds, and how the parts' results meet. No collective is made here.

World = tp_size x sp_size; rank = tp_rank * sp_size + sp_rank. In layout "tokens" the SP ranks of one TP rank
hold the same weights (they split tokens); in layout "heads" all ranks split query heads, MLP and vocabulary,
while KV heads are split over TP alone (SP ranks split the KV tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sp_backend.config import LAYOUTS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    tp_rank: int = 0
    tp_size: int = 1
    sp_rank: int = 0
    sp_size: int = 1
    layout: str = "tokens"

    def __post_init__(self) -> None:
        assert self.layout in LAYOUTS, self.layout
        assert 0 <= self.tp_rank < self.tp_size and 0 <= self.sp_rank < self.sp_size, self

    @classmethod
    def of_rank(cls, rank: int, tp_size: int, sp_size: int, layout: str) -> Shard:
        return cls(rank // sp_size, tp_size, rank % sp_size, sp_size, layout)

    @property
    def rank(self) -> int:
        return self.tp_rank * self.sp_size + self.sp_rank

    @property
    def group_rank(self) -> int:
        """This rank's place in the weight-sharding group, the one that `Collectives` works over."""
        return self.rank if self.layout == "heads" else self.tp_rank

    @property
    def group_size(self) -> int:
        return self.tp_size * self.sp_size if self.layout == "heads" else self.tp_size

    def group_ranks(self) -> list[int]:
        """The ranks of the weight-sharding group, in group order."""
        if self.layout == "heads":
            return list(range(self.group_size))
        return [tp_rank * self.sp_size + self.sp_rank for tp_rank in range(self.tp_size)]

    def query_heads(self, num_heads: int) -> range:
        assert num_heads % self.group_size == 0, (num_heads, self)
        return self.split(num_heads)

    def kv_heads(self, num_kv_heads: int) -> range:
        assert num_kv_heads % self.tp_size == 0, (num_kv_heads, self)
        return _piece(num_kv_heads, self.tp_rank, self.tp_size)

    def split(self, size: int) -> range:
        """This rank's part of MLP or vocabulary; parts may differ by one."""
        return _piece(size, self.group_rank, self.group_size)

    def split_sizes(self, size: int) -> list[int]:
        return [len(_piece(size, index, self.group_size)) for index in range(self.group_size)]


def _piece(size: int, index: int, count: int) -> range:
    return range(size * index // count, size * (index + 1) // count)


class Collectives(Protocol):
    """What the ranks that share one set of weights do together, in the same order on each."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the group, in place."""
        ...

    def gather_last(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """The group's tensors joined along the last dim, whose size on each rank is given."""
        ...


class NoCollectives:
    """A group of one."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_last(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        assert list(sizes) == [tensor.shape[-1]], (sizes, tensor.shape)
        return tensor
