"""torch's own flash attention for CPUs, which returns the log-sum-exp (fp32, natural log).

Its causal mask is top-left aligned and it crashes the process on empty keys, hence the care below. With few
query rows the query heads that share a KV head become rows of one head, so that keys are read once. Windows
are applied with a mask, a block of queries at a time and only over the keys that some query of the block
sees.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sp_backend.kernels import Attention, HeadRun, Span, Work
from sp_backend.state import AttentionState

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FOLD_ROWS = 16  # spans of at most so many queries are folded
_WINDOW_ROWS = 256  # queries of a block under a window

Part = Callable[[Tensor, Tensor], AttentionState]  # one span's q and kv -> its state


def kernel(work: Work) -> Attention:
    runs = work.heads.runs()
    spans = [s for s in work.spans if s.q_hi > s.q_lo and s.k_hi > s.k_lo]
    parts = [_part(work, span) for span in spans]
    if len(runs) == 1 and [s[:2] for s in spans] == [(0, work.num_queries)]:
        return lambda q, kv: parts[0](q, kv[spans[0].k_lo : spans[0].k_hi])
    return partial(_attend, work, runs, list(zip(spans, parts, strict=True)))


def _attend(
    work: Work, runs: list[HeadRun], parts: list[tuple[Span, Part]], q: Tensor, kv: Tensor
) -> AttentionState:
    state = AttentionState.empty(work.num_queries, work.heads.num_heads, work.head_dim, q.device)
    for span, part in parts:
        rows = state.rows(span.q_lo, span.q_hi)
        for run in runs:
            span_q = q[span.q_lo : span.q_hi, run.q_lo : run.q_hi]
            result = part(span_q, kv[span.k_lo : span.k_hi, :, run.k_lo : run.k_hi])
            rows.out[:, run.q_lo : run.q_hi] = result.out
            rows.lse[:, run.q_lo : run.q_hi] = result.lse
    return state


def _part(work: Work, span: Span) -> Part:
    num_q, num_k = span.q_hi - span.q_lo, span.k_hi - span.k_lo
    if work.window is not None:
        return partial(_windowed, work, span, _window_blocks(work, span))
    if work.causal and num_q > 1:
        return partial(_causal, work.scale, num_k - num_q)
    return partial(_full, work.scale)


def _full(scale: float, q: Tensor, kv: Tensor) -> AttentionState:
    if q.shape[0] <= _FOLD_ROWS and q.shape[1] > kv.shape[2]:
        return _folded(scale, q, kv)
    return _call(q, kv, scale)


def _folded(scale: float, q: Tensor, kv: Tensor) -> AttentionState:
    (rows, heads, dim), kv_heads = q.shape, kv.shape[2]
    group = heads // kv_heads
    tall = q.view(rows, kv_heads, group, dim).permute(0, 2, 1, 3).reshape(rows * group, kv_heads, dim)
    state = _call(tall, kv, scale)
    out = state.out.view(rows, group, kv_heads, dim).permute(0, 2, 1, 3).reshape(rows, heads, dim)
    return AttentionState(out, state.lse.view(rows, group, kv_heads).permute(0, 2, 1).reshape(rows, heads))


def _causal(scale: float, offset: int, q: Tensor, kv: Tensor) -> AttentionState:
    """Bottom-right aligned: query i sees keys up to i + offset."""
    if offset == 0:
        return _call(q, kv, scale, causal=True)
    if offset > 0:  # all queries see the first keys
        return _full(scale, q, kv[:offset]).merge_(_call(q, kv[offset:], scale, causal=True))
    state = AttentionState.empty(
        q.shape[0], q.shape[1], q.shape[2], q.device
    )  # the first queries see nothing
    seen = _call(q[-offset:], kv, scale, causal=True)
    state.out[-offset:], state.lse[-offset:] = seen.out, seen.lse
    return state


class _WindowBlock(NamedTuple):
    """Some queries of a span and the range of its keys that any of them sees."""

    q_lo: int
    q_hi: int
    k_lo: int
    k_hi: int
    all_seen: bool  # every query sees every key of the range


def _window_blocks(work: Work, span: Span) -> list[_WindowBlock]:
    assert work.window is not None and work.q_positions is not None and work.k_positions is not None
    q = work.q_positions[span.q_lo : span.q_hi]
    k = work.k_positions[span.k_lo : span.k_hi]
    blocks = []
    for lo in range(0, len(q), _WINDOW_ROWS):
        part = q[lo : lo + _WINDOW_ROWS]
        first, last = int(part.min()), int(part.max())
        k_lo = int(torch.searchsorted(k, first - work.window, right=True))
        k_hi = int(torch.searchsorted(k, last, right=True)) if work.causal else len(k)
        if k_lo < k_hi:
            all_seen = bool(k[k_lo] > last - work.window and (not work.causal or k[k_hi - 1] <= first))
            blocks.append(_WindowBlock(lo, lo + len(part), k_lo, k_hi, all_seen))
    return blocks


def _windowed(work: Work, span: Span, blocks: list[_WindowBlock], q: Tensor, kv: Tensor) -> AttentionState:
    state = AttentionState.empty(q.shape[0], q.shape[1], q.shape[2], q.device)
    for b in blocks:
        part_q, part_kv = q[b.q_lo : b.q_hi], kv[b.k_lo : b.k_hi]
        if b.all_seen:
            part = _full(work.scale, part_q, part_kv)
        else:
            part = _call(part_q, part_kv, work.scale, visible=_visible(work, span, b))
        state.out[b.q_lo : b.q_hi], state.lse[b.q_lo : b.q_hi] = part.out, part.lse
    return state


def _visible(work: Work, span: Span, b: _WindowBlock) -> Tensor:
    """[queries, keys] bool. Made anew for every layer: kept, the masks of a long prompt would fill the
    memory.
    """
    assert work.window is not None and work.q_positions is not None and work.k_positions is not None
    q = work.q_positions[span.q_lo + b.q_lo : span.q_lo + b.q_hi]
    k = work.k_positions[span.k_lo + b.k_lo : span.k_lo + b.k_hi]
    visible = k > q[:, None] - work.window
    return visible & (k <= q[:, None]) if work.causal else visible


def _call(
    q: Tensor, kv: Tensor, scale: float, causal: bool = False, visible: Tensor | None = None
) -> AttentionState:
    """q [queries, heads, head_dim], kv [keys, 2, kv_heads, head_dim], neither empty."""
    keys, values = kv.unbind(1)
    mask = None
    if visible is not None:
        mask = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)[None, None]
    out, lse = _flash(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        is_causal=causal,
        attn_mask=mask,
        scale=scale,
    )
    state = AttentionState(out[0].transpose(0, 1).float(), lse[0].transpose(0, 1))
    if visible is not None:  # rows that see nothing come back as out 0, lse 0
        state.lse[~visible.any(1)] = -torch.inf
    return state
