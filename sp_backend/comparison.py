"""Every candidate for one batch, costed and ranked, and where each one's time goes. Pure: no torch.

Bytes, waits and times are those of cost.py for the very batch; the server's planner interpolates a table of the same
predictions, and prefers off on near ties.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final, Literal

import numpy as np

from sp_backend.cost import PlanCost
from sp_backend.geometry import predicted_bytes
from sp_backend.layout import Layout
from sp_backend.least import least_seconds
from sp_backend.placement import Batch, lay_out
from sp_backend.plan import Plan
from sp_backend.planner import OFF, Candidate
from sp_backend.shape import ModelShape, Sizes
from sp_backend.strategies import STRATEGIES, Options, Variant, least_of, plan_for, prove, variants
from sp_backend.topology import Floats, Machine

MOST_RANKS_OF_ALL: Final = 16  # beyond, plans are so large that costing every variant takes minutes


@dataclass(frozen=True, slots=True)
class Question:
    """machine: exactly the ranks of the SP group. forced: a variant to be shown, whatever is best."""

    machine: Machine
    shape: ModelShape
    batch: Batch
    layout: Literal["tokens", "heads"] = "tokens"
    causal: bool = True
    page_size: int = 64
    every_option: bool = False  # cost every variant, however many ranks there are
    whole_step: bool = False  # rank by the time of a forward pass, not by that of one layer's attention
    forced: Variant | None = None

    @property
    def exhaustive(self) -> bool:
        """Whether every candidate is costed, whatever it takes at least."""
        return self.every_option or self.layout == "heads" or self.machine.num_ranks <= MOST_RANKS_OF_ALL

    def is_quick(self, variant: Variant) -> bool:
        """Whether its plan has so few instructions that costing it takes no seconds."""
        return (variant.degree or self.machine.num_ranks) <= STRATEGIES[variant.strategy].quick_ranks

    def variants(self) -> list[Variant]:
        """All that fit, off first (where one rank can do a prompt alone)."""
        ranks = self.machine.num_ranks
        if self.layout == "heads":
            return [Variant("sharded_q", Options(redundant_kv=redundant)) for redundant in (False, True)]
        return [OFF, *(variants(ranks, self.shape.num_heads) if ranks > 1 else [])]

    def candidates(self) -> list[Variant]:
        """The variants to be costed: all, or of large groups each strategy's defaults at each degree."""
        found = self.variants()
        if not self.exhaustive:
            found = list(dict.fromkeys(Variant(v.strategy, degree=v.degree) for v in found))
        return found if self.forced is None or self.forced in found else [*found, self.forced]

    def degree(self, variant: Variant) -> int:
        """Ranks that share a prompt."""
        return 1 if variant == OFF else variant.degree or self.machine.num_ranks

    def groups(self, variant: Variant) -> int:
        """Groups of ranks that have a prompt: the others have nothing to do or to send."""
        return min(self.machine.num_ranks // self.degree(variant), len(self.batch))

    def plan(self, variant: Variant, groups: int) -> Plan:
        """Of so many groups; not proved."""
        ranks = groups * self.degree(variant)
        plan = plan_for(
            replace(variant, degree=None) if groups == 1 else variant,
            num_ranks=ranks,
            num_heads=self.shape.num_heads,
            num_kv_heads=self.shape.num_kv_heads,
            causal=self.causal,
            proven=False,
        )
        return replace(plan, name=str(variant))


@dataclass(frozen=True, slots=True)
class Bounded:
    """A variant that was not costed, and the least that it can take."""

    variant: Variant
    seconds: float  # of what candidates are ranked by
    slow: bool  # it might be the best, but its plan is so large that costing it takes seconds


class Comparison:
    """The candidates of a question costed, fastest first, and those that would be slower even if sending were free."""

    def __init__(self, question: Question, show: Callable[[Sequence[Variant]], Iterable[Variant]] = iter) -> None:
        """show: goes through variants as they are costed, such as a progress bar. Raises ValueError if the forced
        variant does not fit.
        """
        self.question, self._show = question, show
        self._costs: dict[tuple[Variant, int], PlanCost] = {}  # by groups
        self.ranked: list[Candidate] = []
        self.bounded: list[Bounded] = []
        self._first = cache(question.machine.first)
        candidates = question.candidates()
        least = {variant: self._least(variant) for variant in candidates}
        best = math.inf
        for variant in self._show(sorted(least, key=least.__getitem__)):
            every = question.exhaustive or variant in (question.forced, OFF)
            bounded = None if every else self._bounded(variant, least[variant], best)
            if bounded is not None:
                self.bounded.append(bounded)
                continue
            self.ranked.append(self._costed(variant))
            best = min(best, self.seconds(self.ranked[-1]))
        self.ranked.sort(key=lambda c: (self.seconds(c), candidates.index(c.variant)))
        self.best = self.ranked[0]
        self.shown = next((c for c in self.ranked if c.variant == question.forced), self.best)
        prove(self.shown.plan)

    def _bounded(self, variant: Variant, least: float, best: float) -> Bounded | None:
        """None: it may be the best, and costing it is quick."""
        question = self.question
        if least > best or not question.is_quick(variant):
            return Bounded(variant, least, slow=least <= best)
        group = self._cost(variant, 1)
        least = group.least_seconds(self._of_groups(variant, group.plan.layout))[question.whole_step]
        return Bounded(variant, least, slow=False) if least > best else None

    def _cost(self, variant: Variant, groups: int) -> PlanCost:
        """Of the plan of so many groups, on as many ranks."""
        if (variant, groups) not in self._costs:
            plan = self.question.plan(variant, groups)
            self._costs[variant, groups] = PlanCost(plan, self._first(plan.layout.num_ranks), self.question.shape)
        return self._costs[variant, groups]

    def _of_groups(self, variant: Variant, layout: Layout) -> Sizes:
        """What each group of ranks has of the batch, as a batch of its own. layout: of one group."""
        question, groups = self.question, self.question.groups(variant)
        if groups > 1:
            layout = replace(layout, num_ranks=groups * layout.num_ranks, history="own", degree=layout.num_ranks)
        rows = np.array(lay_out(layout, question.batch, question.page_size).rows)
        parts = np.split(rows, [layout.num_new], axis=1)  # new chunks and histories, each by group
        mine = np.concatenate([x.reshape(len(rows), groups, -1) for x in parts], 2).swapaxes(0, 1)
        return Sizes(mine, np.ones(mine.shape[:2], np.int64))

    def _least(self, variant: Variant) -> float:
        question = self.question
        seconds = least_seconds(
            question.machine,
            question.shape,
            question.batch,
            least_of(variant, question.degree(variant)),
            causal=question.causal,
            page_size=question.page_size,
        )
        return seconds[question.whole_step]

    def seconds(self, candidate: Candidate) -> float:
        """What candidates are ranked by."""
        if self.question.whole_step:
            return candidate.cost.step_seconds
        return candidate.cost.seconds + self.projection_seconds(candidate)

    def projection_seconds(self, candidate: Candidate) -> float:
        """In layout heads: a layer's projections to new keys and values, which redundant KV repeats on every rank."""
        layout, shape = candidate.plan.layout, self.question.shape
        if layout.kind != "heads":
            return 0.0
        rows = np.sum(candidate.geometry.rows, 0)[: layout.num_new]
        projected = rows.sum() if layout.redundant_kv else rows.max()
        return float(projected * shape.kv_flops / shape.num_layers / self.question.machine.rates.dense_flops)

    def machine(self, candidate: Candidate) -> Machine:
        """The ranks that its plan is of."""
        return self._first(candidate.plan.layout.num_ranks)

    def ratio(self, candidate: Candidate) -> float:
        return self.seconds(candidate) / self.seconds(self.best)

    def of_each_strategy(self) -> list[tuple[int, Candidate]]:
        """The best variant of each strategy and the one shown, with their places among all; of layout heads' only
        strategy both variants.
        """
        seen: set[str] = set()
        rows = []
        for place, candidate in enumerate(self.ranked, 1):
            strategy = candidate.variant.strategy
            if strategy not in seen or candidate is self.shown or self.question.layout == "heads":
                rows.append((place, candidate))
            seen.add(strategy)
        return rows

    def beaten(self) -> list[Bounded]:
        """The variant of each strategy that takes least, of strategies none of which was costed."""
        costed = {c.variant.strategy for c in self.ranked}
        least: dict[str, Bounded] = {}
        for b in sorted(self.bounded, key=lambda b: b.seconds):
            if not b.slow and b.variant.strategy not in costed:
                least.setdefault(b.variant.strategy, b)
        return list(least.values())

    def of_each_degree(self) -> list[tuple[int, Variant, float, bool]]:
        """By ranks that share a prompt: the best variant, its seconds, and whether they are no more than a bound."""
        found = [(self.seconds(c), False, c.variant) for c in self.ranked]
        found += [(b.seconds, True, b.variant) for b in self.bounded if not b.slow]
        best: dict[int, tuple[int, Variant, float, bool]] = {}
        for seconds, bounded, variant in sorted(found, key=lambda x: x[0]):
            degree = self.question.degree(variant)
            best.setdefault(degree, (degree, variant, seconds, bounded))
        return [best[degree] for degree in sorted(best)]

    def rivals(self) -> list[Candidate]:
        """What the best is compared with: the best variant of each other strategy; in layout heads the other one."""
        mine = self.best.variant.strategy
        shown = [c for _, c in self.of_each_strategy() if c is not self.best]
        return [c for c in shown if self.question.layout == "heads" or c.variant.strategy != mine]

    def over_lengths(self, scales: Sequence[float]) -> dict[str, Floats]:
        """Seconds [scales] of each strategy's best variant, with every prompt's new tokens times a scale.

        What cannot win at the length asked about may at another, so all but too large plans are costed.
        """
        question = self.question
        best: dict[str, Floats] = {}
        costed = {c.variant for c in self.ranked}
        variants = [v for v in question.candidates() if v in costed or question.is_quick(v)]
        for variant in self._show(variants):
            cost = self._cost(variant, question.groups(variant))
            batches = [[(max(1, round(new * s)), cached) for new, cached in question.batch] for s in scales]
            rows = [lay_out(cost.plan.layout, batch, question.page_size).rows for batch in batches]
            times = cost.times(Sizes(np.array(rows, np.int64), np.ones((len(rows), len(question.batch)), np.int64)))
            seconds = times.step if question.whole_step else times.attention
            name = variant.strategy
            best[name] = np.minimum(best[name], seconds) if name in best else seconds
        return best

    def _costed(self, variant: Variant) -> Candidate:
        question = self.question
        cost = self._cost(variant, question.groups(variant))
        geometry = lay_out(cost.plan.layout, question.batch, question.page_size)
        return Candidate(variant, question.degree(variant), cost.plan, geometry, cost.cost(geometry))


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the time of a layer's attention goes, in seconds. Compute, exposed and overhead add up to all of it; link
    and fixed may hide behind compute.
    """

    compute: float  # kernel calls: in each round those of the rank that has most, if that leaves room for the rest
    exposed: float  # communication that compute does not hide
    overhead: float  # rounds, messages, packing and merging
    link: float  # the busiest resource's bytes at its capacity
    resource: str  # that resource
    fixed: float  # latencies, rounds and messages: what no bandwidth would save


def parts(comparison: Comparison, candidate: Candidate) -> Parts:
    machine, shape = comparison.machine(candidate), comparison.question.shape
    cost, rates = candidate.cost, machine.rates
    compute = min(sum(r.compute for r in cost.rounds), cost.seconds - cost.exposed)
    capacity = machine.topology.resources
    resource = max(cost.resource_bytes, key=lambda n: cost.resource_bytes[n] / capacity[n], default="")
    latency = {pair: link.latency for pair, link in machine.topology.by_pair().items()}
    fixed = 0.0
    for links in predicted_bytes(candidate.plan, candidate.geometry, shape.head_dim, shape.itemsize):
        at_rank = Counter(rank for pair in links for rank in pair)
        fixed += rates.round_seconds
        if links:
            fixed += max(latency[pair] for pair in links) + max(at_rank.values()) * rates.message_seconds
    return Parts(
        compute=compute,
        exposed=cost.exposed,
        overhead=cost.seconds - cost.exposed - compute,
        link=cost.resource_bytes[resource] / capacity[resource] if resource else 0.0,
        resource=resource,
        fixed=fixed,
    )
