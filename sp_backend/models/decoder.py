"""One decoder for the Llama, Mistral, Qwen2 and Qwen3 families; a rank's part of it.

The decoder knows its shard and never the ranks around it: the caller's `Attention` runs sequence parallelism,
and `Collectives` joins what tensor parallelism split. Long inputs go through the projections and the MLP in
blocks of rows, so that memory beyond q, kv, attention output and hidden states does not grow with the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_backend.models import passes
from sp_backend.models.config import ModelConfig
from sp_backend.models.layers import inverse_frequencies
from sp_backend.models.linear import Linear
from sp_backend.models.parameters import LayerWeights, Parameters
from sp_backend.models.weights import EMBEDDING, FINAL_NORM, Progress, fill_dummy, load_weights, tensor_specs
from sp_backend.parallel import Collectives, Shard

BLOCK_ROWS = 512  # their widest activations stay in the cache


class Attention(Protocol):
    """Everything between the projections, for one forward pass."""

    @property
    def kv_rows(self) -> slice:
        """The rows of the local hidden states for which this rank projects keys and values."""
        ...

    @property
    def last_rows(self) -> Tensor | None:
        """int64 [m]: the rows whose hidden states are wanted of the last layer; None: all n."""
        ...

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """Of rotated q [n, heads, head_dim] and kv [rows, 2, kv_heads, head_dim]: [n, heads, head_dim], to be read
        before the next call. In the last layer q has the `last_rows` alone."""
        ...


class Heads(NamedTuple):
    """Where projected heads go, the first of them normed, if asked for, and turned."""

    rows: Tensor  # [n, ..., head_dim]
    num_turned: int
    norm: Tensor | None  # [head_dim]


class Decoder:
    """Made empty; `load` or `fill_dummy` gives it weights."""

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        dtype: torch.dtype,
        device: torch.device | str,
        collectives: Collectives,
    ) -> None:
        self.config = config
        self.shard = shard
        self.dtype = dtype
        self.num_heads = len(shard.query_heads(config.num_heads))  # of this rank
        self.num_kv_heads = len(shard.kv_heads(config.num_kv_heads))  # of this rank
        self._collectives = collectives
        self._specs = list(tensor_specs(config, shard))
        parameters = Parameters.allocate(self._specs, dtype, device)
        self._embedding = parameters.join(EMBEDDING)
        last = config.num_layers - 1
        kv_apart = [shard.layout == "heads" or index == last for index in range(config.num_layers)]
        self._layers = [parameters.layer(config, index, apart) for index, apart in enumerate(kv_apart)]
        self._final_norm = parameters.join(FINAL_NORM)
        self._head = parameters.head(config) if config.has_head else None
        self._parameters = parameters
        self._weight_bytes = parameters.nbytes
        self._vocab = shard.split(config.vocab_size)
        self._vocab_sizes = shard.split_sizes(config.vocab_size)
        inv_freq, self._rope_scale = inverse_frequencies(config.rope, config.head_dim)
        self._inv_freq = inv_freq.to(device)
        passes.is_fused(dtype, self._inv_freq.device)  # compiled now rather than in the first step

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes

    def load(self, folder: str | Path, progress: Progress | None = None) -> int:
        """Reads this rank's part of the folder's weights, once; returns the bytes read."""
        num_bytes = load_weights(self._parameters.by_name, self._specs, folder, progress)
        self._parameters.pack()
        return num_bytes

    def fill_dummy(self, seed: int = 0) -> None:
        """Random weights, the same model however it is split over ranks."""
        fill_dummy(self._parameters.by_name, self._specs, seed)
        self._parameters.pack()

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Hidden states [m, hidden], before the final norm, of tokens [n] at positions [n]: those at the attention's
        `last_rows`, or all n. n may be 0.

        The last layer's output at other rows is read by nobody: it has keys and values of all tokens, but queries,
        attention and an MLP for these rows alone.
        """
        hidden = self._embed(tokens)
        angles = passes.angles(positions, self._inv_freq, self._rope_scale, self.dtype)
        kv_rows = slice(*attention.kv_rows.indices(len(hidden))[:2])
        for index, layer in enumerate(self._layers):
            keyed, key_angles = hidden[kv_rows], _of_rows(angles, kv_rows)
            if layer is self._layers[-1] and attention.last_rows is not None:
                hidden, angles = hidden[attention.last_rows], _of_rows(angles, attention.last_rows)
            q, kv = self._project(layer, hidden, angles, keyed, key_angles)
            attended = attention.attend(index, q, kv)
            for rows in _blocks(len(hidden)):
                self._finish_layer(layer, hidden[rows], attended[rows])
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [m, vocab] in fp32 of hidden states [m, hidden] from `forward`."""
        assert self._head is not None, "only embeddings are made with a model that has no head"
        normed = passes.rms_norm(hidden, self._final_norm, self.config.rms_norm_eps)
        return self._collectives.gather_last(self._head(normed).float(), self._vocab_sizes)

    @torch.inference_mode()
    def pooled(self, hidden: Tensor, rows: Sequence[slice]) -> Tensor:
        """The sum [hidden] in fp32 of some rows of the hidden states [n, hidden] from `forward`, normed."""
        total = hidden.new_zeros(hidden.shape[-1], dtype=torch.float64)
        for part in rows:
            for block in _blocks(part.stop - part.start):
                normed = passes.rms_norm(hidden[part][block], self._final_norm, self.config.rms_norm_eps)
                total += normed.sum(0, dtype=torch.float64)
        return total.float()

    def _embed(self, tokens: Tensor) -> Tensor:
        """Each rank looks up the tokens of its part of the vocabulary."""
        if self.shard.group_size == 1 or not len(tokens):
            return F.embedding(tokens, self._embedding)
        local = tokens - self._vocab.start
        mine = (local >= 0) & (local < len(self._vocab))
        hidden = F.embedding(local.where(mine, 0), self._embedding) * mine[:, None]
        return self._collectives.all_reduce(hidden)

    def _project(
        self, layer: LayerWeights, hidden: Tensor, angles: passes.Angles, keyed: Tensor, key_angles: passes.Angles
    ) -> tuple[Tensor, Tensor]:
        """Rotated q [n, heads, head_dim] of hidden [n, hidden]; kv [m, 2, kv_heads, head_dim] of keyed [m, hidden]."""
        head_dim = self.config.head_dim
        q = Heads(hidden.new_empty(len(hidden), self.num_heads, head_dim), self.num_heads, layer.q_norm)
        kv = Heads(hidden.new_empty(len(keyed), 2, self.num_kv_heads, head_dim), self.num_kv_heads, layer.k_norm)
        if layer.kv is None:
            assert len(hidden) == len(keyed), "one matrix projects queries and keys of the same rows"
            self._project_to([q, kv], layer.qkv, layer.input_norm, hidden, angles)
        else:
            self._project_to([kv], layer.kv, layer.input_norm, keyed, key_angles)
            self._project_to([q], layer.qkv, layer.input_norm, hidden, angles)
        return q.rows, kv.rows

    def _project_to(
        self, targets: Sequence[Heads], linear: Linear, norm: Tensor, hidden: Tensor, angles: passes.Angles
    ) -> None:
        """The normed rows of hidden through one matrix, whose columns are the targets' side by side."""
        eps = self.config.rms_norm_eps
        widths = [target.rows.shape[1:].numel() for target in targets]
        for rows in _blocks(len(hidden)):
            parts = linear(passes.rms_norm(hidden[rows], norm, eps)).split_with_sizes(widths, dim=-1)
            for target, part in zip(targets, parts, strict=True):
                passes.rotate_into(target.rows[rows], part, target.num_turned, _of_rows(angles, rows), target.norm, eps)

    def _finish_layer(self, layer: LayerWeights, hidden: Tensor, attended: Tensor) -> None:
        """Output projection and MLP, added to these rows of hidden in place."""
        delta = self._row_parallel(layer.out, attended.flatten(1))
        x = passes.rms_norm(hidden, layer.post_norm, self.config.rms_norm_eps, delta)
        hidden += self._row_parallel(layer.down, passes.silu_mul(layer.gate_up(x)))

    def _row_parallel(self, linear: Linear, x: Tensor) -> Tensor:
        if self.shard.group_size == 1:
            return linear(x)
        total = self._collectives.all_reduce(linear.product(x))
        return total if linear.bias is None else total + linear.bias


def _of_rows(angles: passes.Angles, rows: slice | Tensor) -> passes.Angles:
    return angles[0][rows], angles[1][rows]


def _blocks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, num_rows))
