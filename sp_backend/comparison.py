"""Every candidate for one batch, costed and ranked, and where each one's time goes. Pure: no torch.

Bytes, waits and times are those of cost.py for the very batch; the server's planner interpolates a table of the same
predictions, and prefers off on near ties.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Final, Literal

import numpy as np

from sp_backend.cost import PlanCost, least_seconds
from sp_backend.geometry import Geometry, predicted_bytes
from sp_backend.planner import OFF, Batch, Candidate, lay_out
from sp_backend.shape import ModelShape, Sizes
from sp_backend.strategies import STRATEGIES, Variant, plan_for, prove, variants
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
        return self.every_option or self.machine.num_ranks <= MOST_RANKS_OF_ALL

    def is_quick(self, variant: Variant) -> bool:
        """Whether its plan has so few instructions that costing it takes no seconds."""
        return (variant.degree or self.machine.num_ranks) <= STRATEGIES[variant.strategy].quick_ranks

    def variants(self) -> list[Variant]:
        """All that fit, off first (where one rank can do a prompt alone)."""
        ranks = self.machine.num_ranks
        off = [OFF] if self.layout == "tokens" else []
        return off + (variants(ranks, self.shape.num_heads, self.layout) if ranks > 1 or not off else [])

    def candidates(self) -> list[Variant]:
        """The variants to be costed: all, or of large groups each strategy's defaults at each degree."""
        found = self.variants()
        if not self.exhaustive:
            found = list(dict.fromkeys(Variant(v.strategy, degree=v.degree) for v in found))
        return found if self.forced is None or self.forced in found else [*found, self.forced]

    def cost(self, variant: Variant) -> PlanCost:
        """Of one prompt alone, its group of ranks is all there is: the others have nothing to do or to send."""
        shape, group = self.shape, variant.degree if len(self.batch) == 1 else None
        ranks = group or self.machine.num_ranks
        plan = plan_for(
            variant if group is None else replace(variant, degree=None),
            num_ranks=ranks,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            causal=self.causal,
            proven=False,
        )
        return PlanCost(replace(plan, name=str(variant)), self.machine.first(ranks), shape)


@dataclass(frozen=True, slots=True)
class Bounded:
    """A variant that was not costed, and the least that it can take."""

    variant: Variant
    seconds: float  # of what candidates are ranked by
    slow: bool  # it might be the best, but its plan is so large that costing it takes seconds


class Comparison:
    """The candidates of a question costed, fastest first, and those that would be slower even if sending were free."""

    def __init__(self, question: Question) -> None:
        """Raises ValueError if the forced variant does not fit."""
        self.question = question
        self._costs: dict[Variant, PlanCost] = {}
        self.ranked: list[Candidate] = []
        self.bounded: list[Bounded] = []
        least = {variant: self._least(variant) for variant in question.candidates()}
        best = math.inf
        for variant in sorted(least, key=least.__getitem__):
            if not self._needs_costing(variant, least[variant], best):
                self.bounded.append(Bounded(variant, least[variant], slow=least[variant] <= best))
                continue
            cost = question.cost(variant)
            geometry = lay_out(cost.plan.layout, question.batch, question.page_size)
            if not question.exhaustive and variant != question.forced:
                least[variant] = cost.least_seconds(geometry)[question.whole_step]
                if least[variant] > best:
                    self.bounded.append(Bounded(variant, least[variant], slow=False))
                    continue
            self._costs[variant] = cost
            self.ranked.append(self._candidate(variant, cost, geometry))
            best = min(best, self.seconds(self.ranked[-1]))
        self.ranked.sort(key=self.seconds)
        self.best = self.ranked[0]
        self.shown = next((c for c in self.ranked if c.variant == question.forced), self.best)
        prove(self.shown.plan)

    def _needs_costing(self, variant: Variant, least: float, best: float) -> bool:
        question = self.question
        if question.exhaustive or variant == question.forced:
            return True
        return least <= best and question.is_quick(variant)

    def _least(self, variant: Variant) -> float:
        question, page = self.question, self.question.page_size
        degree = 1 if variant == OFF else variant.degree or question.machine.num_ranks
        row = STRATEGIES[variant.strategy]
        chunks = degree * (2 if row.kinds[0] == "zigzag" else 1)
        attention, step = least_seconds(
            question.machine,
            question.shape,
            question.batch,
            degree,
            causal=question.causal,
            queries=[min(new, ceil(ceil(new / page) / chunks) * page) for new, _ in question.batch],  # of a chunk
            rounds=row.rounds(degree, variant.options),
        )
        return step if question.whole_step else attention

    def seconds(self, candidate: Candidate) -> float:
        """What candidates are ranked by."""
        return candidate.cost.step_seconds if self.question.whole_step else candidate.cost.seconds

    def machine(self, candidate: Candidate) -> Machine:
        """The ranks that its plan is of."""
        return self._costs[candidate.variant].machine

    def ratio(self, candidate: Candidate) -> float:
        return self.seconds(candidate) / self.seconds(self.best)

    def of_each_strategy(self) -> list[tuple[int, Candidate]]:
        """The best variant of each strategy and the one shown, with their places among all."""
        seen: set[str] = set()
        rows = []
        for place, candidate in enumerate(self.ranked, 1):
            if candidate.variant.strategy not in seen or candidate is self.shown:
                rows.append((place, candidate))
            seen.add(candidate.variant.strategy)
        return rows

    def over_lengths(self, scales: Sequence[float], tell: Callable[[str], None] | None = None) -> dict[str, Floats]:
        """Seconds [scales] of each strategy's best variant, with every prompt's new tokens times a scale.

        What cannot win at the length asked about may at another, so all but too large plans are costed; tell: is told
        how far that is.
        """
        question = self.question
        best: dict[str, Floats] = {}
        variants = [v for v in question.candidates() if v in self._costs or question.is_quick(v)]
        for number, variant in enumerate(variants, 1):
            if tell is not None:
                tell(f"plan {number} of {len(variants)}")
            cost = self._costs.get(variant) or question.cost(variant)
            batches = [[(max(1, round(new * s)), cached) for new, cached in question.batch] for s in scales]
            rows = [lay_out(cost.plan.layout, batch, question.page_size).rows for batch in batches]
            times = cost.times(Sizes(np.array(rows, np.int64), np.ones((len(rows), len(question.batch)), np.int64)))
            seconds = times.step if question.whole_step else times.attention
            name = variant.strategy
            best[name] = np.minimum(best[name], seconds) if name in best else seconds
        return best

    def _candidate(self, variant: Variant, cost: PlanCost, geometry: Geometry) -> Candidate:
        degree = 1 if variant == OFF else variant.degree or self.question.machine.num_ranks
        return Candidate(variant, degree, cost.plan, geometry, cost.cost(geometry))


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
