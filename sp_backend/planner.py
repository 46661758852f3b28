"""Picks how a step's prompts are spread: which strategy, over how many ranks, or off. Pure: no torch.

Off (plan "local") is always a candidate: a prompt on one rank, all of its dense work too, nothing sent. A decision
looks predicted step times up in a table that is made once (table.py).
On near ties off wins: sharing must be predicted to gain more than predictions are wrong by (`Machine.error`) and than
ranks that wait for each other are held up (`delay`), and off cannot be slower than itself. Variants that gain next to
nothing over those kept are not kept, so that workers build few plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from sp_backend.clock import Times
from sp_backend.cost import Cost, PlanCost
from sp_backend.geometry import Geometry
from sp_backend.layout import Kind
from sp_backend.placement import Batch, assign, lay_out, work_of
from sp_backend.plan import Plan
from sp_backend.shape import ModelShape, Sizes
from sp_backend.strategies import STRATEGIES, Variant, plan_for, variants
from sp_backend.table import Axes, Table
from sp_backend.topology import Floats, Machine

OFF: Final = Variant("local")
TIE: Final = 0.02  # a variant is kept for what it gains over the others kept
HIDDEN: Final = 0.03  # share of a step that communication may cost and be called hidden

_REMEMBERED: Final = 4096  # sizes of prompts
_APART: Final = 1, 2, 5, 11  # places between points of the table, by time, that two groups of ranks are tried with


class Choice(msgspec.Struct, frozen=True):
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
    margin: float  # by which sharing a prompt has to be predicted to be faster than off: a share of the time,
    delay: float  # and seconds

    @property
    def reason(self) -> str:
        """In a line; written when it is asked for, as a decision has to be quick."""
        if self.variant == OFF:
            told = f"off: {_milliseconds(self.seconds)} on one rank a prompt"
            least = f"{self.margin:.0%}" + (f" and {_milliseconds(self.delay)}" if self.delay else "")
            return told if self.forced else f"{told}, and sharing one gains less than {least}"
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


class Planner:
    """Made once for a machine and a model; `choose` for each step. Its table, made at first use, takes 0.1 s of one
    core for 2 ranks, 0.2 s for 4, 1 s for 8 and 2.4 s for 16.

    num_ranks: the SP size, at most the machine's ranks. layout: the server's. kind: of the chunks; None: each
    strategy's default. redundant_kv: in layout heads, of new tokens. candidates: None: every variant that fits. delay:
    seconds that a step may take longer than predicted where ranks wait for each other, as when other processes use
    their cores. Raises ValueError where a candidate does not fit.
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
        delay: float = 0.0,
    ) -> None:
        self._delay = delay
        self.machine, self.shape, self.num_ranks = machine.first(num_ranks), shape, num_ranks
        self._kind, self._causal, self._redundant_kv, self._page_size = kind, causal, redundant_kv, page_size
        if candidates is None:
            candidates = variants(num_ranks, shape.num_heads, layout) if num_ranks > 1 else []
        spread = sorted((v for v in candidates if v != OFF), key=lambda v: v.degree or num_ranks)
        self.candidates: list[Variant] = ([OFF] if layout == "tokens" else []) + spread
        if not self.candidates:
            raise ValueError("no candidates: give at least one variant for layout heads")
        self._costs = {v: PlanCost(self._plan(v), self.machine, shape) for v in self.candidates}
        self._degree_of_pages = lru_cache(_REMEMBERED)(self._decide)

    def on(self, machine: Machine) -> Planner:
        """The same candidates on a machine whose first ranks are linked alike, but at other rates."""
        other = copy(self)
        other.machine = machine.first(self.num_ranks)
        other._costs = {v: cost.on(other.machine) for v, cost in self._costs.items()}
        other._degree_of_pages = lru_cache(_REMEMBERED)(other._decide)
        for made in ("_table", "_dense_pairs"):
            other.__dict__.pop(made, None)
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
        steps = table.steps(batch, self._groups(batch, [d for d in table.columns if degree in (None, d) or d == 1]))
        found = {d: min(seconds) for d, seconds in steps.by_degree.items()}
        best = degree or self._best_degree(found)
        seconds = steps.by_degree[best]
        column = table.columns[best].start + seconds.index(found[best])
        return Choice(
            variant=table.variants[column],
            degree=best,
            seconds=found[best],
            off_seconds=found.get(1),
            exposed=table.exposed(steps, column),
            second=table.second(steps, best),
            forced=degree is not None,
            batch=batch,
            shape=self.shape,
            margin=self.machine.error,
            delay=self._delay,
        )

    def degree_for(self, new: int, cached: int) -> int:
        """How many ranks should share one prompt that is alone; 1: it is best left on one. Decided once for all prompts
        of as many pages: the server of a short prompt has little else to do than to decide.
        """
        return self._degree_of_pages(-(-new // self._page_size), -(-cached // self._page_size))

    def step_seconds(self, variant: Variant, batches: Sequence[Batch]) -> Floats:
        """Predicted for each batch, all of as many prompts, under one candidate."""
        rows = [self.lay_out(variant, batch).rows for batch in batches]
        sizes = Sizes(np.array(rows, np.int64), np.ones((len(rows), len(rows[0])), np.int64))
        return self._costs[variant].times(sizes).step

    def handicap(self, degree: int) -> tuple[float, float]:
        """What predicted seconds are multiplied by, and what is added to them, before degrees are compared."""
        return (1.0, 0.0) if degree == 1 else (1.0 + self.machine.error, self._delay)

    def degree(self, variant: Variant) -> int:
        """How many ranks share a prompt under a candidate."""
        return 1 if variant == OFF else variant.degree or self.num_ranks

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
            size = self.degree(variant)
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

    def _decide(self, new: int, cached: int) -> int:
        """The degree of a prompt of so many pages."""
        return self.choose([(new * self._page_size, cached * self._page_size)]).degree

    def _best_degree(self, seconds: Mapping[int, float]) -> int:
        """Of seconds by degree."""

        def counted(degree: int) -> float:
            share, delay = self.handicap(degree)
            return seconds[degree] * share + delay

        return min(seconds, key=counted)

    def _groups(self, batch: Batch, degrees: Sequence[int]) -> dict[int, list[list[int]]]:
        """The prompts of each group of ranks that has any, by degree."""
        if len(batch) == 1:
            return dict.fromkeys(degrees, [[0]])
        work = work_of(batch, self._dense_pairs)
        found = {degree: assign(work, self.num_ranks // degree) for degree in degrees}
        if 1 in found and len(batch) > self.num_ranks:  # nothing is shared, so only the most work counts
            found[1] = [max(found[1], key=lambda group: sum([work[i] for i in group]))]
        elif 1 in found:
            found[1] = found[1][:1]
        return found

    @cached_property
    def _table(self) -> Table:
        """Variants that win nowhere are left out."""
        step = np.stack([times.step for times in self._times(self.candidates, Axes.even(self.num_ranks))], -1)
        degrees = np.array([self.degree(v) for v in self.candidates])
        kept = [i for d in np.unique(degrees) for i in _cover(step, np.flatnonzero(degrees == d), self.num_ranks // d)]
        variants = [self.candidates[i] for i in kept]
        axes = Axes.by_page(self.num_ranks, self._page_size)
        sizes = degrees[kept].tolist()  # ascending
        columns = {d: slice(sizes.index(d), sizes.index(d) + sizes.count(d)) for d in dict.fromkeys(sizes)}
        return Table(
            axes,
            self.shape,
            self.machine.rates,
            variants,
            columns,
            self._times(variants, axes),
            [self._least(v) for v in variants],
        )

    def _times(self, variants: Sequence[Variant], axes: Axes) -> list[Times]:
        """Of each variant at all points."""
        sizes: dict[tuple[object, ...], Sizes] = {}
        found = []
        for variant in variants:
            layout = self.plan(variant).layout
            key = layout.kind, layout.history, layout.group_size
            if key not in sizes:
                sizes[key] = axes.sizes(layout, self._page_size)
            found.append(self._costs[variant].times(sizes[key]))
        return found

    def _least(self, variant: Variant) -> Times:
        """With a token in every chunk."""
        cost = self._costs[variant]
        one = np.ones((1, 1, cost.plan.layout.num_chunks), np.int64)
        return cost.times(Sizes(one, one[..., 0]))


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


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.3g} MB"
