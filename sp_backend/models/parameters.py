"""A rank's parameters, allocated empty: under their checkpoint names for loading, joined for computing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sp_backend.models.config import ModelConfig
from sp_backend.models.weights import TensorSpec


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's part on this rank. q, k and v share one matrix, as do gate and up."""

    input_norm: Tensor
    qkv: Tensor  # [(heads + 2 kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    out: Tensor  # [hidden, heads * head_dim]
    out_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor  # [2 mlp, hidden]
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden, mlp]
    down_bias: Tensor | None


@dataclass(slots=True)
class Parameters:
    dtype: torch.dtype
    device: torch.device | str
    shapes: dict[str, tuple[int, ...]]  # by checkpoint name, of this rank's part
    by_name: dict[str, Tensor] = field(default_factory=dict)

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

    def layer(self, config: ModelConfig, index: int) -> LayerWeights:
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        qkv = [f"{attention}{name}_proj" for name in "qkv"]
        gate_up = [f"{mlp}gate_proj", f"{mlp}up_proj"]
        return LayerWeights(
            input_norm=self.join(f"model.layers.{index}.input_layernorm.weight"),
            qkv=self.join(*(f"{name}.weight" for name in qkv)),
            qkv_bias=self.join(*(f"{name}.bias" for name in qkv)) if config.qkv_bias else None,
            q_norm=self.join(f"{attention}q_norm.weight") if config.qk_norm else None,
            k_norm=self.join(f"{attention}k_norm.weight") if config.qk_norm else None,
            out=self.join(f"{attention}o_proj.weight"),
            out_bias=self.join(f"{attention}o_proj.bias") if config.o_bias else None,
            post_norm=self.join(f"model.layers.{index}.post_attention_layernorm.weight"),
            gate_up=self.join(*(f"{name}.weight" for name in gate_up)),
            gate_up_bias=self.join(*(f"{name}.bias" for name in gate_up)) if config.mlp_bias else None,
            down=self.join(f"{mlp}down_proj.weight"),
            down_bias=self.join(f"{mlp}down_proj.bias") if config.mlp_bias else None,
        )
