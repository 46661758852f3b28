"""The network to train: Qwen3 with its Hugging Face parameter names, so that exporting it is a plain copy.

It is apart from the serving decoder because it must give gradients and a loss for each target, and attends whole
rows without pages or ranks; a test holds it to what `transformers` computes from the exported weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the network, under their names in config.json."""

    vocab_size: int = 4032
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 12  # split evenly over 2, 3, 4 or 6 ranks
    num_key_value_heads: int = 4
    head_dim: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e8
    max_position_embeddings: int = 131_072

    def rotary_rates(self, device: torch.device | str = "cpu") -> Tensor:
        """Radians per position of each pair of dimensions: [head_dim / 2], fastest first."""
        half = self.head_dim // 2
        return self.rope_theta ** (-torch.arange(half, device=device) / half)


class Norm(nn.Module):
    """RMS norm, computed and returned in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)
        self.q_norm = Norm(shape.head_dim, shape.rms_norm_eps)
        self.k_norm = Norm(shape.head_dim, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(rows, length, -1, self.shape.head_dim)

        value = heads(self.v_proj(x)).transpose(1, 2)  # [rows, KV heads, tokens, head_dim]
        query = rotate(self.q_norm(heads(self.q_proj(x))), cos, sin).to(value.dtype).transpose(1, 2)
        key = rotate(self.k_norm(heads(self.k_proj(x))), cos, sin).to(value.dtype).transpose(1, 2)
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        mixed = causal_attention(query, key, value)
        return cast(Tensor, self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1)))


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, all operands [rows, heads, tokens, head_dim].

    Short rows go block by block of queries, with only the keys that a block can see: compiled, this is about
    twice as fast on a CPU as the fused operator.  The norms of queries and keys bound the scores, so that
    no maximum has to be subtracted before the exponential; the clamp is a guard.
    """
    length, head_dim, block = query.shape[2], query.shape[3], 64
    if length > 512 or length % block or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    query = query * head_dim**-0.5
    blocks: list[Tensor] = []
    for start in range(0, length, block):
        end = start + block
        scores = query[:, :, start:end] @ key[:, :, :end].transpose(-1, -2)
        seen = torch.arange(start, end)[:, None] >= torch.arange(end)[None]
        powers = torch.where(seen, scores.float().clamp(max=60.0).exp(), 0.0)
        blocks.append((powers.to(value.dtype) @ value[:, :, :end]) / powers.sum(-1, keepdim=True))
    return torch.cat(blocks, dim=2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = Mlp(shape)
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)))


class Head(nn.Module):
    """The last norm and the loss of each target, with the embedding as output matrix; one part to compile."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor, embedding: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(self.norm(x), embedding).float().flatten(0, 1)
        targets = targets.flatten()
        return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets


class Network(nn.Module):
    """Starts from small random matrices; those that write into the residual stream start at zero."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.head = Head(shape)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes = "o_proj" in name or "down_proj" in name
                nn.init.normal_(weight, std=0.0 if writes else 0.02)

    def attention(self, layer: int) -> Attention:
        return cast(Layer, self.layers[layer]).self_attn

    def forward(self, inputs: Tensor, targets: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of [rows, tokens] each: the loss of each target, and whether it was the likeliest token, flattened."""
        angles = positions[:, :, None, None].float() * self.shape.rotary_rates(inputs.device)
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(inputs)
        for layer in self.layers:
            x = layer(x, cos, sin)
        loss, hit = self.head(x, self.embed_tokens.weight, targets)
        return loss, hit

    def compile_parts(self) -> None:
        """Compile each layer and the head on its own, in place, for each length of row."""
        for part in (*self.layers, self.head):
            part.compile(dynamic=False)

    def exported(self) -> dict[str, Tensor]:
        """The weights by their Hugging Face names, in bfloat16 on the CPU."""
        return {
            "model." + name.removeprefix("head."): weight.detach().to("cpu", torch.bfloat16).contiguous()
            for name, weight in self.state_dict().items()
        }
