"""`python -m benchmarks.serve`: what sequence parallelism and the server itself cost, over HTTP.

Time to first token of one prompt on an idle server: sp 2 with strategy auto against the same ranks with sharing off,
and against one rank with one thread and with two. Then how long workers wait for their next step, while 64 requests
run and while a long prompt is prefilled. (Time between tokens against the bare model loop: benchmarks.decode.)
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.command import parser_of, write_results
from benchmarks.decode import make_prompts
from benchmarks.launched import LaunchedServer
from benchmarks.prefill import ONE_THREAD, Times, measure, plot, time_to_first_token
from benchmarks.streams import inter_token_seconds

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


@dataclass(frozen=True, slots=True)
class Idle:
    """Of the rank that waited longest."""

    num_steps: int
    idle_seconds: float  # of each step, on average
    busy_seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.serve", __doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=5, help=f"rounds over lengths from {SHORT} tokens (default: 5)")
    parser.add_argument("--short-repeats", type=int, default=21, help="rounds over shorter ones (default: 21)")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prefill-tokens", type=int, default=32768, help="of the prompt whose steps are looked at")
    parser.add_argument("--quick", action="store_true", help="few lengths, up to 4096 tokens")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.quick:
        args.lengths, args.repeats, args.short_repeats, args.prefill_tokens = (16, 256, 1024, 4096), 2, 3, 16384
    with contextlib.ExitStack() as stack:
        servers = {
            label: stack.enter_context(LaunchedServer(*flags, *args.server_args)) for label, flags in SETUPS.items()
        }
        short, long = ([n for n in args.lengths if (n < SHORT) == wanted] for wanted in (True, False))
        times = measure(servers, short, args.short_repeats, SHORT) | measure(servers, long, args.repeats, 32768)
        idle = idle_times(servers[AUTO], args.streams, args.prefill_tokens)
    report(times, idle)
    write_results(args.json, as_json(times, idle))
    if args.plot:
        plot(args.plot, times)
    return 0


def idle_times(server: LaunchedServer, num_streams: int, prefill_tokens: int) -> dict[str, Idle]:
    vocab_size = httpx.get(f"{server.url}/model_info", timeout=30).json()["vocab_size"]
    _, prompts = make_prompts(64, num_streams, vocab_size)
    before = counted(server)
    inter_token_seconds(server.port, prompts, 100)
    between = counted(server)
    time_to_first_token(server, prefill_tokens, seed=1)
    after = counted(server)
    return {
        f"{num_streams} streams": idle_of(before, between),
        f"prefill of {prefill_tokens} tokens": idle_of(between, after),
    }


def counted(server: LaunchedServer) -> dict[str, list[float]]:
    """Values of the counters in /metrics, by name."""
    values: dict[str, list[float]] = {}
    for line in httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines():
        if line.startswith(("sp:rank_", "sp:num_steps")):
            name, value = line.split("{", 1)[0], line.rsplit(" ", 1)[1]
            values.setdefault(name, []).append(float(value))
    return values


def idle_of(before: dict[str, list[float]], after: dict[str, list[float]]) -> Idle:
    def most(name: str) -> float:
        return max(b - a for a, b in zip(before[name], after[name], strict=True))

    steps = round(sum(after["sp:num_steps_total"]) - sum(before["sp:num_steps_total"]))
    return Idle(steps, most("sp:rank_idle_seconds_total") / steps, most("sp:rank_busy_seconds_total") / steps)


def rivals(length: int) -> tuple[str, ...]:
    return (OFF, ONE) if length < SHORT else (OFF, TWO)


def ratios(times: Times) -> dict[int, dict[str, float]]:
    """Of auto's median to that of each setup which it must not be slower than."""
    medians = {length: {label: statistics.median(row[label]) for label in row} for length, row in times.items()}
    return {length: {label: row[AUTO] / row[label] for label in rivals(length)} for length, row in medians.items()}


def report(times: Times, idle: dict[str, Idle]) -> None:
    found = ratios(times)
    print(f"{'tokens':>8}" + "".join(f"{label:>18}" for label in SETUPS) + "   auto against")
    for length, row in times.items():
        cells = "".join(f"{1000 * statistics.median(row[label]):>15.1f} ms" for label in SETUPS)
        marks = ", ".join(
            f"{label} x {ratio:.3f}{'' if ratio <= TARGETS[label] else f' (target {TARGETS[label]})'}"
            for label, ratio in found[length].items()
        )
        print(f"{length:>8}{cells}   {marks}")
    for what, each in idle.items():
        idle_ms, busy_ms = 1000 * each.idle_seconds, 1000 * each.busy_seconds
        print(f"{what}: {each.num_steps} steps, a rank waits {idle_ms:.2f} ms and works {busy_ms:.2f} ms a step")


def as_json(times: Times, idle: dict[str, Idle]) -> dict[str, object]:
    return {
        "ttft_seconds": times,
        "ratios_of_auto": ratios(times),
        "idle": {
            what: {"steps": each.num_steps, "idle_seconds": each.idle_seconds, "busy_seconds": each.busy_seconds}
            for what, each in idle.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
