"""The layers' arithmetic, bit for bit as transformers rounds it."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from sp_backend.models.layers import inverse_frequencies, rms_norm, rope_cos_sin, rotate
from sp_backend.models.rope_config import Rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_computed_in_fp32(dtype):
    torch.manual_seed(0)
    norm = Qwen3RMSNorm(64, eps=1e-6)
    norm.weight.data.normal_()
    norm.to(dtype)
    x = torch.randn(50, 64).to(dtype)
    assert torch.equal(rms_norm(x, norm.weight.data, 1e-6), norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_of_far_positions(dtype):
    """Angles of a million-token prompt must not be rounded to the model's dtype."""
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 257, 32_769, 131_071, 1_000_003])
    parameters = {"rope_type": "default", "rope_theta": 1e6}
    rotary = Qwen3RotaryEmbedding(Qwen3Config(head_dim=32, rope_parameters=parameters))
    q, k = torch.randn(6, 4, 32).to(dtype), torch.randn(6, 2, 32).to(dtype)
    wanted = apply_rotary_pos_emb(q, k, *(part[0] for part in rotary(q, positions[None])), unsqueeze_dim=1)
    inv_freq, scale = inverse_frequencies(Rope(theta=1e6), 32)
    cos, sin = rope_cos_sin(positions, inv_freq, scale, dtype)
    assert torch.equal(rotate(q, cos, sin), wanted[0])
    assert torch.equal(rotate(k, cos, sin), wanted[1])
