"""The steps of a layer between its matrix products: each one pass over the activations where native code can be had.

For bf16, `native/passes.cpp` computes in fp32 and rounds once. Otherwise torch does, step by step, and rounds where
transformers does: fp32 is for those who want the same numbers.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_backend import native
from sp_backend.models import layers

logger = logging.getLogger(__name__)
Angles = tuple[Tensor, Tensor]  # cos and sin of each row, in the form that `rotate_into` takes


@cache
def is_fused(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the native passes run. The first call with bf16 on a CPU compiles them, if that was never done."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return False
    try:
        native.load("passes")
    except native.Unavailable as reason:
        logger.warning("norms, RoPE and SiLU run step by step in torch: %s", reason)
        return False
    return True


def angles(positions: Tensor, inv_freq: Tensor, scale: float, dtype: torch.dtype) -> Angles:
    """For positions [rows] and activations of `dtype`; inv_freq in radians per position [head_dim / 2]."""
    if is_fused(dtype, positions.device):
        turns = positions[:, None].float() * inv_freq
        return turns.cos().mul_(scale), turns.sin().mul_(scale)
    return layers.rope_cos_sin(positions, inv_freq, scale, dtype)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
    """The norm of hidden [rows, n], to which delta [rows, n] is added first, in place."""
    if is_fused(hidden.dtype, hidden.device):
        normed = torch.empty_like(hidden)
        torch.ops.sp_serve.rms_norm(hidden, delta, weight, eps, normed)
        return normed
    if delta is not None:
        hidden += delta
    return layers.rms_norm(hidden, weight, eps)


def rotate_into(out: Tensor, x: Tensor, heads: int, angles: Angles, norm: Tensor | None, eps: float) -> None:
    """x [rows, columns] to out [rows, ..., head_dim]: the first heads normed, if asked for, and turned; the rest kept.

    norm: the weight [head_dim] of an RMS norm over each head.
    """
    if is_fused(x.dtype, x.device):
        torch.ops.sp_serve.rotate(x, out, heads, *angles, norm, eps)
        return
    source, target = x.view(len(x), x.shape[-1] // out.shape[-1], out.shape[-1]), out.flatten(1, -2)
    turned = source[:, :heads]
    if norm is not None:
        turned = layers.rms_norm(turned, norm, eps)
    target[:, :heads] = layers.rotate(turned, *angles)
    target[:, heads:] = source[:, heads:]


def silu_mul(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up of [rows, 2 n], gate left of up: [rows, n]."""
    if is_fused(gate_up.dtype, gate_up.device):
        product = gate_up.new_empty(len(gate_up), gate_up.shape[-1] // 2)
        torch.ops.sp_serve.silu_mul(gate_up, product)
        return product
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
