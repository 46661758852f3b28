"""The queries and keys that a rank reads during one layer: its own, those in its pages, and those that came.

What comes is waited for once, at the first use of one of its message's blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sp_backend.buffers import BufferPool, adjacent_rows, join_rows
from sp_backend.counting import Counters
from sp_backend.kv_cache import Rows
from sp_backend.layout import STATE, Block
from sp_backend.messages import Arrival, view_of_rows
from sp_backend.schedule import KernelCall, Slice


class Operands:
    def __init__(
        self, own: dict[Block, Tensor], pages: Tensor | None, *, head_dim: int, dtype: torch.dtype, counters: Counters
    ) -> None:
        """own: blocks that are here from the start. pages: [slots, 2, kv_heads, head_dim]."""
        for block, tensor in own.items():
            assert tensor.dtype == dtype, f"{block} is {tensor.dtype}, not {dtype}"
        self._held, self._pages, self._counters = own, pages, counters
        self._head_dim, self._dtype = head_dim, dtype
        self._arrivals: dict[Block, Arrival] = {}

    def expect(self, block: Block, arrival: Arrival) -> None:
        """The block is in a message that was asked for."""
        self._arrivals[block] = arrival

    def expected(self) -> list[Block]:
        """Blocks that came, or are to come, and were not forgotten."""
        return list(self._arrivals)

    def arrival(self, block: Block) -> Arrival | None:
        """The message of a block; None for those that did not come in one."""
        return self._arrivals.get(block)

    def wait(self, arrival: Arrival) -> Tensor:
        """The message; its blocks can be read from now on."""
        if arrival.data is None:
            arrival.data = self._counters.timed(arrival.receiving.wait)
            for section in arrival.envelope.sections:
                if section.use.block.operand != STATE:
                    rows = view_of_rows(arrival.data, section, self._head_dim, self._dtype)
                    self._held[section.use.block] = rows
        return arrival.data

    def came(self, block: Block) -> Tensor:
        """A block that came, whole."""
        self.wait(self._arrivals[block])
        return self._held[block]

    def forget(self, block: Block) -> None:
        """A block that came will not be read again."""
        del self._arrivals[block]
        self._held.pop(block, None)

    def read(self, part: Slice) -> Tensor:
        """[rows, heads, head_dim] or [rows, 2, kv_heads, head_dim]."""
        if (arrival := self._arrivals.get(part.held)) is not None:
            self.wait(arrival)
        tensor = self._held.get(part.held)
        if tensor is None:
            assert part.pages is not None, f"{part.held} is not there"
            return part.pages.of(self._in_pages(part.heads))
        if part.heads is not None:
            tensor = tensor[..., part.heads[0] : part.heads[1], :]
        if part.rows is not None:
            tensor = join_rows([tensor[lo:hi] for lo, hi in part.rows if hi > lo])
        return tensor

    def copy(self, part: Slice, target: Tensor) -> None:
        """What `read` gives, without a copy in between."""
        if (pages := self.scattered(part)) is not None:
            torch.index_select(self._in_pages(part.heads), 0, pages.index, out=target)
        else:
            target.copy_(self.read(part))

    def scattered(self, part: Slice) -> Rows | None:
        """Pages that do not follow each other, from which it has to be gathered; None: it lies together."""
        return None if part.pages is None or part.pages.contiguous or part.held in self._held else part.pages

    def queries(self, call: KernelCall) -> Tensor:
        """[rows, heads, head_dim] of a call."""
        blocks = [self.read(part.slice) for part in call.qs]
        if all(part.heads == (0, call.num_heads) for part in call.qs):
            return join_rows(blocks)
        q = blocks[0].new_empty(call.num_rows, call.num_heads, self._head_dim)
        for part, block in zip(call.qs, blocks, strict=True):
            q[slice(*part.rows), slice(*part.heads)] = block
        return q

    def keys(self, call: KernelCall, pool: BufferPool, taken: list[Tensor]) -> Tensor:
        """[rows, 2, kv_heads, head_dim] of a call. The buffer that joining takes from the pool is added to `taken`."""
        if call.paged is not None:
            pages = self._in_pages(call.paged.heads)
            return pages if call.paged.rows is None else pages[slice(*call.paged.rows)]
        blocks = [self.read(part) for part in call.kvs]
        if len(blocks) == 1:
            return blocks[0]
        parts = [blocks[i][lo:hi] for i, lo, hi in call.keys]
        joined = adjacent_rows(parts)
        if joined is None:
            shape = sum(len(p) for p in parts), *parts[0].shape[1:]
            buffer = pool.take(math.prod(shape) * parts[0].itemsize)
            taken.append(buffer)
            joined = torch.cat(parts, out=buffer.view(parts[0].dtype).view(shape))
        return joined

    def _in_pages(self, heads: tuple[int, int] | None) -> Tensor:
        assert self._pages is not None, "a schedule with places needs pages"
        return self._pages if heads is None else self._pages[:, :, heads[0] : heads[1]]
