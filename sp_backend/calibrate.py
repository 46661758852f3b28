"""Corrects what a planner was told of a machine by a few real steps. Pure: no torch.

The predicted time of a step depends on some rates of its machine, each of which may be off by a factor of its own. The
logarithms of those factors are fitted to steps that ran (trials) by regularised least squares: normal around 0 before,
and errors of the predictions normal, but for outliers, which count less (iteratively reweighted). Trials are chosen
before they run, one after the other, each the one that narrows best, for its time, what the planner has to know: the
ratios of predicted times between candidates that are near the best (Bayesian linear design: Chaloner and Verdinelli,
Statistical Science 10, 1995).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

import numpy as np

from sp_backend.placement import Batch
from sp_backend.planner import Planner
from sp_backend.strategies import Variant
from sp_backend.topology import Floats, Machine, Rates

MOST_TRIALS: Final = 24
REPEATS: Final = 3  # runs of each, of which the median counts
SECONDS: Final = 0.35  # that all trials may take, each once; more only if FEWEST quick ones would not fit
FEWEST: Final = 12
PRIOR: Final = 0.2  # standard deviation of a factor's logarithm: most rates are within 30 % of what was measured
NOISE: Final = 0.03  # of a prediction by the right factors, against what is measured
SHOWN: Final = 5  # corrections that are named, the largest first
MOST: Final = 1.0  # of a factor's logarithm
ERRORS: Final = 0.01, 0.08  # the least and the most that predictions are said to be wrong by
_LINKS: Final = ("link bandwidth", "link latency")
_TIMES: Final = tuple(f.name for f in fields(Rates) if f.name not in ("kernel", "overlap"))
FACTORS: Final = ("kernel", *_LINKS, *_TIMES)  # what is fitted
_STEP: Final = 0.1  # of the differences that stand for derivatives
_ROUNDS: Final = 3  # of the fit: predictions are nearly linear in those logarithms
_NEW: Final = tuple(2**k for k in range(4, 15))
_CACHED: Final = (0, 2048, 16384)


@dataclass(frozen=True, slots=True)
class Trial:
    """A prefill step of one prompt that is alone."""

    variant: Variant
    new: int  # tokens
    cached: int
    slopes: tuple[float, ...]  # of its predicted time by each of FACTORS, all in logarithms

    @property
    def batch(self) -> Batch:
        return [(self.new, self.cached)]


@dataclass(frozen=True, slots=True)
class Correction:
    """factors: of each rate, by its name in FACTORS. before, after: median relative error of the predictions."""

    machine: Machine
    factors: Mapping[str, float]
    num_trials: int
    before: float
    after: float

    def __str__(self) -> str:
        told = sorted(self.factors.items(), key=lambda item: -abs(np.log(item[1])))
        changed = [f"{name.replace('_', ' ')} x{factor:.2f}" for name, factor in told if abs(factor - 1) >= 0.05]
        return (
            f"corrected by {self.num_trials} trial steps: {', '.join(changed[:SHOWN]) or 'nothing'}; "
            f"predictions were off by {self.before:.0%}, now by {self.after:.1%}"
        )


def choose_trials(planner: Planner, longest: int) -> list[Trial]:
    """Prefill steps that tell most of the machine, of at most `longest` tokens, cached ones included."""
    sizes = [(new, cached) for cached in _CACHED for new in _NEW if new + cached <= longest]
    variants = planner.winners
    if len(variants) < 2 or not sizes:
        return []
    times, slopes = _linearised(planner, variants, [[size] for size in sizes])
    wanted = _decisions(*_as_compared(planner, variants, times, slopes))
    pool = [
        Trial(v, *size, tuple(slopes[i, j].tolist())) for i, size in enumerate(sizes) for j, v in enumerate(variants)
    ]
    times, slopes = times.ravel(), slopes.reshape(len(pool), len(FACTORS))
    spread = PRIOR**2 * np.eye(len(FACTORS))
    cost = np.exp(times)
    left = max(SECONDS, FEWEST * float(cost.min()))
    cost[cost > left / 4] = np.inf
    found: list[Trial] = []
    for _ in range(MOST_TRIALS):
        known = slopes @ spread
        variance = (known * slopes).sum(1) + NOISE**2
        gain = ((known @ wanted) * known).sum(1) / variance / np.sqrt(cost)
        gain[cost > left] = 0.0
        best = int(gain.argmax())
        if gain[best] <= 0:
            break
        found.append(pool[best])
        left -= cost[best]
        cost[best] = np.inf  # a second time, it would be as wrong for the same reason
        spread = spread - np.outer(known[best], known[best]) / variance[best]
    return found


def _as_compared(planner: Planner, variants: Sequence[Variant], times: Floats, slopes: Floats) -> tuple[Floats, Floats]:
    """times and slopes, as _linearised gives them, with the handicap that shared prompts have when degrees are
    compared: where it decides, nothing has to be known.
    """
    share, delay = np.array([planner.handicap(planner.degree(variant)) for variant in variants]).T
    own = np.exp(times) * share
    return np.log(own + delay), slopes * (own / (own + delay))[..., None]


def _decisions(times: Floats, slopes: Floats) -> Floats:
    """[factors, factors]: what trials should tell. For each size, the ratio between a candidate and the best, the more
    the less sure it is which of them is faster. times [sizes, variants], slopes [sizes, variants, factors]
    """
    best = times.argmin(1)
    behind = times - times.min(1, keepdims=True)
    apart = slopes - slopes[np.arange(len(best)), best][:, None]
    variance = np.maximum(PRIOR**2 * (apart**2).sum(-1), 1e-12)
    return np.asarray(np.einsum("bv,bvi,bvj->ij", np.exp(-(behind**2) / variance / 2), apart, apart))


def correct(planner: Planner, trials: Sequence[Trial], seconds: Sequence[float]) -> Correction:
    """The planner's machine, corrected by what trials took."""
    measured, factors = np.log(seconds), np.zeros(len(FACTORS))
    slopes = np.array([trial.slopes for trial in trials])
    before = measured - _log_seconds(planner, trials)
    left = before
    for _ in range(_ROUNDS):
        factors = _fitted(left + slopes @ factors, slopes)
        left = measured - _log_seconds(planner.on(corrected(planner.machine, factors)), trials)
    after = np.abs(np.expm1(left))
    error = float(np.clip(np.quantile(after, 0.9), *ERRORS))
    return Correction(
        replace(corrected(planner.machine, factors), error=error),
        dict(zip(FACTORS, np.exp(factors).tolist(), strict=True)),
        len(trials),
        float(np.median(np.abs(np.expm1(before)))),
        float(np.median(after)),
    )


def _fitted(values: Floats, slopes: Floats) -> Floats:
    """The factors' logarithms, with slopes @ factors near values [trials]. Those that are far off count less."""
    weights = np.ones(len(values))
    for _ in range(5):
        known = slopes.T @ (slopes * weights[:, None]) + np.eye(len(FACTORS)) * (NOISE / PRIOR) ** 2
        factors = np.linalg.solve(known, slopes.T @ (weights * values))
        weights = 1 / (1 + ((values - slopes @ factors) / (3 * NOISE)) ** 2)
    return np.asarray(np.clip(factors, -MOST, MOST))


def corrected(machine: Machine, logs: Sequence[float] | Floats) -> Machine:
    """The machine with each of its rates times e to the power of its entry."""
    factor = dict(zip(FACTORS, np.exp(logs).tolist(), strict=True))
    rates = replace(
        machine.rates,
        kernel=machine.rates.kernel.scaled(factor["kernel"]),
        **{name: factor[name] * getattr(machine.rates, name) for name in _TIMES},
    )
    return replace(machine, rates=rates, topology=machine.topology.scaled(*(factor[name] for name in _LINKS)))


def _linearised(planner: Planner, variants: Sequence[Variant], batches: Sequence[Batch]) -> tuple[Floats, Floats]:
    """Logarithms of predicted seconds [batches, variants], and their derivatives by those of the factors [batches,
    variants, factors].
    """

    def times(factors: Floats) -> Floats:
        there = planner.on(corrected(planner.machine, factors))
        return np.log(np.stack([there.step_seconds(variant, batches) for variant in variants], 1))

    here = times(np.zeros(len(FACTORS)))
    return here, np.stack([(times(step) - here) / _STEP for step in _STEP * np.eye(len(FACTORS))], 2)


def _log_seconds(planner: Planner, trials: Sequence[Trial]) -> Floats:
    """As predicted [trials]."""
    found = np.empty(len(trials))
    for variant in dict.fromkeys(trial.variant for trial in trials):
        which = [i for i, trial in enumerate(trials) if trial.variant == variant]
        found[which] = planner.step_seconds(variant, [trials[i].batch for i in which])
    return np.log(found)
