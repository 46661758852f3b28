"""Reusable byte buffers, and views that avoid copies. Fresh memory costs page faults, so it is allocated
once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class BufferPool:
    """Holds as many buffers as were ever in use at once, each grown to what it last had to hold."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._free: list[Tensor] = []  # ascending in size

    def take(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, not initialised."""
        for i, buffer in enumerate(self._free):
            if buffer.numel() >= num_bytes:
                return self._free.pop(i)[:num_bytes]
        if self._free:  # the largest is too small: replace it
            self._free.pop()
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def give(self, buffer: Tensor) -> None:
        """Return what take() gave; nobody reads or writes it any more."""
        whole = torch.empty(0, dtype=torch.uint8, device=buffer.device).set_(buffer.untyped_storage())
        self._free.append(whole)
        self._free.sort(key=Tensor.numel)

    @property
    def num_free_bytes(self) -> int:
        return sum(b.numel() for b in self._free)


def as_bytes(tensors: Sequence[Tensor]) -> Tensor | None:
    """One flat uint8 view over tensors that lie one after the other in memory, or None if they do not."""
    end = None
    for t in tensors:
        if not t.is_contiguous() or (end is not None and t.data_ptr() != end):
            return None
        if t.untyped_storage().data_ptr() != tensors[0].untyped_storage().data_ptr():
            return None
        end = t.data_ptr() + t.nbytes
    flat = tensors[0].view(-1).view(torch.uint8)
    return flat.as_strided((sum(t.nbytes for t in tensors),), (1,), flat.storage_offset())


def adjacent_rows(tensors: Sequence[Tensor]) -> Tensor | None:
    """One view over rows that follow each other in memory, or None if they do not."""
    first = tensors[0]
    end = first.storage_offset()
    for t in tensors:
        same = t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or t.stride() != first.stride() or t.storage_offset() != end:
            return None
        end += t.shape[0] * first.stride(0)
    rows = sum(t.shape[0] for t in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def join_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first axis; a view where that is possible."""
    if len(tensors) == 1:
        return tensors[0]
    joined = adjacent_rows(tensors)
    return torch.cat(tuple(tensors)) if joined is None else joined
