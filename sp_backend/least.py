"""The least that a plan of a strategy takes, told from sizes alone: which plans need not be built. Pure: no torch.

Nothing is waited for here, and sending is free. The busiest rank takes at least what all take on average: the pairs of
tokens at the best rate that the kernel reaches on blocks of that size, and for each kernel call its fixed times and the
merge of its result. It also takes at least what its largest chunk of queries does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sp_backend.shape import ModelShape
from sp_backend.topology import Machine

_STATE_BYTES: Final = 4  # of an element of an output or its LSE


@dataclass(frozen=True, slots=True)
class Least:
    """Of one group of ranks that share prompts under some strategy."""

    degree: int  # ranks of the group
    chunks: int  # into which they cut a prompt's new tokens
    rounds: int  # in which all of them take part
    calls: int  # kernel calls in which a rank meets all the keys that it attends, if no chunk is empty
    sharers: int  # ranks that share the attention of one chunk of queries, at most


def least_seconds(
    machine: Machine,
    shape: ModelShape,
    batch: Sequence[tuple[int, int]],
    of: Least,
    *,
    causal: bool = True,
    page_size: int = 1,
) -> tuple[float, float]:
    """One layer's attention and a whole step of (new, cached) tokens."""
    rates = machine.rates
    prompts = [_Prompt.of(machine, shape, new, cached, of, causal, page_size) for new, cached in batch]
    attention = _busiest(machine.num_ranks, of, [p.spread for p in prompts], [p.fixed for p in prompts])
    attention = max(attention, max(p.alone for p in prompts))
    dense = [new * shape.dense_flops / rates.dense_flops for new, _ in batch]
    layers = shape.num_layers
    spread = [layers * p.spread + d for p, d in zip(prompts, dense, strict=True)]
    step = _busiest(machine.num_ranks, of, spread, [layers * p.fixed for p in prompts])
    return attention, max(step, layers * max(p.alone for p in prompts)) + rates.step_seconds


def _busiest(num_ranks: int, of: Least, spread: Sequence[float], fixed: Sequence[float]) -> float:
    """Seconds of the busiest rank, if work is spread evenly over the ranks of each group, or even over all ranks."""
    if of.degree == num_ranks:
        return sum(spread) / num_ranks + max(fixed)
    of_groups = max(work / of.degree + f for work, f in zip(spread, fixed, strict=True))
    return max(of_groups, sum(spread) / num_ranks + min(fixed))


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Seconds of one layer's attention."""

    spread: float  # of all ranks of its group together
    fixed: float  # of each of them
    alone: float  # of the rank with the largest chunk of queries

    @classmethod
    def of(
        cls, machine: Machine, shape: ModelShape, new: int, cached: int, of: Least, causal: bool, page_size: int
    ) -> _Prompt:
        rates, pages = machine.rates, -(-new // page_size)
        rate = rates.kernel.best_rate(min(new, -(-pages // of.chunks) * page_size))
        per_pair = 4 * shape.head_dim * shape.num_heads / rate
        spread = per_pair * _pairs(new, cached, causal)
        fixed = of.rounds * rates.round_seconds
        largest = min(new, max(1, pages // of.chunks) * page_size)
        visible = _pairs(largest, cached if causal else cached + new - largest, causal)
        alone = per_pair * visible / of.sharers + fixed
        if pages >= of.chunks and of.calls > 1:  # the later half of the chunks sees keys of every rank
            merges = of.calls - 1
            late = new - pages // 2 * page_size
            merged = late * shape.num_heads * (shape.head_dim + 1) * _STATE_BYTES
            spread += merges * merged / rates.merge_bytes
            fixed += of.calls * rates.call_seconds + merges * (rates.fold_seconds + 2 * rates.message_seconds)
        return cls(spread, fixed, alone)


def _pairs(queries: int, before: int, causal: bool) -> float:
    """Visible pairs of tokens; before: keys that all of the queries see."""
    return queries * (before + ((queries + 1) / 2 if causal else queries))
