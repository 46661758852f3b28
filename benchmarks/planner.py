"""`python -m benchmarks.planner`: what a planner's choice costs against the best candidate (regret).

--simulated: on presets of machines that are not here, judged by the simulator on machines whose links and rates are
off by up to 30 % from what the planner was told; with and without trial steps, simulated there and off by 3 % of noise,
none of which is a batch that is judged. --measured: on ranks of this machine, of one thread each and connected as a
server's are, with the machine measured at start; candidates take turns, and count where the cores are quiet
(benchmarks/turns.py). Both give the time of a decision.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from random import Random
from typing import Any

from tqdm import tqdm

from benchmarks.command import parser_of, write_results
from benchmarks.regret import Result, report, result, summary
from sp_backend.calibrate import REPEATS, Trial, choose_trials, correct
from sp_backend.placement import Batch
from sp_backend.planner import OFF, Planner
from sp_backend.presets import load_machine
from sp_backend.shape import ModelShape
from sp_backend.simulate import perturbed, simulate
from sp_backend.topology import Machine

SPREAD = 0.3
NOISE = 0.03  # standard deviation of a measured trial step
LONGEST = 32768  # tokens of a trial step
PAGE_SIZE = 64
SHAPES = {
    "64:8 x 128": ModelShape(64, 8, 128, num_layers=80, dense_flops=140e9),
    "32:32 x 128": ModelShape(32, 32, 128, num_layers=32, dense_flops=14e9),
    "32:8 x 128": ModelShape(32, 8, 128, num_layers=32, dense_flops=16e9),
    "12:4 x 32": ModelShape(12, 4, 32, num_layers=4, dense_flops=7e6),  # the embedded model
}
GPUS = ("64:8 x 128", "32:32 x 128", "32:8 x 128")
MACHINES: dict[str, tuple[str, ...]] = {  # -> shapes
    **dict.fromkeys(("nvlink4-4", "nvlink5-4", "pcie4-4", "pcie5-4", "nic200-4", "nic400-2", "pcie4-2"), GPUS),
    **dict.fromkeys(("nvlink4-8", "pcie4-8", "2xpcie5-2/nic200", "2xnvlink4-4/nic400", "nic400-8"), GPUS),
    **dict.fromkeys(("loopback-2", "loopback-4"), ("12:4 x 32",)),
}
LENGTHS = (256, 700, 2048, 5000, 16384, 32768)
CACHED = (0.0, 0.5, 0.9, 0.99)  # of the whole length


@dataclass(frozen=True, slots=True)
class Case:
    machine: str
    shape: str
    batch: list[tuple[int, int]]
    seed: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.planner", __doc__, server_args=None)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--simulated", action="store_true")
    which.add_argument("--measured", action="store_true")
    parser.add_argument("--cases", type=int, default=560, help="of --simulated (default: 560)")
    parser.add_argument(
        "--spread", type=float, default=SPREAD, help="of --simulated: how far the planner is misinformed"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --simulated: other batches and other machines")
    parser.add_argument("--ranks", type=int, default=2, help="of --measured (default: 2)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, help="of --measured: tokens, cached included"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of --measured: of each candidate (default: 5)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of --measured: quick candidates take more turns until these passed"
    )
    parser.add_argument(
        "--limit", type=float, default=900.0, help="of --measured: seconds after which no other batch is begun"
    )
    parser.add_argument("--quick", action="store_true", help="12 cases, or one length: under a minute")
    args = parser.parse_args(argv)
    if args.quick:
        args.cases, args.lengths, args.repeats, args.seconds, args.limit = 12, (2048,), 2, 0.0, 30.0
    decision = decision_seconds()
    about: dict[str, Any]
    if args.simulated:
        drawn = cases(args.cases, args.seed)
        judged = [judge(c, args.spread) for c in tqdm(drawn, "Cases", args.cases, unit="case")]
        told, results = ([pair[i] for pair in judged] for i in (0, 1))
        about = {"spread": args.spread, "noise": NOISE, "seed": args.seed}
    else:
        from benchmarks.planner_ranks import measure_all  # torch and processes, which the simulation does without

        shape = SHAPES["12:4 x 32"]
        told, results, about = measure_all(
            args.ranks, batches(args.lengths), shape, args.repeats, args.seconds, PAGE_SIZE, args.limit
        )
    about["without_trials"] = summary(told)
    print("by what the planner was told, without trial steps:")
    report(told)
    print("after trial steps:")
    report(results)
    print(f"a decision takes {decision * 1e6:.0f} us of CPU time")
    write_results(args.json, as_json(args, results, about | {"decision_us": round(decision * 1e6, 1)}))
    return 0


def cases(number: int, seed: int = 0) -> Iterator[Case]:
    """Machines and shapes in turn; lengths and cached parts drawn evenly in logarithms, some batches of several."""
    random = Random(seed)
    pairs = [(machine, shape) for machine, shapes in MACHINES.items() for shape in shapes]
    for i in range(number):
        machine, shape = pairs[i % len(pairs)]
        prompts = random.choice((1, 1, 1, 3))
        batch = []
        for _ in range(prompts):
            new = round(2 ** random.uniform(6, 17))
            cached = random.choice((0, 0, round(2 ** random.uniform(8, 18)), 9 * new, 99 * new))
            batch.append((new, min(cached, 1 << 20)))
        yield Case(machine, shape, batch, seed * number + i)


@cache
def planner(machine: str, shape: str) -> Planner:
    found = load_machine(machine)
    return Planner(found, SHAPES[shape], found.num_ranks, page_size=PAGE_SIZE)


def judge(case: Case, spread: float) -> tuple[Result, Result]:
    """What a planner chooses by what it was told, and after trial steps; every candidate is simulated on the machine
    as it turns out to be.
    """
    told, shape = planner(case.machine, case.shape), SHAPES[case.shape]
    machine = perturbed(told.machine, spread, case.seed)
    seconds = {
        str(c.variant): simulate(c.plan, machine, shape, c.geometry, dense=True).step_seconds
        for c in told.rank_candidates(case.batch)
    }
    choices = [p.choose(case.batch) for p in (told, observing(told, machine, case))]
    about = case.machine, case.shape, case.batch
    first, second = (result(*about, str(c.variant), c.seconds, seconds) for c in choices)
    return first, second


def observing(told: Planner, machine: Machine, case: Case) -> Planner:
    """The planner after trial steps on the machine as it is."""
    random, seconds = Random(case.seed), []
    trials = [t for t in trials_of(case.machine, case.shape) if t.batch != case.batch]
    for trial in trials:
        plan, geometry = told.plan(trial.variant), told.lay_out(trial.variant, trial.batch)
        step = simulate(plan, machine, told.shape, geometry, dense=True).step_seconds
        seconds.append(statistics.median(step * random.gauss(1.0, NOISE) for _ in range(REPEATS)))
    return told.on(correct(told, trials, seconds).machine)


@cache
def trials_of(machine: str, shape: str) -> list[Trial]:
    return choose_trials(planner(machine, shape), LONGEST)


def batches(lengths: Sequence[int]) -> Sequence[Batch]:
    return [[(max(1, round(n * (1 - share))), round(n * share))] for n in lengths for share in CACHED] + [
        [(n // 2, 0), (n // 4, n // 4), (64, n)] for n in lengths
    ]


def decision_seconds() -> float:
    """CPU time on an 8-rank machine: the most that the median takes for any of some batches of one to four prompts."""
    plan = planner("nvlink4-8", "64:8 x 128")
    asked: list[Batch] = [[(700 * n + 90 * i, 100 * n) for i in range(k)] for n in (1, 5, 40) for k in (1, 2, 4)]
    asked.append([(5000, 0), (64, 30_000), (900, 900), (17, 0)])
    times = []
    for batch in asked:
        each = []
        for _ in range(200):
            since = time.thread_time_ns()
            plan.choose(batch)
            each.append(time.thread_time_ns() - since)
        times.append(statistics.median(each) / 1e9)
    return max(times)


def as_json(args: argparse.Namespace, results: Sequence[Result], about: dict[str, Any]) -> dict[str, Any]:
    return {
        "what": "regret of the planner's choice, " + ("simulated" if args.simulated else "measured"),
        "numpy": version("numpy"),
        "summary": summary(results),
        "results": [asdict(r) | {"seconds": shown(r, args.measured)} for r in results],
    } | about


def shown(result: Result, every: bool) -> dict[str, float]:
    """Seconds of every candidate, or of those that regret is about."""
    about = {result.chosen, result.best, str(OFF)}
    return {name: float(f"{s:.5g}") for name, s in result.seconds.items() if every or name in about}


if __name__ == "__main__":
    sys.exit(main())
