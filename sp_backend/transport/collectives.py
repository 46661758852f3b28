"""Collectives of the weight-sharding group over torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class GroupCollectives:
    """Over a process group whose ranks are in the order of `Shard.group_ranks`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def all_reduce(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather_last(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """Pads to the largest piece: all_gather needs equal shapes."""
        padded = tensor.new_zeros(*tensor.shape[:-1], max(sizes))
        padded[..., : tensor.shape[-1]] = tensor
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded, group=self._group)
        return torch.cat([piece[..., :size] for piece, size in zip(pieces, sizes, strict=True)], dim=-1)
