"""The oracle: attention written out, in fp32, or fp64 for fp64 inputs. Memory grows with queries x keys."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sp_backend.kernels import Attention, Span, Work
from sp_backend.state import AttentionState


def kernel(work: Work) -> Attention:
    return partial(_attend, work)


def _attend(
    work: Work, q: Tensor, kv: Tensor, into: AttentionState | None = None, merge: bool = True
) -> AttentionState:
    if work.k_rows is not None:
        kv = kv.index_select(0, work.k_rows)
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    index = torch.tensor(work.heads.kv_index(), device=q.device)
    for span in work.spans:
        rows = slice(span.q_lo, span.q_hi)
        k, v = kv[span.k_lo : span.k_hi].to(dtype).index_select(2, index).unbind(1)  # [keys, heads, head_dim]
        scores = torch.einsum("qhd,khd->hqk", q[rows].to(dtype), k) * work.scale
        scores.masked_fill_(~_visible(work, span, q.device), -torch.inf)
        span_lse = torch.logsumexp(scores, -1)  # [heads, queries]
        weights = torch.exp(scores - span_lse.masked_fill(span_lse == -torch.inf, 0.0)[..., None])
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v)
        lse[rows] = span_lse.T
    state = AttentionState(out, lse)
    if into is None:
        return state
    return into.merge_(state) if merge else into.copy_(state)


def _visible(work: Work, span: Span, device: torch.device) -> Tensor:
    """[queries, keys] bool."""
    num_q, num_k = span.q_hi - span.q_lo, span.k_hi - span.k_lo
    if work.window is not None:
        assert work.q_positions is not None and work.k_positions is not None
        distance = work.q_positions[span.q_lo : span.q_hi, None] - work.k_positions[None, span.k_lo : span.k_hi]
        return (distance < work.window) & (distance >= 0 if work.causal else True)
    visible = torch.ones(num_q, num_k, dtype=torch.bool, device=device)
    return visible.tril(num_k - num_q) if work.causal else visible
