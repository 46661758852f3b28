"""The arithmetic of a decoder layer, rounded where transformers rounds so that tokens match it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sp_backend.models.rope_config import Rope


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dim, in fp32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [rows, heads, head_dim] by cos, sin [rows, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def rope_cos_sin(positions: Tensor, inv_freq: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, head_dim], computed in fp32 for the given positions [rows]."""
    angles = positions[:, None].float() * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position [head_dim / 2] in fp32, and the factor on cos and sin."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    inv_freq = 1.0 / powers
    if rope.kind == "linear":
        return inv_freq / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inv_freq), 1.0
    if rope.kind == "yarn":
        scale = rope.attention_factor
        if scale is None:
            scale = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
        return _yarn(rope, powers, head_dim), scale
    assert rope.kind == "default", rope.kind
    return inv_freq, 1.0


def _llama3(rope: Rope, inv_freq: Tensor) -> Tensor:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    length = rope.original_max_positions
    wavelength = 2 * math.pi / inv_freq
    slowed = torch.where(wavelength > length / rope.low_freq_factor, inv_freq / rope.factor, inv_freq)
    blend = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * slowed / rope.factor + blend * slowed
    between = (wavelength >= length / rope.high_freq_factor) & (wavelength <= length / rope.low_freq_factor)
    return torch.where(between, blended, slowed)


def _yarn(rope: Rope, powers: Tensor, head_dim: int) -> Tensor:
    """Dims that turn over beta_fast times in the trained length are kept, under beta_slow slowed."""

    def dim_turning(times: float) -> float:
        return head_dim * math.log(rope.original_max_positions / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_turning(rope.beta_fast), dim_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - slowed
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept
