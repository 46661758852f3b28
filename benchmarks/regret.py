"""What a choice cost against the best candidate, for one batch and for many."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sp_backend.placement import Batch
from sp_backend.planner import OFF


@dataclass(frozen=True, slots=True)
class Result:
    """regret: chosen / best - 1; seconds of a step by variant."""

    machine: str
    shape: str
    batch: list[tuple[int, int]]  # (new, cached) tokens of each prompt
    chosen: str
    best: str
    regret: float
    over_off: float  # off / chosen: below 1, the choice was slower than off
    predicted: float
    seconds: dict[str, float]


def result(machine: str, shape: str, batch: Batch, chosen: str, predicted: float, seconds: dict[str, float]) -> Result:
    best = min(seconds, key=seconds.__getitem__)
    off = seconds[str(OFF)] / seconds[chosen]
    regret = seconds[chosen] / seconds[best] - 1
    return Result(machine, shape, list(batch), chosen, best, regret, off, predicted, seconds)


def summary(results: Sequence[Result]) -> dict[str, float]:
    regrets = sorted(r.regret for r in results)
    return {
        "cases": len(results),
        "median": statistics.median(regrets),
        "p90": regrets[len(regrets) * 9 // 10],
        "p99": regrets[len(regrets) * 99 // 100],
        "worst": regrets[-1],
        "over_10_percent": sum(regret > 0.1 for regret in regrets),
        "slower_than_off": sum(r.over_off < 1 for r in results),
        "slowest_over_off": min(r.over_off for r in results),
        "variants_chosen": len({r.chosen for r in results}),
    }


def report(results: Sequence[Result], worst: int = 12) -> None:
    for r in sorted(results, key=lambda r: -r.regret)[:worst]:
        print(f"{r.regret:7.1%}  {r.machine:20} {r.shape:12} {r.chosen:28} best {r.best:28} {r.batch}")
    found = summary(results)
    print(
        f"{found['cases']} cases: regret {found['median']:.2%} at the median, {found['p90']:.2%} at nine tenths, "
        f"{found['worst']:.1%} at worst; {found['slower_than_off']} slower than off, at worst "
        f"{found['slowest_over_off']:.3f}x its speed; {found['variants_chosen']} variants chosen"
    )
