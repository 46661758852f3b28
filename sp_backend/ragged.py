"""A few ragged sequences, laid out as a layout cuts them, on which a plan is proved token by token. Pure: no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sp_backend.layout import Block, Heads, Layout


@dataclass(frozen=True, slots=True)
class Fold:
    """One attend's share of a state."""

    heads: Heads
    kv: Block
    causal: bool


class RaggedSample:
    """Ragged sequences laid out by the layout's own cut, to count (query token, key token) pairs."""

    def __init__(self, layout: Layout, page_size: int = 2) -> None:
        self.layout = layout
        self.positions: list[list[NDArray[np.int64]]] = []  # [sequence][chunk] -> absolute positions
        long = page_size * (2 * layout.num_new // layout.num_groups + 1) + 1
        cases = [(long, long + 3), (3, 0)] if layout.kind != "home" else [(3, 9), (1, 5)]
        for group in range(layout.num_groups):
            for i, (num_new, num_old) in enumerate(cases):
                self.positions.append(self._lay_out(group, i, num_new, num_old, page_size))

    def _lay_out(self, group: int, index: int, num_new: int, num_old: int, page_size: int) -> list[NDArray[np.int64]]:
        lay = self.layout
        old = np.arange(0 if lay.history == "none" else num_old)
        new = len(old) + np.arange(num_new)
        first, size = group * lay.group_size, lay.group_size
        if lay.kind == "home":
            home = first + index * (size - 1)
            chunks = [new if c == home else new[:0] for c in range(lay.num_new)]
        else:
            cuts = np.cumsum(lay.cut_pages(num_new, page_size, group))
            chunks = np.split(new, cuts[:-1])
        if lay.history != "none":
            owners = first + (old // page_size + index) % size
            chunks += [old if lay.history == "copies" else old[owners == r] for r in range(lay.num_ranks)]
        return chunks

    def count(self, state: Block, folds: list[Fold]) -> Iterator[str]:
        """Each visible pair of tokens is seen once by every head of the state."""
        cuts = sorted({*state.heads, *(x for f in folds for x in f.heads)})
        of_head: dict[int, list[Fold]] = defaultdict(list)  # first head of a range -> its folds
        for f in folds:
            for lo in cuts[bisect_left(cuts, f.heads[0]) : bisect_left(cuts, f.heads[1])]:
                of_head[lo].append(f)
        for index, chunks in enumerate(self.positions):
            q, k = chunks[state.chunk], np.concatenate(chunks)
            if not len(q):
                continue
            ends = np.cumsum([len(c) for c in chunks]).tolist()
            want = k <= q[:, None] if self.layout.causal else np.ones((len(q), len(k)), bool)
            if self.layout.history == "copies":  # those of other ranks are of the same tokens
                own = self.layout.history_of(self.layout.owner(state.chunk))
                for c in range(self.layout.num_new, self.layout.num_chunks):
                    want[:, ends[c] - len(chunks[c]) : ends[c]] &= c == own
            for lo, hi in zip(cuts, cuts[1:], strict=False):
                seen = np.zeros((len(q), len(k)), int)
                for f in of_head[lo]:
                    rows, (i, n) = len(chunks[f.kv.chunk]), f.kv.piece
                    first = ends[f.kv.chunk] - rows
                    since, until = first + rows * i // n, first + rows * (i + 1) // n
                    if since < until:
                        seen[:, since:until] += np.tri(len(q), until - since, dtype=np.int64) if f.causal else 1
                if (seen != want).any():
                    yield f"{state} heads {lo}:{hi}: a pair of tokens of sample {index} is not seen once"
