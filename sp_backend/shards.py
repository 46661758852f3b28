"""Which rows of full tensors a rank holds, for callers who pass tensors and not pages.

Formats are named by their axes: T tokens of all sequences, one after the other; B sequences; S tokens of one; N heads;
D head_dim; H is N and D in one. Inside, everything is TND.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from operator import index
from typing import SupportsIndex

import torch
from torch import Tensor

from sp_backend.layout import Kind, Layout

LAYOUTS: tuple[Kind, ...] = ("zigzag", "contiguous")
FORMATS = ("TND", "BSND", "SBND", "BSH", "SBH")


@dataclass(frozen=True)
class Shards:
    """Sequences of any lengths, each cut over all ranks. A rank's rows go sequence by sequence, by position in each."""

    layout: Layout
    lengths: tuple[int, ...]

    @cached_property
    def rows(self) -> list[tuple[int, ...]]:
        """[sequence][chunk of new tokens]."""
        return [self.layout.cut_pages(n, 1) for n in self.lengths]

    def num_rows(self, rank: int) -> int:
        return sum(rows[c] for rows in self.rows for c in self.layout.q_of(rank))

    def tokens(self, rank: int) -> Tensor:
        """[rows] int64: which of all sequences' tokens a rank's rows are."""
        return self.positions(rank, list(accumulate(self.lengths[:-1], initial=0)))

    def positions(self, rank: int, starts: Sequence[int]) -> Tensor:
        """[rows] int64, starts being the position of each sequence's first token."""
        parts = [torch.empty(0, dtype=torch.int64)]
        for rows, start in zip(self.rows, starts, strict=True):
            ends = list(pairwise(accumulate(rows, initial=start)))
            parts += [torch.arange(*ends[c]) for c in self.layout.q_of(rank)]
        return torch.cat(parts)

    def chunks(self, rank: int) -> dict[int, slice]:
        """Query chunk -> its rows, once `by_chunk` has put them together."""
        own = self.layout.q_of(rank)
        ends = accumulate((sum(rows[c] for rows in self.rows) for c in own), initial=0)
        return {c: slice(lo, hi) for c, (lo, hi) in zip(own, pairwise(ends), strict=True)}

    def by_chunk(self, rank: int) -> Tensor | None:
        """[rows] int64: the order of a rank's rows that puts each chunk's together; None: they are."""
        own = self.layout.q_of(rank)
        if len(own) == 1 or len(self.lengths) == 1:
            return None
        sizes = torch.tensor([rows[c] for rows in self.rows for c in own])
        chunk_of_row = torch.arange(len(own)).repeat(len(self.rows)).repeat_interleave(sizes)
        return chunk_of_row.argsort(stable=True)


@lru_cache(maxsize=64)
def cut(kind: Kind, num_ranks: int, lengths: tuple[int, ...]) -> Shards:
    """Raises ValueError for layouts that do not cut sequences."""
    if kind not in LAYOUTS:
        raise ValueError(f"layout is {kind!r}: choose one of {', '.join(LAYOUTS)}")
    return Shards(Layout(num_ranks, kind, 1, 1), lengths)


def token_counts(values: Iterable[SupportsIndex], name: str) -> tuple[int, ...]:
    """Numbers of tokens, at least one of them. Raises ValueError naming the argument."""
    try:
        counts = tuple(index(n) for n in values)
    except TypeError:
        counts = ()
    if not counts or min(counts) < 0:
        raise ValueError(f"{name} is {values!r}: give numbers of tokens, as ints")
    return counts


def full_lengths(lengths: int | Sequence[int], input_format: str, x: Tensor | None = None) -> tuple[int, ...]:
    """One length a sequence; with a batch axis, an int stands for each of x's sequences."""
    if input_format not in FORMATS:
        raise ValueError(f"input_format is {input_format!r}: choose one of {', '.join(FORMATS)}")
    given = token_counts([lengths] if isinstance(lengths, int) else lengths, "lengths")
    if input_format == "TND" or x is None:
        return given
    if x.ndim < 2:
        raise ValueError(f"a tensor of shape {list(x.shape)} lacks the axes B and S of input_format {input_format}")
    batch = x.shape[input_format.index("B")]
    given = given * batch if isinstance(lengths, int) else given
    if len(given) != batch or len(set(given)) != 1:
        raise ValueError(
            f"lengths is {lengths!r}: input_format {input_format} with {batch} sequences needs one length for all of "
            "them; give it as an int, or use input_format 'TND'"
        )
    return given


def to_rows(x: Tensor, input_format: str) -> Tensor:
    """[tokens, ...], sequence by sequence, of a tensor whose first axes are those of the format."""
    if input_format == "TND":
        return x
    return (x.transpose(0, 1) if input_format.startswith("SB") else x).flatten(0, 1)


def from_rows(rows: Tensor, input_format: str, num_sequences: int) -> Tensor:
    """What to_rows was given."""
    if input_format == "TND":
        return rows
    x = rows.reshape(num_sequences, rows.shape[0] // num_sequences, *rows.shape[1:])
    return x.transpose(0, 1).contiguous() if input_format.startswith("SB") else x
