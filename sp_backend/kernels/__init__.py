"""Attention kernels: what one is asked, what it returns, and the table of those there are.

A kernel is called twice: with a `Work` once per step, for what does not change from layer to layer, and the
function it returns with each layer's tensors. Queries and keys of all sequences are concatenated; spans say
who meets whom. Rows in no span, and rows whose keys are all masked, give out 0 and lse -inf, and leave a state
that they are folded into as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple, Protocol, cast

from torch import Tensor

from sp_backend.state import AttentionState


class Span(NamedTuple):
    """Rows [q_lo, q_hi) of q meet keys [k_lo, k_hi). No two spans of a Work share a query row."""

    q_lo: int
    q_hi: int
    k_lo: int
    k_hi: int


class HeadRun(NamedTuple):
    """Query heads [q_lo, q_hi) read KV heads [k_lo, k_hi), an equal number each."""

    q_lo: int
    q_hi: int
    k_lo: int
    k_hi: int


@dataclass(frozen=True, slots=True)
class HeadMap:
    """Query heads [first, last) of the model, `group` of which share a KV head. The kv tensor holds just
    those read.
    """

    first: int
    last: int
    group: int

    @property
    def num_heads(self) -> int:
        return self.last - self.first

    def kv_index(self) -> list[int]:
        """The KV head, within the kv tensor, that each query head reads."""
        return [h // self.group - self.first // self.group for h in range(self.first, self.last)]

    def runs(self) -> list[HeadRun]:
        """The fewest uniform runs: one, unless the range cuts a group."""
        index = self.kv_index()
        sizes = [index.count(k) for k in range(index[-1] + 1)]
        runs: list[HeadRun] = []
        q = 0
        for k, size in enumerate(sizes):
            last = runs[-1] if runs else None
            if last and size * (last.k_hi - last.k_lo) == last.q_hi - last.q_lo:
                runs[-1] = HeadRun(last.q_lo, q + size, last.k_lo, k + 1)
            else:
                runs.append(HeadRun(q, q + size, k, k + 1))
            q += size
        return runs


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What stays the same over the layers of a step.

    causal: each span's last query is aligned with its last key (bottom-right). Under a window, positions
    decide instead: a query sees the keys less than `window` positions before it and, where causal, none after.
    """

    spans: tuple[Span, ...]
    causal: bool
    heads: HeadMap
    head_dim: int
    scale: float
    num_queries: int  # rows of q
    window: int | None = None
    q_positions: Tensor | None = None  # [queries] int64, under a window
    k_positions: Tensor | None = None  # [keys] int64, ascending within a span
    k_rows: Tensor | None = None  # [keys] int64: the row of kv where each key lies; None: key i is row i


class Attention(Protocol):
    """One layer's attention, by a kernel that knows its work."""

    def __call__(self, q: Tensor, kv: Tensor, into: AttentionState | None = None, merge: bool = True) -> AttentionState:
        """The state of all query rows.

        q: [queries, heads, head_dim]. kv: [keys, 2, kv_heads, head_dim] or, where the work has `k_rows`, all that they
        may point at, such as a layer's pages. Both may be strided, except along head_dim.
        into: a state of these rows and heads to merge the result into, in place; it is what is returned. Both of its
        tensors may be strided, `out` not along head_dim. None: a new one is made.
        merge: False: what is in `into` does not matter and is overwritten.
        """


Kernel = Callable[[Work], Attention]

KERNELS: dict[str, str] = {  # name -> module that has `kernel: Kernel`, imported when asked for
    "reference": "sp_backend.kernels.reference",
    "torch_cpu": "sp_backend.kernels.torch_cpu",
    "native": "sp_backend.kernels.native",
}


def get_kernel(name: str) -> Kernel:
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}; known: {', '.join(KERNELS)}")
    return cast(Kernel, import_module(KERNELS[name]).kernel)
