"""`python -m benchmarks.serve`: what sequence parallelism and the server itself cost, over HTTP.

Time to first token of one prompt on an idle server: sp 2 with strategy auto against the same ranks with sharing off,
and against one rank with one thread and with two. Two servers that were started alike differ by some percent for as
long as they run, so short prompts want several of each (`--twins`). Then what a step consists of while 64 requests run
and while a long prompt is prefilled: how long workers wait for their next one, and whose processor time it takes. With
as many ranks as cores, server and client run on the workers' cores: a rank then also waits because another rank had to
share its core.
(Time between tokens against the bare model loop: benchmarks.decode.)
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.command import parser_of, write_results
from benchmarks.launched import LaunchedServer
from benchmarks.prefill import ONE_THREAD, Times, measure, plot
from benchmarks.step_times import ONE_TOKEN_REQUESTS, one_token_requests, prefill, streams

OFF, AUTO, ONE, TWO = "sp 2, off", "sp 2, auto", "sp 1, 1 thread", "sp 1, 2 threads"
SETUPS: dict[str, tuple[str, ...]] = {
    OFF: ("--sp-size", "2", "--sp-strategy", "off", *ONE_THREAD),
    AUTO: ("--sp-size", "2", *ONE_THREAD),
    ONE: ("--sp-size", "1", *ONE_THREAD),
    TWO: ("--sp-size", "1", "--threads-per-rank", "2"),
}
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
SHORT = 512  # tokens: below, one thread is the rival; from here on, two threads are
TARGETS = {OFF: 1.02, ONE: 1.02, TWO: 1.05}
DRAWS = 1000


class Ratio(NamedTuple):
    value: float
    low: float  # with high: a 95 % confidence interval
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.2f} to {self.high:.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.serve", __doc__)
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="*",
        default=LENGTHS,
        metavar="TOKENS",
        help="none: steps alone (default: 16 to 64k; 13 minutes)",
    )
    parser.add_argument("--repeats", type=int, default=5, help=f"rounds over lengths from {SHORT} tokens (default: 5)")
    parser.add_argument("--short-repeats", type=int, default=21, help="rounds over shorter ones (default: 21)")
    parser.add_argument("--twins", type=int, default=1, help="servers of each setup, whose times are put together")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prefill-tokens", type=int, default=32768, help="of the prompt whose steps are looked at")
    parser.add_argument("--quick", action="store_true", help="few lengths, up to 4096 tokens")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.quick:
        args.lengths, args.repeats, args.short_repeats, args.prefill_tokens = (16, 256, 1024, 4096), 2, 3, 16384
    short, long = ([n for n in args.lengths if (n < SHORT) == wanted] for wanted in (True, False))
    with contextlib.ExitStack() as stack:
        twins = {
            (label, i): stack.enter_context(LaunchedServer(*SETUPS[label], *args.server_args))
            for i in range(args.twins)
            for label in (SETUPS if args.lengths else (AUTO, ONE))
        }
        times: Times = {}
        for lengths, repeats, longest in (short, args.short_repeats, SHORT), (long, args.repeats, 32768):
            times |= put_together(measure(twins, lengths, repeats, longest)) if lengths else {}
        servers = {label: server for (label, i), server in twins.items() if i == 0}
        steps = measure_steps(servers, args.streams, args.prefill_tokens)
        rate = one_token_requests(servers[AUTO])
    if times:
        report(times)
    for what, each in steps.items():
        print(f"{what}: {each}")
    print(f"{ONE_TOKEN_REQUESTS} requests of 1 token in and 1 out at once, {AUTO}: {rate:.0f} a second")
    write_results(
        args.json,
        {
            "ttft_seconds": times,
            "ratios_of_auto": {n: {label: r._asdict() for label, r in row.items()} for n, row in ratios(times).items()},
            "one_token_requests_per_second": rate,
            "steps": {what: asdict(each) for what, each in steps.items()},
        },
    )
    if args.plot and times:
        plot(args.plot, times)
    return 0


def put_together(times: dict[int, dict[tuple[str, int], list[float]]]) -> Times:
    """The times of servers that were started alike."""
    found: Times = {length: defaultdict(list) for length in times}
    for length, row in times.items():
        for (label, _), seconds in row.items():
            found[length][label] += seconds
    return found


def measure_steps(servers: dict[str, LaunchedServer], num_streams: int, prefill_tokens: int) -> dict[str, Any]:
    """By what ran. On one rank, server and client have the other core: what it waits for there is the scheduler."""
    return {
        f"{num_streams} streams, {AUTO}": streams(servers[AUTO], num_streams, 64),
        f"{num_streams} streams, {ONE}": streams(servers[ONE], num_streams, 64),
        f"{num_streams} streams of 1 token, {AUTO}": streams(servers[AUTO], num_streams, 1),
        f"prefill of {prefill_tokens} tokens, {AUTO}": prefill(servers[AUTO], prefill_tokens),
    }


def rivals(length: int) -> tuple[str, ...]:
    return (OFF, ONE) if length < SHORT else (OFF, TWO)


def ratios(times: Times) -> dict[int, dict[str, Ratio]]:
    """Of auto to each setup which it must not be slower than."""
    return {
        length: {label: ratio_of_medians(row[AUTO], row[label]) for label in rivals(length)}
        for length, row in times.items()
    }


def ratio_of_medians(mine: Sequence[float], other: Sequence[float]) -> Ratio:
    """Its interval by the bootstrap: medians of as many times, drawn from those that were taken."""
    random = np.random.default_rng(0)
    drawn = [np.median(random.choice(times, (DRAWS, len(times))), axis=1) for times in (mine, other)]
    low, high = np.percentile(drawn[0] / drawn[1], [2.5, 97.5])
    return Ratio(statistics.median(mine) / statistics.median(other), float(low), float(high))


def report(times: Times) -> None:
    found = ratios(times)
    print(f"{'tokens':>8}" + "".join(f"{label:>18}" for label in SETUPS) + "   auto against")
    for length, row in times.items():
        cells = "".join(f"{1000 * statistics.median(row[label]):>15.1f} ms" for label in SETUPS)
        marks = ", ".join(
            f"{label} x {ratio}{'' if ratio.value <= TARGETS[label] else f' (target {TARGETS[label]})'}"
            for label, ratio in found[length].items()
        )
        print(f"{length:>8}{cells}   {marks}")


if __name__ == "__main__":
    sys.exit(main())
