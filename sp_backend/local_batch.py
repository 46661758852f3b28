"""One rank's part of a step: what a forward pass and what follows it need to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sp_backend.commands import Sampling
from sp_backend.geometry import Geometry
from sp_backend.kv_cache import Rows


@dataclass(frozen=True, slots=True)
class GroupRows:
    """One group's part of this rank's rows."""

    plan: str
    geometry: Geometry
    q_rows: dict[int, slice]  # query chunk -> rows of the hidden states
    kv_rows: dict[int, slice]  # new-token chunk -> rows of the keys projected in this step
    own_rows: slice  # those of them that this rank keeps in its cache ...
    own_slots: Rows  # ... and where
    places: dict[int, Rows]  # chunk -> cache rows of its keys, sequence by sequence: history and what is kept

    def rows_of(self, i: int, chunk: int) -> slice:
        """The rows of the i-th sequence in a query chunk of this rank."""
        first, (lo, hi) = self.q_rows[chunk].start, self.geometry.chunk_spans(chunk)[i]
        return slice(first + lo, first + hi)


@dataclass(frozen=True, slots=True)
class LastLayer:
    """What the last layer attends, where not all of its rows are wanted."""

    rows: torch.Tensor  # int64 [m]: of the hidden states before it
    groups: list[GroupRows]  # rows are those of these m; keys are in pages where kv_rows is empty


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A hidden state from which a token is to be drawn. position: that token's."""

    request_id: int
    row: int
    position: int
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Hidden states that predict prompt tokens whose log-probabilities are wanted."""

    request_id: int
    rows: list[slice]
    targets: torch.Tensor  # int64 [rows]: the tokens
    num_top: int


@dataclass(frozen=True, slots=True)
class PooledRows:
    """Hidden states that are summed for an embedding."""

    request_id: int
    rows: list[slice]


@dataclass(frozen=True, slots=True)
class LocalBatch:
    tokens: torch.Tensor  # [n] int64
    positions: torch.Tensor  # [n] int64
    kv_rows: slice  # hidden states whose keys and values this rank projects
    groups: list[GroupRows]
    last: LastLayer | None  # None: it runs as all others do
    samples: list[SampleRow]  # rows here and below: of the hidden states after the last layer
    pooled: list[PooledRows]
    scored: list[ScoredRows]
