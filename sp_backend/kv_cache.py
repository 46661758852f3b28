"""This rank's share of the paged KV cache: one copy of every page, on one SP rank.

A page holds `page_size` consecutive positions of one request (or of the prefix several requests share). Every rank
knows the owner of every page of a request, and the index of those it owns itself, so all of them derive the same
history lengths without asking each other.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class PageTable:
    """Which SP rank owns each page of one request, and where this rank's own pages lie in its cache."""

    def __init__(self, sp_rank: int, page_size: int) -> None:
        self._sp_rank = sp_rank
        self._page_size = page_size
        self._owners = np.empty(0, np.uint8)  # SP rank of page p
        self._slots = np.empty(0, np.int64)  # cache row of every position on this rank, in position order
        self._before = [0]  # own rows before page p
        self._counted: tuple[int, list[int]] = 0, []  # pages, and the rows of so many on each rank

    def append(self, owners: bytes, pages: bytes) -> None:
        """owners: one byte a page; pages: int32 indices of those that this rank owns, in order."""
        if not owners:  # most decode steps
            return
        new = np.frombuffer(owners, np.uint8)
        own = np.frombuffer(pages, "<i4").astype(np.int64)
        assert np.count_nonzero(new == self._sp_rank) == len(own), "one index for each page this rank owns"
        rows = (own[:, None] * self._page_size + np.arange(self._page_size)).ravel()
        self._owners = np.concatenate([self._owners, new])
        self._slots = np.concatenate([self._slots, rows])
        counts = self._before[-1] + np.cumsum(new == self._sp_rank) * self._page_size
        self._before += counts.tolist()

    def history_rows(self, start: int, num_ranks: int) -> list[int]:
        """Cached tokens on each SP rank when the request has `start` of them."""
        num_pages = -(-start // self._page_size)
        assert num_pages <= len(self._owners), "cached tokens without a page"
        if self._counted[0] != num_pages or len(self._counted[1]) != num_ranks:  # not as in most decode steps
            counts = np.bincount(self._owners[:num_pages], minlength=num_ranks) * self._page_size
            self._counted = num_pages, counts.tolist()
        rows = list(self._counted[1])
        if num_pages:
            rows[self._owners[num_pages - 1]] -= num_pages * self._page_size - start
        return rows

    def history_positions(self, start: int, rank: int) -> Ints:
        """Positions of the cached tokens that SP rank `rank` holds, ascending."""
        pages = np.flatnonzero(self._owners[: -(-start // self._page_size)] == rank)
        positions = (pages[:, None] * self._page_size + np.arange(self._page_size)).ravel()
        return positions[positions < start]

    def slots(self, start: int, stop: int) -> Ints:
        """Cache rows of this rank's positions in [start, stop), ascending."""
        return self._slots[self._own_before(start) if start else 0 : self._own_before(stop)]

    def _own_before(self, position: int) -> int:
        """This rank's rows before a position."""
        page, offset = divmod(position, self._page_size)
        rows = self._before[page]
        return rows + offset if offset and self._before[page + 1] > rows else rows


class KVCache:
    """Keys and values of this rank's pages, every layer. rows = num_pages x page_size.

    Storage is allocated once. On a CPU untouched pages cost no physical memory, and the system's pages are huge where a
    process may ask for it (transparent_hugepage `madvise` or `always`).
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_pages * page_size, 2, num_kv_heads, head_dim)
        allocate = _in_huge_pages if device.type == "cpu" else partial(torch.empty, device=device)
        try:
            self._layers = [allocate(shape, dtype=dtype) for _ in range(num_layers)]
        except OSError as error:
            need = num_layers * math.prod(shape) * dtype.itemsize
            raise ValueError(
                f"no memory for a KV cache of {need} bytes: lower --max-total-tokens or --mem-fraction-static ({error})"
            ) from error

    @staticmethod
    def bytes_per_page(*, num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        return num_layers * page_size * 2 * num_kv_heads * head_dim * itemsize

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers)

    def write(self, layer: int, rows: Rows, kv: torch.Tensor) -> None:
        """kv: [len(rows), 2, kv_heads, head_dim]."""
        if rows.contiguous:
            self._layers[layer][rows.low : rows.low + len(rows)] = kv
        else:
            self._layers[layer].index_copy_(0, rows.index, kv)

    def pages(self, layer: int) -> torch.Tensor:
        """[rows, 2, kv_heads, head_dim], to be read."""
        return self._layers[layer]


class Rows:
    """Cache rows of a step, prepared once and used by every layer."""

    def __init__(self, slots: Ints, device: torch.device) -> None:
        self.slots = slots
        self.low = int(slots[0]) if len(slots) else 0
        self.contiguous = bool(np.array_equal(slots, np.arange(self.low, self.low + len(slots))))
        self.index = torch.from_numpy(slots).to(device)  # [rows] int64

    def __len__(self) -> int:
        return len(self.slots)

    def of(self, pages: torch.Tensor) -> torch.Tensor:
        """[len(rows), ...]; a view where the rows lie together, else a copy."""
        if self.contiguous:
            return pages[self.low : self.low + len(self)]
        return pages.index_select(0, self.index)


def _in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Untouched memory. Decode reads every key once: with pages of 4 KiB the CPU waits to look their addresses up."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
