"""Our own kernel for CPUs with AVX-512 BF16, in C++ (sp_backend/native/attention.cpp), compiled at its first use.

It reads keys where they lie, heads that share a KV head together, and folds its result into a given state as it goes.
Inputs in float16 go to torch's kernel: these CPUs multiply bf16 and fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sp_backend import native
from sp_backend.kernels import Attention, Work, torch_cpu
from sp_backend.state import AttentionState

_DTYPES = torch.bfloat16, torch.float32


def kernel(work: Work) -> Attention:
    """Raises native.Unavailable where it cannot be compiled, ValueError for a head_dim that it cannot do."""
    native.load("attention")
    if work.head_dim % 2 or work.head_dim > 1024:
        raise ValueError(f"head_dim must be even and at most 1024, not {work.head_dim}")
    spans = torch.tensor(work.spans, dtype=torch.int64).view(-1, 4)
    rest = (
        spans,
        torch.tensor(work.heads.runs(), dtype=torch.int64),
        work.k_rows,
        work.q_positions if work.window is not None else None,
        work.k_positions if work.window is not None else None,
        work.causal,
        -1 if work.window is None else work.window,
        work.scale,
    )
    covered = sum(span.q_hi - span.q_lo for span in work.spans) == work.num_queries
    return partial(_attend, work, torch.ops.sp_serve.attention.default, rest, covered)


def _attend(
    work: Work,
    op: Callable[..., None],
    rest: tuple[object, ...],
    covered: bool,
    q: Tensor,
    kv: Tensor,
    into: AttentionState | None = None,
    merge: bool = True,
) -> AttentionState:
    if q.dtype not in _DTYPES:
        return torch_cpu.kernel(work)(q, kv, into, merge)
    if q.shape[2] != work.head_dim or q.dtype != kv.dtype or q.stride(2) != 1 or kv.stride(3) != 1:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype} and kv {tuple(kv.shape)} {kv.dtype}: one dtype, {work.head_dim} contiguous "
            "numbers a head"
        )
    state = into or _new_state(work, covered)
    if into is not None and not merge and not covered:
        into.clear_()
    op(q, kv, state.out, state.lse, *rest, merge and into is not None)
    return state


def _new_state(work: Work, covered: bool) -> AttentionState:
    shape = work.num_queries, work.heads.num_heads
    if covered:  # every row is written
        return AttentionState(torch.empty(*shape, work.head_dim), torch.empty(shape))
    return AttentionState.empty(*shape, work.head_dim)
