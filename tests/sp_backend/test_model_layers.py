"""The layers' arithmetic, bit for bit as transformers rounds it."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from sp_backend.models.layers import inverse_frequencies, rms_norm, rope_cos_sin, rotate
from sp_backend.models.linear import Linear, can_pack
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 48), (85, 33)])
@pytest.mark.parametrize("rows", [0, 1, 5, 130])
def test_a_packed_linear_layer_computes_the_same(dtype, shape, rows):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(shape) / 6, torch.randn(shape[0]), torch.randn(rows, shape[1])
    exact = F.linear(x.to(dtype).double(), weight.to(dtype).double(), bias.to(dtype).double())
    linear = Linear(weight.to(dtype), bias.to(dtype))
    linear.pack()
    torch.testing.assert_close(linear(x.to(dtype)), exact.to(dtype))
    torch.testing.assert_close(linear.product(x.to(dtype)), (exact - bias.to(dtype)).to(dtype), atol=2e-2, rtol=2e-2)


def test_a_packed_matrix_replaces_the_plain_one():
    weight = torch.randn(64, 64)
    plain = weakref.ref(weight)
    linear = Linear(weight)
    del weight
    assert plain() is not None
    linear.pack()
    assert (plain() is None) == can_pack(torch.empty(1))
