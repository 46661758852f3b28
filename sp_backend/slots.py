"""The partial results that a rank holds during one layer: a slot for each query chunk and range of its heads.

A slot's memory comes from a pool when something is first put there, and returns when the result was sent or given out:
fresh memory would cost a page fault for every few rows. Chunks that one call attends first get memory that lies
together, so that later calls fold into all of it at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sp_backend.buffers import BufferPool, adjacent_rows
from sp_backend.layout import Block, Heads
from sp_backend.schedule import KernelCall
from sp_backend.state import AttentionState

Slot = tuple[int, Heads]  # query chunk, heads


@dataclass(slots=True)
class _Memory:
    buffer: Tensor
    num_slots: int  # in it


class Slots:
    """Empty at first. A block is a state's; its slot may hold more heads."""

    def __init__(self, slots: Mapping[Slot, Heads], rows: Mapping[int, int], head_dim: int, pool: BufferPool) -> None:
        """slots: chunk and heads of a block -> heads of its slot; rows: of each chunk."""
        self._slots, self._rows, self._head_dim, self._pool = slots, rows, head_dim, pool
        self._states: dict[Slot, AttentionState] = {}  # of slots that hold something
        self._memory: dict[Slot, _Memory] = {}

    def attend(self, call: KernelCall, q: Tensor, kv: Tensor) -> None:
        """Run a kernel call and fold what it gives."""
        if (into := self._together(call)) is not None:
            call.attend(q, kv, into)
        elif self._is_first(call):
            state = self._make({self._slot(p.block): p.rows for p in call.qs}, call.num_rows, call.num_heads)
            call.attend(q, kv, state, merge=False)
        else:
            buffer, state = self._take(call.num_rows, call.num_heads)
            call.attend(q, kv, state, merge=False)
            for part in call.qs:
                self.fold(part.block, state.rows(*part.rows).heads(*part.heads))
            self._pool.give(buffer)

    def fold(self, block: Block, state: AttentionState) -> None:
        """Merge a result into its slot."""
        slot = self._slot(block)
        if slot in self._states:
            self._view(block).merge_(state)
        elif slot[1] == block.heads:
            self._make_one(slot).copy_(state)
        else:
            self._make_one(slot).clear_()
            self._view(block).copy_(state)

    def move(self, block: Block, target: AttentionState) -> None:
        """Write a result to `target` and forget it."""
        slot = self._slot(block)
        if slot not in self._states:
            target.clear_()
            return
        target.copy_(self._view(block))
        if slot[1] == block.heads:
            self._free(slot)
        else:
            self._view(block).clear_()

    def finish(self, block: Block, came: AttentionState | None, target: AttentionState) -> None:
        """Move a result, merged with the last that came for all of its heads, if that is given."""
        slot = self._slot(block)
        if came is not None and slot in self._states and slot[1] == block.heads:
            self._states[slot].merge_to(came, target)
            self._free(slot)
            return
        if came is not None:
            self.fold(block, came)
        self.move(block, target)

    def clear(self) -> None:
        for slot in list(self._states):
            self._free(slot)

    def _slot(self, block: Block) -> Slot:
        return block.chunk, self._slots[block.chunk, block.heads]

    def _view(self, block: Block) -> AttentionState:
        chunk, (lo, hi) = self._slot(block)
        state = self._states[chunk, (lo, hi)]
        return state if block.heads == (lo, hi) else state.heads(block.heads[0] - lo, block.heads[1] - lo)

    def _together(self, call: KernelCall) -> AttentionState | None:
        """The slots that a call adds to, as one state, if they hold something and lie together."""
        if call.side_by_side or any(self._slot(part.block) not in self._states for part in call.qs):
            return None
        views = [self._view(part.block) for part in call.qs]
        if len(views) == 1:
            return views[0]
        out, lse = adjacent_rows([view.out for view in views]), adjacent_rows([view.lse for view in views])
        return None if out is None or lse is None else AttentionState(out, lse)

    def _is_first(self, call: KernelCall) -> bool:
        """Whether a call's result is all that its slots will hold."""
        slots = [self._slot(part.block) for part in call.qs]
        exact = all(slot[1] == part.block.heads for slot, part in zip(slots, call.qs, strict=True))
        return exact and not call.side_by_side and not any(slot in self._states for slot in slots)

    def _make_one(self, slot: Slot) -> AttentionState:
        rows = self._rows[slot[0]]
        return self._make({slot: (0, rows)}, rows, slot[1][1] - slot[1][0])

    def _make(self, slots: Mapping[Slot, tuple[int, int]], num_rows: int, num_heads: int) -> AttentionState:
        """Memory for slots, each of some rows of it; not initialised."""
        buffer, state = self._take(num_rows, num_heads)
        memory = _Memory(buffer, len(slots))
        for slot, rows in slots.items():
            self._states[slot] = state if len(slots) == 1 else state.rows(*rows)
            self._memory[slot] = memory
        return state

    def _take(self, num_rows: int, num_heads: int) -> tuple[Tensor, AttentionState]:
        num_lse = num_rows * num_heads
        buffer = self._pool.take(4 * num_lse * (self._head_dim + 1))
        out, lse = buffer.view(torch.float32).tensor_split([num_lse * self._head_dim])
        return buffer, AttentionState(out.view(num_rows, num_heads, self._head_dim), lse.view(num_rows, num_heads))

    def _free(self, slot: Slot) -> None:
        del self._states[slot]
        memory = self._memory.pop(slot)
        memory.num_slots -= 1
        if memory.num_slots == 0:
            self._pool.give(memory.buffer)
