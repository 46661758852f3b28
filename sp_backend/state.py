"""A partial attention result, mergeable with others over disjoint keys in any order.

lse is the natural log of the sum of exponentials of a row's scores; -inf says that no key has been seen, and
such a row's out is 0. Merging shifts by the larger lse and never makes a NaN, whichever side is empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        top = torch.maximum(self.lse, other.lse)
        shift = top.masked_fill(top == -torch.inf, 0.0)
        theirs = torch.exp(other.lse - shift)
        total = torch.exp(self.lse - shift).add_(theirs)  # in [1, 2], or 0 where both are empty
        self.lse.copy_(total.log().add_(shift))
        share = theirs.div_(total.clamp_(min=1.0))
        self.out.lerp_(other.out.to(self.out.dtype), share.unsqueeze(-1))
        return self

    def heads(self, first: int, last: int) -> AttentionState:
        """A view of a range of heads."""
        return AttentionState(self.out[:, first:last], self.lse[:, first:last])

    def rows(self, first: int, last: int) -> AttentionState:
        """A view of a range of rows."""
        return AttentionState(self.out[first:last], self.lse[first:last])
