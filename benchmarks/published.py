"""`python -m benchmarks.published`: the cost model against what others measured, one row for each published number.

Constants are solved so that the rows they are fitted on are exact; the others are predictions. --measure: how long each
rank computes and waits in a ring, contiguous against zigzag, on gloo ranks of this machine.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from tqdm import tqdm

from benchmarks.command import parser_of, write_results
from benchmarks.published_systems import OTHERWISE, RING, SYSTEMS, Constant, Constants, Row, System
from sp_backend.shape import ModelShape

QWEN3_30B: Final = ModelShape(32, 4, 128, itemsize=4)  # Pith-Train's, in the fp32 of CPU ranks
FIRST_BYTE_SECONDS: Final = 1e-10  # where the search for a bandwidth starts


@dataclass(frozen=True, slots=True)
class Result:
    what: str
    unit: str
    published: float
    predicted: float
    fits: Constant | None

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


@dataclass(frozen=True, slots=True)
class Verdict:
    what: str
    right: bool  # the faster one of two is predicted to be


@dataclass(frozen=True, slots=True)
class Evaluation:
    system: System
    constants: Constants
    results: list[Result]
    verdicts: list[Verdict]

    @property
    def predictions(self) -> list[Result]:
        return [r for r in self.results if r.fits is None]


def evaluate(system: System) -> Evaluation:
    constants = calibrate(system)
    results = [Result(r.what, r.unit, r.published, r.predict(constants), r.fits) for r in system.rows]
    verdicts = []
    for w in system.winners:
        faster, slower = results[w.faster], results[w.slower]
        assert faster.published < slower.published, f"{w.what}: not what was published"
        verdicts.append(Verdict(w.what, faster.predicted < slower.predicted))
    return Evaluation(system, constants, results, verdicts)


def calibrate(system: System) -> Constants:
    """The constants that make the fitted rows exact, solved in turn until all of them are.

    Raises RuntimeError if there are none.
    """
    constants = Constants()
    fitted = [(row, row.fits) for row in system.rows if row.fits]
    for _ in range(20):
        for row, name in fitted:
            constants = replace(constants, **{name: _solve(row, name, constants)})
        if all(abs(row.predict(constants) / row.published - 1) < 1e-4 for row, _ in fitted):
            return constants
    raise RuntimeError(f"{system.name}: no constants make its fitted rows exact")


def _solve(row: Row, name: Constant, constants: Constants) -> float:
    """One constant by the secant method; not converged where `max` and `min` in the model defeat it."""

    def off(value: float) -> float:
        return row.predict(replace(constants, **{name: value})) / row.published - 1

    a = getattr(constants, name) or FIRST_BYTE_SECONDS
    b = 1.1 * a
    off_a, off_b = off(a), off(b)
    for _ in range(50):
        if abs(off_b) < 1e-5 or off_b == off_a:
            break
        a, b, off_a = b, max(b - off_b * (b - a) / (off_b - off_a), b / 100), off_b  # never 0 or less
        off_b = off(b)
    return float(b)


def table(evaluations: Sequence[Evaluation]) -> str:
    """Markdown."""
    lines = ["| system | what | published | predicted | error |", "|---|---|---:|---:|---:|"]
    for e in evaluations:
        for r in e.results:
            error = "fitted" if r.fits else f"{r.error:+.0%}"
            values = f"{r.published:.4g} {r.unit} | {r.predicted:.3g} {r.unit}"
            lines.append(f"| {e.system.name} | {r.what} | {values} | {error} |")
    return "\n".join(lines)


def otherwise() -> str:
    """Markdown: what the other assumptions make of their system."""
    lines = ["| assumed instead | median error | wrong winners |", "|---|---:|---|"]
    for what, describe in OTHERWISE.items():
        e = evaluate(describe())
        wrong = "; ".join(v.what for v in e.verdicts if not v.right) or "none"
        lines.append(f"| {what} | {median_error([e]):.0%} | {wrong} |")
    return "\n".join(lines)


def median_error(evaluations: Sequence[Evaluation]) -> float:
    return statistics.median(abs(r.error) for e in evaluations for r in e.predictions)


def summary(evaluations: Sequence[Evaluation]) -> str:
    predicted = sum(len(e.predictions) for e in evaluations)
    fitted = sum(len(e.results) for e in evaluations) - predicted
    verdicts = [v for e in evaluations for v in e.verdicts]
    wrong = [v.what for v in verdicts if not v.right]
    return (
        f"{predicted} rows predicted with {fitted} constants fitted: median error {median_error(evaluations):.1%}; "
        f"the right winner in {len(verdicts) - len(wrong)} of {len(verdicts)}"
        + (f" (wrong: {'; '.join(wrong)})" if wrong else "")
    )


def as_json(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    systems = []
    for e in evaluations:
        about = {name: getattr(e.system, name) for name in ("name", "hardware", "source", "assumed", "missed")}
        rows = [asdict(r) | {"error": round(r.error, 4)} for r in e.results]
        found = {"constants": asdict(e.constants), "rows": rows, "winners": [asdict(v) for v in e.verdicts]}
        systems.append(about | found)
    return {"summary": summary(evaluations), "median_error": median_error(evaluations), "systems": systems}


def measured(ranks: Sequence[int], tokens: int, repeats: int) -> dict[str, Any]:
    from benchmarks.published_ranks import measure_shares  # torch and processes, which the table does without

    progress = tqdm(ranks, desc="Numbers of ranks", disable=None)
    shares = [s for n in progress for s in measure_shares(n, RING.strategy, QWEN3_30B, tokens, repeats)]
    cores = len(os.sched_getaffinity(0))
    print("| ranks | layout | rank | computes | waits | computes, simulated |\n|---:|---|---:|---:|---:|---:|")
    for s in shares:
        told = f"{s.computes:.0%} | {1 - s.computes:.0%} | {s.computes_simulated:.0%}"
        print(f"| {s.num_ranks} | {s.layout} | {s.rank} | {told} |")
    if max(ranks) > cores:
        print(f"More than {cores} ranks share cores: what one waits for a core counts as computing.")
    return {"cores": cores, "tokens": tokens, "shares": [asdict(s) for s in shares]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.published", __doc__, server_args=None)
    parser.add_argument("--measure", action="store_true", help="on ranks of this machine, instead of the table")
    parser.add_argument("--ranks", type=int, nargs="+", default=(2, 4), help="of --measure (default: 2 4)")
    parser.add_argument("--tokens", type=int, default=8192, help="of --measure (default: 8192)")
    parser.add_argument("--repeats", type=int, default=5, help="of --measure: layers timed (default: 5)")
    parser.add_argument("--quick", action="store_true", help="of --measure: 512 tokens, twice; under a minute")
    args = parser.parse_args(argv)
    if args.quick:
        args.tokens, args.repeats = 512, 2
    if min(*args.ranks, args.tokens, args.repeats) < 1:
        parser.error("--ranks, --tokens and --repeats must be at least 1")
    if args.measure:
        found = measured(args.ranks, args.tokens, args.repeats)
    else:
        evaluations = [evaluate(describe()) for describe in SYSTEMS]
        missed = [f"{e.system.name}, {what}: {why}" for e in evaluations for what, why in e.system.missed.items()]
        print(table(evaluations), summary(evaluations), "\n".join(missed), otherwise(), sep="\n\n")
        found = as_json(evaluations)
    write_results(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
