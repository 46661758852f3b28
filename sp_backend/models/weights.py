"""Which tensors a model has, which slice of each a rank keeps, and filling them from files or at random.

Dummy weights are drawn tensor by tensor from a seed and the tensor's name, then sliced: however the model is
split over ranks, it is the same model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sp_backend.models.checkpoint import Checkpoint
from sp_backend.models.config import ModelConfig
from sp_backend.parallel import Shard

Progress = Callable[[int, int], None]  # tensors loaded so far, tensors in all
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    name: str  # in the checkpoint
    shape: tuple[int, ...]  # of the whole tensor
    slices: tuple[slice, ...]  # this rank's part, one per dim

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(len(range(size)[part]) for size, part in zip(self.shape, self.slices, strict=True))


def tensor_specs(config: ModelConfig, shard: Shard) -> Iterator[TensorSpec]:
    """Every tensor of the model with this rank's part of it."""
    vocab = _slice(shard.split(config.vocab_size))
    whole = slice(None)
    embedding_shape = (config.vocab_size, config.hidden_size)
    yield TensorSpec(EMBEDDING, embedding_shape, (vocab, whole))
    for layer in range(config.num_layers):
        yield from _layer_specs(config, shard, f"model.layers.{layer}.")
    yield TensorSpec(FINAL_NORM, (config.hidden_size,), (whole,))
    if config.has_head and not config.tie_word_embeddings:
        yield TensorSpec(LM_HEAD, embedding_shape, (vocab, whole))


def _layer_specs(config: ModelConfig, shard: Shard, prefix: str) -> Iterator[TensorSpec]:
    hidden, mlp, whole = config.hidden_size, config.intermediate_size, slice(None)
    query_rows = _slice(shard.query_heads(config.num_heads), config.head_dim)
    kv_rows = _slice(shard.kv_heads(config.num_kv_heads), config.head_dim)
    mlp_rows = _slice(shard.split(mlp))
    projections = [  # name, rows, columns, this rank's rows, this rank's columns, has a bias
        ("self_attn.q_proj", config.num_heads * config.head_dim, hidden, query_rows, whole, config.qkv_bias),
        ("self_attn.k_proj", config.num_kv_heads * config.head_dim, hidden, kv_rows, whole, config.qkv_bias),
        ("self_attn.v_proj", config.num_kv_heads * config.head_dim, hidden, kv_rows, whole, config.qkv_bias),
        ("self_attn.o_proj", hidden, config.num_heads * config.head_dim, whole, query_rows, config.o_bias),
        ("mlp.gate_proj", mlp, hidden, mlp_rows, whole, config.mlp_bias),
        ("mlp.up_proj", mlp, hidden, mlp_rows, whole, config.mlp_bias),
        ("mlp.down_proj", hidden, mlp, whole, mlp_rows, config.mlp_bias),
    ]
    for name, rows, columns, my_rows, my_columns, has_bias in projections:
        yield TensorSpec(f"{prefix}{name}.weight", (rows, columns), (my_rows, my_columns))
        if has_bias:
            yield TensorSpec(f"{prefix}{name}.bias", (rows,), (my_rows,))
    norms = [("input_layernorm", hidden), ("post_attention_layernorm", hidden)]
    if config.qk_norm:
        norms += [("self_attn.q_norm", config.head_dim), ("self_attn.k_norm", config.head_dim)]
    for name, size in norms:
        yield TensorSpec(f"{prefix}{name}.weight", (size,), (whole,))


def _slice(part: range, unit: int = 1) -> slice:
    return slice(part.start * unit, part.stop * unit)


@torch.inference_mode()
def load_weights(
    parameters: dict[str, Tensor],
    specs: list[TensorSpec],
    folder: str | Path,
    progress: Progress | None = None,
) -> int:
    """Fills this rank's parameters from the folder's files; returns the bytes read from them."""
    checkpoint = Checkpoint(folder)
    num_bytes = 0
    for number, spec in enumerate(specs, 1):
        tensor = checkpoint.read(spec.name, spec.shape, spec.slices)
        parameters[spec.name].copy_(tensor)
        num_bytes += tensor.nbytes
        if progress is not None:
            progress(number, len(specs))
    return num_bytes


@torch.inference_mode()
def fill_dummy(parameters: dict[str, Tensor], specs: list[TensorSpec], seed: int = 0) -> None:
    """Random weights that keep activations near unit scale: uniform, norm weights 1, small biases."""
    for spec in specs:
        if spec.name.endswith("norm.weight"):
            parameters[spec.name].fill_(1.0)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {spec.name}".encode()))
        limit = (3 / spec.shape[-1]) ** 0.5 if len(spec.shape) == 2 else 0.1
        full = torch.empty(spec.shape).uniform_(-limit, limit, generator=generator)
        parameters[spec.name].copy_(full[spec.slices])
