"""A partial attention result, mergeable with others over disjoint keys in any order.

lse is the natural log of the sum of exponentials of a row's scores; -inf says that no key has been seen, and
such a row's out is 0. Merging shifts by the larger lse and never makes a NaN, whichever side is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sp_backend import native

_PART = 1 << 18  # numbers of out merged at a time


@dataclass(frozen=True, slots=True)
class AttentionState:
    out: Tensor  # [rows, heads, head_dim] fp32
    lse: Tensor  # [rows, heads] fp32

    @classmethod
    def empty(cls, rows: int, heads: int, head_dim: int, device: torch.device | str = "cpu") -> AttentionState:
        out = torch.zeros(rows, heads, head_dim, dtype=torch.float32, device=device)
        return cls(out, torch.full((rows, heads), -torch.inf, dtype=torch.float32, device=device))

    def merge(self, other: AttentionState) -> AttentionState:
        return AttentionState(self.out.clone(), self.lse.clone()).merge_(other)

    def merge_(self, other: AttentionState) -> AttentionState:
        """Merge `other`, whose out may be in a lower precision, into this state's own memory."""
        return self.merge_to(other, self)

    def merge_to(self, other: AttentionState, target: AttentionState) -> AttentionState:
        """Write this state merged with `other` to `target`, which may be this one. The outs of all three may be in a
        lower precision.
        """
        states = self, other, target
        if all(state.is_fused for state in states):
            torch.ops.sp_serve.merge_states(*(tensor for state in states for tensor in (state.out, state.lse)))
            return target
        return self._merge_in_steps(other, target)

    def _merge_in_steps(self, other: AttentionState, target: AttentionState) -> AttentionState:
        """A part at a time: what is made in between stays in the cache."""
        top = torch.maximum(self.lse, other.lse)
        shift = top.masked_fill(top == -torch.inf, 0.0)
        theirs = torch.exp(other.lse - shift)
        total = torch.exp(self.lse - shift).add_(theirs)  # in [1, 2], or 0 where both are empty
        target.lse.copy_(total.log().add_(shift))
        dtype = torch.promote_types(self.out.dtype, total.dtype)
        share = theirs.div_(total.clamp_(min=1.0)).unsqueeze(-1).to(dtype)
        rows = max(1, _PART // max(1, self.out[:1].numel()))
        for first in range(0, len(self.out), rows):
            part = slice(first, first + rows)
            mine, came = self.out[part].to(dtype), other.out[part].to(dtype)
            if target is self and mine.dtype == self.out.dtype:
                mine.lerp_(came, share[part])
            else:
                target.out[part] = torch.lerp(mine, came, share[part])
        return target

    @property
    def is_fused(self) -> bool:
        """Whether native code merges such states, in one pass."""
        known = self.out.dtype in (torch.float32, torch.bfloat16) and self.lse.dtype == torch.float32
        return known and self.out.device.type == "cpu" and self.out.stride(2) == 1 and _native()

    def copy_(self, other: AttentionState) -> AttentionState:
        """Overwrite this state's own memory, in its own precision."""
        self.out.copy_(other.out)
        self.lse.copy_(other.lse)
        return self

    def clear_(self) -> AttentionState:
        """Forget all keys."""
        self.out.zero_()
        self.lse.fill_(-torch.inf)
        return self

    def heads(self, first: int, last: int) -> AttentionState:
        """A view of a range of heads."""
        return AttentionState(self.out[:, first:last], self.lse[:, first:last])

    def rows(self, first: int, last: int) -> AttentionState:
        """A view of a range of rows."""
        return AttentionState(self.out[first:last], self.lse[first:last])


@cache
def _native() -> bool:
    try:
        native.load("passes")
    except native.Unavailable:  # said where the model's passes are looked for
        return False
    return True
