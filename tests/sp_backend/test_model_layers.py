"""The layers' arithmetic, bit for bit as transformers rounds it."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from sp_backend.models import passes
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


ROWS = 37


def bf16(*shape: int) -> Tensor:
    return (torch.randn(shape) * 2).bfloat16()


def no_worse(fused: Tensor, stepwise: Tensor, exact: Tensor) -> bool:
    """Than what is rounded at every step; both of bf16, `exact` of fp64."""
    return float((fused - exact).square().mean()) <= 1.02 * float((stepwise - exact).square().mean())


@pytest.fixture
def stepwise(monkeypatch):
    """Runs a call with the native passes off."""
    assert passes.is_fused(torch.bfloat16, torch.device("cpu")), "the native passes must be compiled here"

    def run(call, *args):
        with monkeypatch.context() as patch:
            patch.setattr(passes, "is_fused", lambda dtype, device: False)
            return call(*args)

    return run


@pytest.mark.parametrize("size", [16, 40, 192, 768])
@pytest.mark.parametrize("adds", [False, True])
def test_the_fused_norm(size, adds, stepwise):
    torch.manual_seed(0)
    hidden, delta, weight = bf16(ROWS, size), bf16(ROWS, size) if adds else None, bf16(size)
    kept, normed = [], []
    for run in (stepwise, lambda call, *args: call(*args)):
        mine = hidden.clone()
        normed.append(run(passes.rms_norm, mine, weight, 1e-5, delta))
        kept.append(mine)
    assert torch.equal(*kept)
    assert torch.equal(kept[0], hidden if delta is None else hidden + delta)
    assert no_worse(normed[1], normed[0], rms_norm(kept[0].double(), weight.double(), 1e-5))


@pytest.mark.parametrize("head_dim", [6, 16, 64, 128])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("heads", [3, 5])
def test_fused_rotation(head_dim, normed, heads, stepwise):
    """Of 3 heads of 5, from the middle of a wider matrix."""
    torch.manual_seed(0)
    x = bf16(ROWS, 7 * head_dim)[:, head_dim : 6 * head_dim]
    norm = bf16(head_dim) if normed else None
    positions = torch.randint(1_000_000, (ROWS,))
    inv_freq, scale = inverse_frequencies(Rope(theta=1e6), head_dim)
    cos, sin = rope_cos_sin(positions, inv_freq, scale, torch.float64)
    exact = x.double().view(ROWS, 5, head_dim).clone()
    turned = exact[:, :heads] if norm is None else rms_norm(exact[:, :heads], norm.double(), 1e-6)
    exact[:, :heads] = rotate(turned, cos, sin)

    def rotated():
        out = x.new_empty(ROWS, 5, head_dim)
        angles = passes.angles(positions, inv_freq, scale, torch.bfloat16)
        passes.rotate_into(out, x, heads, angles, norm, 1e-6)
        return out

    fused, reference = rotated(), stepwise(rotated)
    assert torch.equal(fused[:, heads:], reference[:, heads:])
    assert no_worse(fused, reference, exact)


@pytest.mark.parametrize("size", [3, 85, 2048])
def test_fused_silu(size, stepwise):
    torch.manual_seed(0)
    gate_up = bf16(ROWS, 2 * size) * 4
    exact = F.silu(gate_up[:, :size].double()) * gate_up[:, size:].double()
    assert no_worse(passes.silu_mul(gate_up), stepwise(passes.silu_mul, gate_up), exact)


def test_fused_silu_of_extremes():
    gate = torch.tensor([-3e38, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 3e38, torch.nan]).bfloat16()
    product = passes.silu_mul(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    assert torch.equal(product[3:8], gate[3:8])
    assert (product[:3].abs() <= 1e-35).all()
    assert product[8].isnan()


def test_the_passes_of_no_rows():
    empty = torch.empty(0, 128, dtype=torch.bfloat16)
    assert passes.rms_norm(empty, torch.ones(128).bfloat16(), 1e-6, empty).shape == (0, 128)
    assert passes.silu_mul(empty).shape == (0, 64)
    angles = passes.angles(torch.empty(0, dtype=torch.int64), torch.ones(32), 1.0, torch.bfloat16)
    passes.rotate_into(torch.empty(0, 2, 64, dtype=torch.bfloat16), empty, 2, angles, None, 1e-6)
