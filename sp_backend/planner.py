"""Picks how a step's prompts are spread: which strategy, over how many ranks, or off. Pure: no torch.

Off (plan "local") is always a candidate: a prompt on one rank, all of its dense work too, nothing sent. A table of
predicted step times is computed once, for each candidate over new tokens, cached tokens and the number of prompts
they belong to; a decision interpolates it. Prompts that share a step are characterised by what costs: the sums of new
and cached tokens, and of visible (query, key) pairs, given as the number of equal prompts with as many pairs.
On near ties off wins: sharing must be predicted to gain more than predictions are wrong by (`Machine.error`), and off
cannot be slower than itself. Variants that gain next to nothing over those kept are not kept, so that workers build
few plans.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from sp_backend.cost import Cost, PlanCost
from sp_backend.geometry import Geometry
from sp_backend.layout import Kind, Layout
from sp_backend.plan import Plan
from sp_backend.shape import ModelShape, Sizes
from sp_backend.strategies import STRATEGIES, Variant, plan_for, variants
from sp_backend.topology import Floats, Machine

OFF: Final = Variant("local")
TIE: Final = 0.02  # a variant is kept for what it gains over the others kept
HIDDEN: Final = 0.03  # share of a step that communication may cost and be called hidden

_NEW: Final = tuple(round(2 ** (k / 2)) for k in range(41))  # new tokens of a step
_CACHED_UNIT: Final = 256
_CACHED: Final = tuple(_CACHED_UNIT * (2**k - 1) for k in range(0, 14))
_PROMPTS: Final = (1, 3, 9, 27)
_EVEN: Final = "ring_pass_q", "token_ring", "ulysses"  # every rank attends to a part of every query
_APART: Final = 1, 2, 5, 11  # places between points of the table, by time, that two groups of ranks are tried with
_UNEVEN_PAGES: Final = 32  # of a rank; a page more or less is left out from there on

Batch = Sequence[tuple[int, int]]  # (new, cached) tokens of each prompt


@dataclass(frozen=True, slots=True)
class Choice:
    """second: the next best variant of the same degree, and its predicted seconds. forced: the degree was given."""

    variant: Variant
    degree: int  # ranks that share a prompt; 1: off
    seconds: float  # predicted for the whole step
    off_seconds: float | None  # the same, were it off; None: not among the candidates
    exposed: float  # seconds of the step that communication costs
    second: tuple[Variant, float] | None
    forced: bool
    batch: Batch
    shape: ModelShape
    margin: float  # by which sharing a prompt has to be predicted to be faster than off

    @property
    def reason(self) -> str:
        """In a line; written when it is asked for, as a decision has to be quick."""
        if self.variant == OFF:
            told = f"off: {_milliseconds(self.seconds)} on one rank a prompt"
            return told if self.forced else f"{told}, and sharing one gains less than {self.margin:.0%}"
        shape = self.shape
        new, total = sum(t for t, _ in self.batch), sum(t + c for t, c in self.batch)
        q = new * shape.num_heads * (2 * shape.head_dim * shape.itemsize + 4)
        kv = total * 2 * shape.num_kv_heads * shape.head_dim * shape.itemsize
        share = self.exposed / self.seconds
        waits = "communication hidden" if share < HIDDEN else f"{share:.0%} of it waits for communication"
        told = f"{self.variant}: {_milliseconds(self.seconds)}; Q and state are {_megabytes(q)}, KV "
        told += f"{_megabytes(kv)} a layer; {waits}"
        if self.second is not None:
            told += f"; {self.second[1] / self.seconds:.2f}x over {self.second[0]}"
        if self.off_seconds is not None:
            told += f"; {self.off_seconds / self.seconds:.2f}x over off"
        return told


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant costed for one batch."""

    variant: Variant
    degree: int
    plan: Plan
    geometry: Geometry
    cost: Cost


def lay_out(layout: Layout, batch: Batch, page_size: int = 1, dense_pairs: float = 0.0) -> Geometry:
    """Rows of each prompt in each chunk: prompts are given to groups of ranks, the largest first, each to the group
    with the least work; new tokens are cut between pages, cached ones are even over the group's ranks.

    dense_pairs: (query, key) pairs that a new token's other work is worth.
    """
    size, groups = layout.group_size, layout.num_groups
    rows: list[list[int]] = [[]] * len(batch)
    for group, indices in enumerate(_assign(_work(batch, dense_pairs), groups)):
        for i in indices:
            new, cached = batch[i]
            if layout.kind == "home":
                chunks = [new if c == group * size else 0 for c in range(layout.num_new)]
            else:
                chunks = list(layout.cut_pages(new, page_size, group))
            if layout.history != "none":
                shares = [cached * (r + 1) // size - cached * r // size for r in range(size)]
                if layout.history == "copies":
                    shares = [cached] * size
                before, after = group * size, (groups - 1 - group) * size
                chunks += [0] * before + shares + [0] * after
            rows[i] = chunks
    return Geometry(rows)


def _work(batch: Batch, dense_pairs: float) -> list[float]:
    return [new * (cached + new / 2 + dense_pairs) for new, cached in batch]


def _assign(work: Sequence[float], num_groups: int) -> list[list[int]]:
    """Indices of the prompts of each group."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    if num_groups == 1:
        return [list(range(len(work)))]
    load = [0.0] * num_groups
    for i in sorted(range(len(work)), key=work.__getitem__, reverse=True):
        least = load.index(min(load))
        groups[least].append(i)
        load[least] += work[i]
    return groups


class Planner:
    """Made once for a machine and a model; `choose` for each step. Its table, made at first use, takes 0.1 s of one
    core for 2 ranks, 0.4 s for 4, 2.4 s for 8 and 1 s for 16; a decision on one prompt takes about 30 us.

    num_ranks: the SP size, at most the machine's ranks. layout: the server's. kind: of the chunks; None: each
    strategy's default. redundant_kv: in layout heads, of new tokens. candidates: None: every variant that fits. Raises
    ValueError where one does not.
    """

    def __init__(
        self,
        machine: Machine,
        shape: ModelShape,
        num_ranks: int,
        *,
        layout: Literal["tokens", "heads"] = "tokens",
        kind: Kind | None = None,
        causal: bool = True,
        redundant_kv: bool = False,
        page_size: int = 16,
        candidates: Sequence[Variant] | None = None,
    ) -> None:
        self.machine, self.shape, self.num_ranks = machine.first(num_ranks), shape, num_ranks
        self._kind, self._causal, self._redundant_kv, self._page_size = kind, causal, redundant_kv, page_size
        if candidates is None:
            candidates = variants(num_ranks, shape.num_heads, layout) if num_ranks > 1 else []
        spread = sorted((v for v in candidates if v != OFF), key=lambda v: v.degree or num_ranks)
        self.candidates: list[Variant] = ([OFF] if layout == "tokens" else []) + spread
        if not self.candidates:
            raise ValueError("no candidates: give at least one variant for layout heads")
        self._costs = {v: PlanCost(self._plan(v), self.machine, shape) for v in self.candidates}

    def on(self, machine: Machine) -> Planner:
        """The same candidates on a machine whose first ranks are linked alike, but at other rates."""
        other = copy(self)
        other.machine = machine.first(self.num_ranks)
        other._costs = {v: cost.on(other.machine) for v, cost in self._costs.items()}
        other.__dict__.pop("_table", None)
        other.__dict__.pop("_dense_pairs", None)
        return other

    @property
    def winners(self) -> list[Variant]:
        """The variants that choose() can return, off included: the plans that workers have to build."""
        return list(self._table.variants)

    @property
    def degrees(self) -> list[int]:
        """The degrees that degree_for() can return, and the number of ranks."""
        return list(self._table.columns)

    def choose(self, batch: Batch, degree: int | None = None) -> Choice:
        """How to run a step of these (new, cached) prompts, or the best way over `degree` ranks where they have been
        placed already. Takes some tens of microseconds.
        """
        table = self._table
        if degree is not None and degree not in table.columns:
            raise ValueError(f"degree is {degree}; this planner has {', '.join(map(str, table.columns))}")
        found = self._predict(batch, degree)
        seconds = {d: math.exp(point.logs[column]) for d, (point, column) in found.items()}
        best = min(
            (d for d in found if degree in (None, d)),
            key=lambda d: seconds[d] if d == 1 else seconds[d] * (1.0 + self.machine.error),
        )
        point, column = found[best]
        return Choice(
            variant=table.variants[column],
            degree=best,
            seconds=seconds[best],
            off_seconds=seconds.get(1),
            exposed=table.exposed(point, column),
            second=table.second(point, column, table.columns[best]),
            forced=degree is not None,
            batch=batch,
            shape=self.shape,
            margin=self.machine.error,
        )

    def degree_for(self, new: int, cached: int) -> int:
        """How many ranks should share one prompt that is alone; 1: it is best left on one."""
        return self.choose([(new, cached)]).degree

    def step_seconds(self, variant: Variant, batches: Sequence[Batch]) -> Floats:
        """Predicted for each batch, all of as many prompts, under one candidate."""
        rows = [self.lay_out(variant, batch).rows for batch in batches]
        sizes = Sizes(np.array(rows, np.int64), np.ones((len(rows), len(rows[0])), np.int64))
        return self._costs[variant].times(sizes).step

    def plan(self, variant: Variant) -> Plan:
        """A candidate's; not proved."""
        return self._costs[variant].plan

    def lay_out(self, variant: Variant, batch: Batch) -> Geometry:
        """A batch as it would be spread under one candidate."""
        return lay_out(self.plan(variant).layout, batch, self._page_size, self._dense_pairs)

    def rank_candidates(self, batch: Batch, degree: int | None = None) -> list[Candidate]:
        """Every candidate (of a degree) costed for the very batch, fastest first; slower than choose."""
        found = []
        for variant in self.candidates:
            size = self._degree(variant)
            if degree is None or size == degree:
                cost, geometry = self._costs[variant], self.lay_out(variant, batch)
                found.append(Candidate(variant, size, cost.plan, geometry, cost.cost(geometry)))
        return sorted(found, key=lambda c: c.cost.step_seconds)

    def _plan(self, variant: Variant) -> Plan:
        return plan_for(
            variant,
            num_ranks=self.num_ranks,
            num_heads=self.shape.num_heads,
            num_kv_heads=self.shape.num_kv_heads,
            causal=self._causal,
            redundant_kv=self._redundant_kv,
            kind=self._kind if self._kind in STRATEGIES[variant.strategy].kinds else None,
            proven=False,
        )

    @cached_property
    def _dense_pairs(self) -> float:
        """(query, key) pairs that a new token's other work is worth."""
        shape, rates = self.shape, self.machine.rates
        attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim
        return shape.dense_flops / attention * max(rates.kernel.full[-1]) / rates.dense_flops

    def _degree(self, variant: Variant) -> int:
        return 1 if variant == OFF else variant.degree or self.num_ranks

    def _predict(self, batch: Batch, degree: int | None) -> dict[int, tuple[_Point, int]]:
        """The best column of each degree, or of one and off, and where in the table it is."""
        table = self._table
        asked = {d: columns for d, columns in table.columns.items() if degree in (None, d) or d == 1}
        work = _work(batch, self._dense_pairs)
        found, at = {}, cache(table.at)  # degrees meet the same loads
        for d, columns in asked.items():
            groups = [g for g in _assign(work, self.num_ranks // d) if g]
            if d == 1:  # nothing is shared, so only the most work counts
                groups = [max(groups, key=lambda g: sum([work[i] for i in g]))]
            point = self._point([[batch[i] for i in g] for g in groups], d, at)
            found[d] = point, table.best(point, columns)
        return found

    def _point(self, groups: Sequence[Batch], degree: int, at: Callable[..., _Point]) -> _Point:
        """Where groups of `degree` ranks, each with these prompts, are in the table.

        Of one prompt of few pages some ranks have more than others, by jumps: between two points of the table its place
        is that of its busiest rank. Strategies under which every rank attends to a part of every query do not jump.
        """
        table = self._table
        point = _slowest([at(*_load(batch)) for batch in groups])
        if degree == 1 or len(groups) > 1 or len(groups[0]) > 1:
            return point
        new, cached = groups[0][0]
        pages, most = -(-new // self._page_size), self._most_pages[degree]
        if pages >= len(most):
            return point
        place = table.between(new, lambda n: most[min(-(-n // self._page_size), len(most) - 1)])
        jumps = at(place, cached, 1.0)
        logs = zip(point.logs, jumps.logs, table.even, strict=True)
        return _Point([a if even else b for a, b, even in logs], point.weights, point.corner)

    @cached_property
    def _most_pages(self) -> dict[int, list[int]]:
        """Degree -> for each number of a prompt's new pages, those of the rank that has most."""
        found = {}
        for degree in self._table.columns.keys() - {1}:
            layout = self._costs[self._table.variants[self._table.columns[degree][0]]].plan.layout
            owners = [layout.page_ranks(pages, 1) for pages in range(_UNEVEN_PAGES * degree)]
            found[degree] = [max(map(ranks.count, ranks), default=0) for ranks in owners]
        return found

    # The table

    @cached_property
    def _table(self) -> _Table:
        """Variants that win nowhere are left out, and degrees at which no prompt that is alone would be placed."""
        grid = _Grid.of(self.num_ranks)
        sizes: dict[tuple[object, ...], Sizes] = {}
        seconds, exposed = [], []
        for cost in self._costs.values():
            layout = cost.plan.layout
            key = layout.kind, layout.history, layout.group_size
            if key not in sizes:
                sizes[key] = grid.sizes(layout, self._page_size)
            times = cost.times(sizes[key])
            seconds.append(times.step.reshape(grid.shape))
            exposed.append((self.shape.num_layers * times.exposed).reshape(grid.shape))
        degrees = np.array([self._degree(v) for v in self.candidates])
        step = np.stack(seconds, -1)
        kept = [i for d in np.unique(degrees) for i in _cover(step, np.flatnonzero(degrees == d), self.num_ranks // d)]
        columns: dict[int, list[int]] = {}
        for column, i in enumerate(kept):
            columns.setdefault(int(degrees[i]), []).append(column)
        return _Table(
            grid, [self.candidates[i] for i in kept], columns, step[..., kept], np.stack(exposed, -1)[..., kept]
        )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.3g} MB"


@dataclass(frozen=True)
class _Grid:
    """Axes of the table, each even in its coordinate: log2(new), log2(1 + cached / 256), log2(prompts)."""

    new: tuple[int, ...]
    cached: tuple[int, ...]
    prompts: tuple[int, ...]

    @classmethod
    def of(cls, num_ranks: int) -> _Grid:
        """Coarser for more ranks, as the cost of a plan grows with their square."""
        if num_ranks <= 4:
            return cls(_NEW, _CACHED, _PROMPTS)
        if num_ranks <= 8:
            return cls(_NEW, _CACHED, _PROMPTS)
        return cls(_NEW[::4], _CACHED[::3], _PROMPTS[::3])

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.new), len(self.cached), len(self.prompts)

    def sizes(self, layout: Layout, page_size: int) -> Sizes:
        """Every point, with each group of ranks under the same load."""
        rows, count = [], []
        for new in self.new:
            for cached in self.cached:
                for prompts in self.prompts:
                    rows.append([self._rows(layout, max(1, new // prompts), cached // prompts, page_size)])
                    count.append([prompts])
        return Sizes(np.array(rows, np.int64), np.array(count, np.int64))

    @staticmethod
    def _rows(layout: Layout, new: int, cached: int, page_size: int) -> list[int]:
        geometry = lay_out(layout, [(new, cached)] * layout.num_groups, page_size)
        return [int(n) for n in np.sum(geometry.rows, axis=0)]  # as if one prompt: masks keep groups apart

    @cached_property
    def _cells_a_unit(self) -> tuple[float, float, float]:
        """Cells in a unit of each coordinate."""
        new, cached, prompts = self.shape
        return (
            (new - 1) / math.log2(self.new[-1] / self.new[0]),
            (cached - 1) / math.log2(1 + self.cached[-1] / _CACHED_UNIT),
            (prompts - 1) / math.log2(self.prompts[-1]),
        )

    def place(self, new: float, cached: float, prompts: float) -> tuple[float, float, float]:
        """Coordinates, in cells."""
        x, y, z = self._cells_a_unit
        return (
            math.log2(max(new, 1) / self.new[0]) * x,
            math.log2(1 + cached / _CACHED_UNIT) * y,
            math.log2(max(prompts, 1)) * z,
        )


def _load(batch: Batch) -> tuple[float, float, float]:
    """New tokens, cached tokens, and the number of equal prompts with as many visible pairs."""
    new = cached = 0
    pairs = 0.0
    for t, c in batch:
        new += t
        cached += c
        pairs += t * (c + t / 2)
    return new, cached, new * (cached + new / 2) / pairs if pairs else 1.0


def _cover(seconds: Floats, columns: NDArray[np.intp], num_groups: int) -> list[int]:
    """Those of some columns that together are within TIE of their best everywhere: the one that is near the best most
    often, then the same for what is left. Of two groups the slower counts, so a column that is never the best may be so
    for two unlike loads that take about as long.
    """
    among = seconds[..., columns].reshape(-1, len(columns))
    if num_groups > 1:
        among = among[among.min(-1).argsort()]
        among = np.concatenate([among, *(np.maximum(among[apart:], among[:-apart]) for apart in _APART)])
    near = among <= among.min(-1, keepdims=True) * (1 + TIE)
    left, kept = np.ones(len(among), bool), []
    while left.any():
        best = int(near[left].sum(0).argmax())
        kept.append(best)
        left &= ~near[:, best]
    return [int(columns[i]) for i in sorted(kept)]


@dataclass(frozen=True, slots=True)
class _Point:
    """Interpolated at one point: logarithms of each variant's seconds, and how to get at what else is tabulated."""

    logs: list[float]
    weights: tuple[float, ...]
    corner: tuple[slice, slice, slice]


def _slowest(points: Sequence[_Point]) -> _Point:
    """Of groups of ranks: each variant's slowest counts."""
    first, *others = points
    if not others:
        return first
    return _Point(list(map(max, first.logs, *[o.logs for o in others])), first.weights, first.corner)


class _Table:
    """Predictions [new, cached, prompts, variants]; columns: degree -> variants, as indices."""

    def __init__(
        self, grid: _Grid, kept: Sequence[Variant], columns: dict[int, list[int]], seconds: Floats, exposed: Floats
    ) -> None:
        self.variants, self.columns = list(kept), columns
        self.even = [variant.strategy in _EVEN for variant in kept]
        self._grid, self._exposed = grid, exposed
        self._logs = np.ascontiguousarray(np.log(seconds))

    def at(self, new: float, cached: float, prompts: float) -> _Point:
        """Logarithms of seconds are interpolated; beyond the table they go on as in its last cell."""
        x, y, z = self._grid.place(new, cached, prompts)
        nx, ny, nz = self._grid.shape
        i, j, k = min(int(x), nx - 2), min(int(y), ny - 2), min(int(z), nz - 2)
        x, y, z = x - i, y - j, z - k
        a, b, c, d = (1 - x) * (1 - y), (1 - x) * y, x * (1 - y), x * y
        weights = (a * (1 - z), a * z, b * (1 - z), b * z, c * (1 - z), c * z, d * (1 - z), d * z)
        corner = slice(i, i + 2), slice(j, j + 2), slice(k, k + 2)
        return _Point(np.dot(weights, self._logs[corner].reshape(8, -1)).tolist(), weights, corner)

    def between(self, new: int, measure: Callable[[int], int]) -> float:
        """New tokens as far between two points of the table as `measure` of `new` is between those of these."""
        axis = self._grid.new
        i = min(max(bisect_right(axis, new), 1), len(axis) - 1)
        low, high = measure(axis[i - 1]), measure(axis[i])
        if low == high:
            return new
        part = min(max(math.log(measure(new) / low) / math.log(high / low), 0.0), 1.0)
        return math.exp((1 - part) * math.log(axis[i - 1]) + part * math.log(axis[i]))

    def best(self, point: _Point, columns: list[int]) -> int:
        """The fastest of some variants."""
        return min(columns, key=point.logs.__getitem__)

    def exposed(self, point: _Point, column: int) -> float:
        """Seconds of a step that a variant waits for communication."""
        return max(0.0, float(np.dot(point.weights, self._exposed[(*point.corner, column)].reshape(8))))

    def second(self, point: _Point, best: int, columns: list[int]) -> tuple[Variant, float] | None:
        """The fastest of the others, and its seconds."""
        column = min((c for c in columns if c != best), key=point.logs.__getitem__, default=None)
        return None if column is None else (self.variants[column], math.exp(point.logs[column]))
