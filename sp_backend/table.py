"""Predicted steps, tabulated once, and looked up for every decision. Pure: no torch.

One prompt that is alone is interpolated between points of new and cached tokens. Prompts are cut between pages, so that
of few pages some ranks have more than others, and the time jumps where a page begins: new tokens are tabulated at both
ends of every page, up to where one more or less is nothing.

Several prompts that share a group of ranks are summed: their dense work (which takes at least as long as reading the
weights), and their attention but for what a plan costs however little it is asked (rounds, calls, latencies), which
they share. One prompt's messages travel while another's keys are attended, so that at best what counts is the longer
of two sums, of the ranks' own work and of their links', and what of each prompt's time neither explains; at worst one
prompt comes after the other. The truth is nearer to the best: rounds are uneven, and hide a part of it less.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from math import inf
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sp_backend.clock import Times
from sp_backend.layout import Layout
from sp_backend.placement import Batch, lay_out
from sp_backend.shape import ModelShape, Sizes
from sp_backend.strategies import Variant
from sp_backend.topology import Floats, Rates
from sp_backend.work import weights_seconds

_MOST_NEW: Final = 20  # as powers of two
_CACHED: Final = tuple(256 * (4**k - 1) for k in range(8))
# of what prompts could hide of each other is not hidden: errors by the cost of the very batches were the least with it
# (three unlike prompts, 240 batches on six machines drawn at random: at most 8 to 10 %, and 17 % without it)
_UNHIDDEN: Final = 0.3
_MANY_RANKS: Final = 9  # from as many on, a table is coarser: the cost of a plan grows with their square


@dataclass(frozen=True)
class Axes:
    """New and cached tokens of the points of a table."""

    new: tuple[int, ...]
    cached: tuple[int, ...] = _CACHED

    @classmethod
    def even(cls, num_ranks: int) -> Axes:
        """Wherever pages begin: few points, but of many patterns."""
        parts = 3 if num_ranks < _MANY_RANKS else 1
        return cls(tuple(sorted({round(2 ** (k / parts)) for k in range(parts * _MOST_NEW + 1)})))

    @classmethod
    def by_page(cls, num_ranks: int, page_size: int) -> Axes:
        """Both ends of each page, while they are so few that one more or less of a rank matters."""
        pages = range((16 if num_ranks < _MANY_RANKS else 4) * num_ranks)
        ends = {new for page in pages for new in (page * page_size + 1, (page + 1) * page_size)}
        others = {new for new in cls.even(num_ranks).new if new < page_size or new > len(pages) * page_size}
        return cls(tuple(sorted(ends | others)))

    def cell(self, new: int, cached: int) -> tuple[int, int]:
        """Which points a prompt comes after; the last ones but one beyond the table."""
        i = min(max(bisect_right(self.new, new), 1), len(self.new) - 1) - 1
        return i, min(bisect_right(self.cached, cached), len(self.cached) - 1) - 1

    def sizes(self, layout: Layout, page_size: int) -> Sizes:
        """Every point, with each group of ranks under the same load."""
        by_new = [_rows(layout, new, 0, page_size) for new in self.new]
        by_cached = [_rows(layout, 0, cached, page_size) for cached in self.cached]
        rows = np.array(by_new, np.int64)[:, None] + np.array(by_cached, np.int64)
        rows = rows.reshape(-1, 1, layout.num_chunks)
        return Sizes(rows, np.ones((len(rows), 1), np.int64))


def _rows(layout: Layout, new: int, cached: int, page_size: int) -> list[int]:
    """Of each chunk, as if all groups shared one prompt: masks keep them apart."""
    one = list(lay_out(layout, [(new, cached)], page_size).rows[0])  # the first group's
    groups, first_history = layout.num_groups, layout.num_new
    return one[: layout.num_new // groups] * groups + one[first_history:][: layout.group_size] * groups


@dataclass(frozen=True, slots=True)
class Steps:
    """One batch: seconds of each variant of a degree, and where in the table they are from."""

    by_degree: Mapping[int, list[float]]
    cells: NDArray[np.intp]  # [prompts, corners]
    weights: Floats


class Table:
    """Steps of one prompt at all points; of several they are put together.

    columns: degree -> its variants. times: of each variant. fixed: of each, with next to nothing to do.
    """

    def __init__(
        self,
        axes: Axes,
        shape: ModelShape,
        rates: Rates,
        variants: Sequence[Variant],
        columns: Mapping[int, slice],
        times: Sequence[Times],
        fixed: Sequence[Times],
    ) -> None:
        self.variants, self.columns = list(variants), columns
        self._axes, self._weights = axes, weights_seconds(shape, rates)
        self._parts = np.concatenate(self._tell_apart(shape, rates, times), -1)  # [points, 5 x variants]
        self._fixed = np.concatenate(self._tell_apart(shape, rates, fixed)[:-1], -1)[0]
        self._exposed = [shape.num_layers * t.exposed for t in times]

    def _tell_apart(self, shape: ModelShape, rates: Rates, times: Sequence[Times]) -> list[Floats]:
        """Seconds [points, variants] of attention: its own work, its links, what neither explains, all of it; and of
        dense work. A step's fixed time counts as attention that nothing explains.
        """
        step, tokens, exposed, transfer = (
            np.stack([getattr(t, name) for t in times], -1) for name in ("step", "tokens", "exposed", "transfer")
        )
        dense = tokens * shape.dense_flops / rates.dense_flops
        attention = step - np.maximum(dense, self._weights)
        without = attention - rates.step_seconds
        own = np.maximum(without - shape.num_layers * exposed, 0.0)
        links = np.minimum(shape.num_layers * transfer, without)
        return [own, links, attention - np.maximum(own, links), attention, dense]

    def steps(self, batch: Batch, groups: Mapping[int, Sequence[Sequence[int]]]) -> Steps:
        """groups: degree -> the prompts that each group of so many ranks shares, the longest first."""
        cells, weights = self._place(batch)
        parts = np.matmul(weights[:, None], self._parts.take(cells, 0))[:, 0]  # [prompts, 5 x variants]
        if len(batch) == 1:
            rows = self._together(parts).tolist() * len(groups)
        else:
            rows = self._together_by_degree(parts, [*groups.values()])
        by_degree = {d: row[self.columns[d]] for d, row in zip(groups, rows, strict=True)}
        return Steps(by_degree, cells, weights)

    def _together_by_degree(self, parts: Floats, groups: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """[degrees, variants]: seconds of the slowest group."""
        members = list(chain.from_iterable(groups))
        attention = parts[:, : len(self._fixed)]
        least = np.minimum(attention, self._fixed)
        attention -= least
        has = [0.0] * (len(members) * len(parts))
        for first, group in zip(range(0, len(has), len(parts)), members, strict=True):
            for i in group:
                has[first + i] = 1.0
        summed = np.array(has).reshape(-1, len(parts)) @ parts
        summed[:, : len(self._fixed)] += least.take([group[0] for group in members], 0)
        found: list[list[float]] = np.maximum.reduceat(self._together(summed), _starts(groups)).tolist()
        return found

    def _together(self, parts: Floats) -> Floats:
        """[steps, variants]: seconds of steps with these parts [steps, 5 x variants]."""
        own, links, unexplained, one_by_one, dense = parts.reshape(len(parts), 5, -1).swapaxes(0, 1)
        hidden = np.minimum(np.maximum(own, links) + unexplained, one_by_one)
        attention = hidden + _UNHIDDEN * (one_by_one - hidden)
        return np.asarray(attention + np.maximum(dense, self._weights))

    def exposed(self, steps: Steps, column: int) -> float:
        """Seconds of a step that a variant waits for communication, if prompts waited one after the other."""
        return max(0.0, float(np.vdot(self._exposed[column].take(steps.cells), steps.weights)))

    def second(self, steps: Steps, degree: int) -> tuple[Variant, float] | None:
        """The next best variant of a degree, and its seconds."""
        seconds = steps.by_degree[degree].copy()
        seconds[seconds.index(min(seconds))] = inf
        least = min(seconds)
        return None if least == inf else (self.variants[self.columns[degree].start + seconds.index(least)], least)

    def _place(self, batch: Batch) -> tuple[NDArray[np.intp], Floats]:
        """The four points around each prompt, and their weights; beyond the table it goes on as in its last cell."""
        cells, weights, (by_new, by_cached) = [], [], (self._axes.new, self._axes.cached)
        width = len(by_cached)
        for new, cached in batch:
            i, j = self._axes.cell(new, cached)
            x = (new - by_new[i]) / (by_new[i + 1] - by_new[i])
            y = (cached - by_cached[j]) / (by_cached[j + 1] - by_cached[j])
            first = i * width + j
            cells.append((first, first + 1, first + width, first + width + 1))
            weights.append(((1 - x) * (1 - y), (1 - x) * y, x * (1 - y), x * y))
        return np.array(cells), np.array(weights)


def _starts(parts: Sequence[Sequence[object]]) -> list[int]:
    """Where each part begins, were they put one behind the other."""
    return list(accumulate(map(len, parts[:-1]), initial=0))
