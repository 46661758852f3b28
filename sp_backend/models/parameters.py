"""A rank's parameters, allocated empty: under their checkpoint names for loading, joined for computing.

Once they are filled, `pack` brings the matrices into the order of the kernels and lets the names go.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sp_backend.models.config import ModelConfig
from sp_backend.models.linear import Linear, can_pack
from sp_backend.models.weights import EMBEDDING, LM_HEAD, TensorSpec


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's part on this rank. q, k and v share one matrix, as do gate and up."""

    input_norm: Tensor
    qkv: Linear  # hidden -> (heads + 2 kv_heads) * head_dim, or q alone if `kv` is apart
    kv: Linear | None  # where keys and queries may be projected for different rows
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    out: Linear  # heads * head_dim -> hidden
    post_norm: Tensor
    gate_up: Linear  # hidden -> 2 mlp
    down: Linear  # mlp -> hidden


@dataclass(slots=True)
class Parameters:
    dtype: torch.dtype
    device: torch.device | str
    shapes: dict[str, tuple[int, ...]]  # by checkpoint name, of this rank's part
    by_name: dict[str, Tensor] = field(default_factory=dict)
    linears: list[Linear] = field(default_factory=list)
    copied_bytes: int = 0  # of packed matrices whose plain form stays

    @classmethod
    def allocate(cls, specs: list[TensorSpec], dtype: torch.dtype, device: torch.device | str) -> Parameters:
        return cls(dtype, device, {spec.name: spec.local_shape for spec in specs})

    def join(self, *names: str) -> Tensor:
        """One empty tensor that holds these parameters along dim 0; `by_name` gets views of it."""
        sizes = [self.shapes[name][0] for name in names]
        shape = (sum(sizes), *self.shapes[names[0]][1:])
        whole = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.by_name.update(zip(names, torch.split(whole, sizes), strict=True))
        return whole

    def linear(self, *names: str, bias: bool = False) -> Linear:
        """A layer that holds these matrices one below the other; names without .weight."""
        joined = Linear(
            self.join(*(f"{name}.weight" for name in names)),
            self.join(*(f"{name}.bias" for name in names)) if bias else None,
        )
        self.linears.append(joined)
        return joined

    def head(self, config: ModelConfig) -> Linear:
        """Tied to the embedding it is still packed: a lookup needs the plain rows, a product the packed ones."""
        if not config.tie_word_embeddings:
            return self.linear(LM_HEAD.removesuffix(".weight"))
        embedding = self.by_name[EMBEDDING]
        self.copied_bytes = embedding.nbytes if can_pack(embedding) else 0
        self.linears.append(Linear(embedding))
        return self.linears[-1]

    def layer(self, config: ModelConfig, index: int, kv_apart: bool) -> LayerWeights:
        prefix = f"model.layers.{index}."
        q, k, v, out = (f"{prefix}self_attn.{name}_proj" for name in "qkvo")
        gate, up, down = (f"{prefix}mlp.{name}_proj" for name in ("gate", "up", "down"))
        return LayerWeights(
            input_norm=self.join(f"{prefix}input_layernorm.weight"),
            qkv=self.linear(*((q,) if kv_apart else (q, k, v)), bias=config.qkv_bias),
            kv=self.linear(k, v, bias=config.qkv_bias) if kv_apart else None,
            q_norm=self.join(f"{prefix}self_attn.q_norm.weight") if config.qk_norm else None,
            k_norm=self.join(f"{prefix}self_attn.k_norm.weight") if config.qk_norm else None,
            out=self.linear(out, bias=config.o_bias),
            post_norm=self.join(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self.linear(gate, up, bias=config.mlp_bias),
            down=self.linear(down, bias=config.mlp_bias),
        )

    @property
    def nbytes(self) -> int:
        """Of all that is held once packed."""
        return sum(parameter.nbytes for parameter in self.by_name.values()) + self.copied_bytes

    def pack(self) -> None:
        """For good: the parameters cannot be filled again."""
        self.by_name.clear()
        for linear in self.linears:
            linear.pack()
