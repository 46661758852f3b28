"""torch's own flash attention for CPUs, which returns the log-sum-exp (fp32, natural log).

Its causal mask is top-left aligned and it crashes the process on empty keys, hence the care below. With few
query rows the heads that share a KV head become rows of one head, so that keys are read once, and half-precision
keys are converted to fp32 a cache-sized part at a time, since its half-precision products are slow there. Windows
are applied with a mask, a block of queries at a time and only over the keys that some query of the block sees.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from sp_backend.kernels import Attention, HeadRun, Span, Work
from sp_backend.state import AttentionState

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FEW_ROWS = 16  # queries
_WIDE_BYTES = 4 << 20  # of keys and values converted to fp32 at a time
_WINDOW_ROWS = 256  # queries of a block under a window

# (q [batch, queries, heads, head_dim], kv [batch, keys, 2, kv_heads, head_dim]) -> state of batch x queries rows
Part = Callable[[Tensor, Tensor], AttentionState]


class _Run(NamedTuple):
    """Neighbouring spans of one shape: a batch."""

    q_lo: int
    q_hi: int
    k_lo: int
    k_hi: int
    batch: int


def kernel(work: Work) -> Attention:
    parts = [(run, _part(work, run)) for run in _runs(work)]
    heads = work.heads.runs()
    if len(parts) == 1 and len(heads) == 1 and parts[0][0][:2] == (0, work.num_queries):
        return partial(_attend_all, work, *parts[0])
    return partial(_attend, work, heads, parts)


def _runs(work: Work) -> list[_Run]:
    runs: list[_Run] = []
    for span in work.spans:
        if span.q_hi == span.q_lo or span.k_hi == span.k_lo:
            continue
        last = runs[-1] if runs else None
        if last and work.window is None and _continues(last, span):
            runs[-1] = _Run(last.q_lo, span.q_hi, last.k_lo, span.k_hi, last.batch + 1)
        else:
            runs.append(_Run(*span, 1))
    return runs


def _continues(run: _Run, span: Span) -> bool:
    same_q = (run.q_hi - run.q_lo) == (span.q_hi - span.q_lo) * run.batch
    same_k = (run.k_hi - run.k_lo) == (span.k_hi - span.k_lo) * run.batch
    return same_q and same_k and (run.q_hi, run.k_hi) == (span.q_lo, span.k_lo)


def _batched(rows: Tensor, batch: int) -> Tensor:
    return rows.view(batch, rows.shape[0] // batch, *rows.shape[1:])


def _attend_all(
    work: Work,
    run: _Run,
    part: Part,
    q: Tensor,
    kv: Tensor,
    into: AttentionState | None = None,
    merge: bool = True,
) -> AttentionState:
    state = part(_batched(q, run.batch), _batched(_keys(work, run, kv), run.batch))
    if into is None:
        return state
    return into.merge_(state) if merge else into.copy_(state)


def _attend(
    work: Work,
    heads: list[HeadRun],
    parts: list[tuple[_Run, Part]],
    q: Tensor,
    kv: Tensor,
    into: AttentionState | None = None,
    merge: bool = True,
) -> AttentionState:
    if into is None:
        state, merge = AttentionState.empty(work.num_queries, work.heads.num_heads, work.head_dim, q.device), False
    else:
        state = into if merge else into.clear_()
    for run, part in parts:
        queries, keys = q[run.q_lo : run.q_hi], _keys(work, run, kv)
        for h in heads:
            result = part(
                _batched(queries[:, h.q_lo : h.q_hi], run.batch),
                _batched(keys[:, :, h.k_lo : h.k_hi], run.batch),
            )
            target = state.rows(run.q_lo, run.q_hi).heads(h.q_lo, h.q_hi)
            if merge:
                target.merge_(result)
            else:
                target.copy_(result)
    return state


def _keys(work: Work, run: _Run, kv: Tensor) -> Tensor:
    """Gathered where they are scattered: the op below wants one stride from key to key."""
    if work.k_rows is None:
        return kv[run.k_lo : run.k_hi]
    return kv.index_select(0, work.k_rows[run.k_lo : run.k_hi])


def _part(work: Work, run: _Run) -> Part:
    num_q, num_k = (run.q_hi - run.q_lo) // run.batch, (run.k_hi - run.k_lo) // run.batch
    if work.window is not None:
        return partial(_windowed, work, run, _window_blocks(work, run))
    if work.causal and num_q > 1:
        return partial(_causal, work.scale, num_k - num_q)
    return partial(_full, work.scale)


def _full(scale: float, q: Tensor, kv: Tensor) -> AttentionState:
    if q.shape[1] > _FEW_ROWS:
        return _call(q, kv, scale)
    return _folded(scale, q, kv) if q.dtype == torch.float32 else _widened(scale, q.float(), kv)


def _widened(scale: float, q: Tensor, kv: Tensor) -> AttentionState:
    block = min(max(1, _WIDE_BYTES // (4 * kv[:, 0].numel())), kv.shape[1])
    wide = torch.empty(kv.shape[0], block, *kv.shape[2:])
    parts = (_folded(scale, q, wide[:, : part.shape[1]].copy_(part)) for part in torch.split(kv, block, 1))
    return reduce(AttentionState.merge_, parts)


def _folded(scale: float, q: Tensor, kv: Tensor) -> AttentionState:
    (batch, rows, heads, dim), kv_heads = q.shape, kv.shape[3]
    if heads == kv_heads:
        return _call(q, kv, scale)
    group = heads // kv_heads
    tall = q.view(batch, rows, kv_heads, group, dim).transpose(2, 3).reshape(batch, rows * group, kv_heads, dim)
    state = _call(tall, kv, scale)
    out = state.out.view(batch * rows, group, kv_heads, dim).transpose(1, 2).reshape(-1, heads, dim)
    return AttentionState(out, state.lse.view(-1, group, kv_heads).transpose(1, 2).reshape(-1, heads))


def _causal(scale: float, offset: int, q: Tensor, kv: Tensor) -> AttentionState:
    """Bottom-right aligned: query i sees keys up to i + offset."""
    if offset == 0:
        return _call(q, kv, scale, causal=True)
    if offset > 0:  # all queries see the first keys
        return _full(scale, q, kv[:, :offset]).merge_(_call(q, kv[:, offset:], scale, causal=True))
    batch, rows, heads, dim = q.shape  # the first queries see nothing
    state = AttentionState.empty(batch * rows, heads, dim, q.device)
    seen = _call(q[:, -offset:], kv, scale, causal=True)
    state.out.view(q.shape)[:, -offset:] = _batched(seen.out, batch)
    state.lse.view(batch, rows, heads)[:, -offset:] = _batched(seen.lse, batch)
    return state


class _WindowBlock(NamedTuple):
    """Some queries of a span and the range of its keys that any of them sees."""

    q_lo: int
    q_hi: int
    k_lo: int
    k_hi: int
    all_seen: bool  # every query sees every key of the range


def _window_blocks(work: Work, run: _Run) -> list[_WindowBlock]:
    assert work.window is not None and work.q_positions is not None and work.k_positions is not None
    q = work.q_positions[run.q_lo : run.q_hi]
    k = work.k_positions[run.k_lo : run.k_hi]
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


def _windowed(work: Work, run: _Run, blocks: list[_WindowBlock], q: Tensor, kv: Tensor) -> AttentionState:
    state = AttentionState.empty(q.shape[1], q.shape[2], q.shape[3], q.device)
    for b in blocks:
        part_q, part_kv = q[:, b.q_lo : b.q_hi], kv[:, b.k_lo : b.k_hi]
        if b.all_seen:
            part = _full(work.scale, part_q, part_kv)
        else:
            part = _call(part_q, part_kv, work.scale, visible=_visible(work, run, b))
        state.out[b.q_lo : b.q_hi], state.lse[b.q_lo : b.q_hi] = part.out, part.lse
    return state


def _visible(work: Work, run: _Run, b: _WindowBlock) -> Tensor:
    """[queries, keys] bool. Made anew for each layer: if kept, a long prompt's masks would fill the memory."""
    assert work.window is not None and work.q_positions is not None and work.k_positions is not None
    q = work.q_positions[run.q_lo + b.q_lo : run.q_lo + b.q_hi]
    k = work.k_positions[run.k_lo + b.k_lo : run.k_lo + b.k_hi]
    visible = k > q[:, None] - work.window
    return visible & (k <= q[:, None]) if work.causal else visible


def _call(q: Tensor, kv: Tensor, scale: float, causal: bool = False, visible: Tensor | None = None) -> AttentionState:
    """Neither queries nor keys may be empty. The causal mask is top-left aligned."""
    keys, values = kv.unbind(2)
    mask = None
    if visible is not None:
        mask = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)[None, None]
    out, lse = _flash(
        q.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        is_causal=causal,
        attn_mask=mask,
        scale=scale,
    )
    state = AttentionState(out.transpose(1, 2).flatten(0, 1).float(), lse.transpose(1, 2).flatten(0, 1))
    if visible is not None:  # rows that see nothing come back as out 0, lse 0
        state.lse[~visible.any(1)] = -torch.inf
    return state
