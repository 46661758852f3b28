"""What of a model and of its batches decides the time of a step. Pure: no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sp_backend.geometry import Geometry
from sp_backend.layout import Layout

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides its step times. Heads are those of one SP group: already divided by the TP size."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int = 1
    itemsize: int = 2  # bytes of an element of Q, K and V
    dense_flops: float = 0.0  # for a token, all layers, on one rank: everything but attention; 2 x its parameters
    kv_flops: float = 0.0  # of those: projections to keys and values, which redundant KV repeats on every rank

    def dense_share(self, layout: Layout) -> float:
        """Which part of the dense work on the tokens whose queries it holds is a rank's."""
        if layout.kind != "heads":
            return 1.0
        repeated = self.kv_flops / self.dense_flops if layout.redundant_kv and self.dense_flops else 0.0
        return (1 - repeated) / layout.num_ranks + repeated


@dataclass(frozen=True, slots=True)
class Sizes:
    """Batches to be costed. rows [batches, sequences, chunks]; each sequence occurs `count` times [batches, sequences]
    in its batch.
    """

    rows: Ints
    count: Ints

    @classmethod
    def of(cls, geometry: Geometry) -> Sizes:
        rows = np.array([geometry.rows], np.int64)
        return cls(rows, np.ones(rows.shape[:2], np.int64))
