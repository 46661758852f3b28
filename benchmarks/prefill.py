"""`python -m benchmarks.prefill`: time to first token against prompt length, over HTTP.

The servers to be compared are up at the same time and are asked in turn, so that a busy moment of the machine hits
all of them. Each request is a prompt of its own, on an idle server. `--compare peers` adds
`transformers` and `llama.cpp` on the same weights, as libraries without HTTP, from the environment of
`make bench-peers`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import matplotlib
from tqdm import tqdm

from benchmarks import peers
from benchmarks.command import parser_of, write_results
from benchmarks.launched import LaunchedServer
from benchmarks.prefill_peers import PACKAGES, Peer, check_same_model, matrix_rate, model_flops, write_model
from server import loadtest
from server.arguments import STRATEGIES
from sp_backend.models.config import ModelConfig

ONE_THREAD = ("--threads-per-rank", "1")
SETUPS: dict[str, dict[str, tuple[str, ...]]] = {  # --compare: label -> flags; ratios are to the first
    "sp": {
        "sp 1, 1 thread": ("--sp-size", "1", *ONE_THREAD),
        "sp 2, 1 thread each": ("--sp-size", "2", *ONE_THREAD),
        "sp 1, 2 threads": ("--sp-size", "1", "--threads-per-rank", "2"),
    },
    "peers": {
        "sp 2, 1 thread each": ("--sp-size", "2", *ONE_THREAD),
        "tp 2, 1 thread each": ("--tp-size", "2", *ONE_THREAD),
        "sp 1, 2 threads": ("--sp-size", "1", "--threads-per-rank", "2"),
    },
    "threshold": {
        "on one rank": ("--sp-size", "2", "--sp-strategy", "off", *ONE_THREAD),
        "spread": ("--sp-size", "2", "--sp-threshold", "0", *ONE_THREAD),
    },
    "auto": {
        "off": ("--sp-size", "2", "--sp-strategy", "off", *ONE_THREAD),
        "auto": ("--sp-size", "2", *ONE_THREAD),
    },
    "strategy": {
        "auto": ("--sp-size", "2", *ONE_THREAD),
        **{name: ("--sp-size", "2", "--sp-strategy", name, *ONE_THREAD) for name in STRATEGIES["tokens"]},
        "sharded_q": ("--sp-size", "2", "--sp-layout", "heads", *ONE_THREAD),
        "sharded_q, redundant": ("--sp-size", "2", "--sp-layout", "heads", "--sp-redundant-kv", *ONE_THREAD),
    },
}
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
QUICK_LENGTHS = (512, 2048)
Times = dict[int, dict[str, list[float]]]  # prompt tokens -> label -> seconds
Label = TypeVar("Label", bound=Hashable)
Rates = dict[int, list[float]]  # prompt tokens -> FLOP/s of a core's bf16 matrix product, ahead of each round


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    args.lengths = args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS)
    repeats = 1 if args.quick else args.repeats
    if args.compare == "peers" and (reason := peers.missing()):
        parser.error(reason)
    with contextlib.ExitStack() as stack:
        flags, model = args.server_args, None
        libraries: dict[str, Peer] = {}
        if args.compare == "peers":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = write_model(folder)
            flags = ["--model-path", str(folder), *flags]
            libraries = {f"{name}, 2 threads": stack.enter_context(Peer(name, folder)) for name in PACKAGES}
            check_same_model(list(libraries.values()))
        servers = {
            label: stack.enter_context(LaunchedServer(*setup, *flags)) for label, setup in SETUPS[args.compare].items()
        }
        rates: Rates = {n: [] for n in args.lengths}
        before = (lambda n: rates[n].append(matrix_rate())) if model else (lambda n: None)
        times = measure({**servers, **libraries}, args.lengths, repeats, args.long, before)
        ranks = {label: sharding(server) for label, server in servers.items()}
    report(times, ranks)
    if model is not None:
        report_efficiency(times, rates, model)
    write_results(args.json, as_json(args, times, ranks, rates))
    if args.plot:
        plot(args.plot, times)
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = parser_of("benchmarks.prefill", __doc__)
    parser.add_argument("--compare", choices=tuple(SETUPS), default="sp")
    parser.add_argument("--quick", action="store_true", help="two short lengths, once")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over the lengths (default: 3)")
    parser.add_argument("--long", type=int, default=32768, help="lengths above this are run once (default: 32768)")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    return parser


def measure(
    servers: Mapping[Label, LaunchedServer | Peer],
    lengths: Sequence[int],
    repeats: int,
    long: int,
    before: Callable[[int], None] = lambda length: None,
) -> dict[int, dict[Label, list[float]]]:
    """before: called with the length ahead of each round's prompts."""
    rounds = [(i, n) for i in range(repeats) for n in lengths if i == 0 or n <= long]
    times: dict[int, dict[Label, list[float]]] = {n: {label: [] for label in servers} for n in lengths}
    for i, length in tqdm(rounds, desc="Prompts", unit="length"):
        before(length)
        labels = list(servers)
        for label in labels[i % len(labels) :] + labels[: i % len(labels)]:  # nobody always runs after the same one
            times[length][label].append(time_to_first_token(servers[label], length, seed=length + i))
    return times


def time_to_first_token(server: LaunchedServer | Peer, prompt_tokens: int, seed: int) -> float:
    """Seconds of one request on an idle server, by the load test; of a library, by its own clock."""
    if isinstance(server, Peer):
        return server.time_to_first_token(prompt_tokens, seed)
    with tempfile.TemporaryDirectory() as folder, silence():
        file = Path(folder) / "out.json"
        flags = {"base-url": server.url, "prompt-tokens": prompt_tokens, "seed": seed, "json": file}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        failed = loadtest.main([*words, "--output-tokens", "1", "--num-requests", "1", "--concurrency", "1"])
        answer = json.loads(file.read_text())
    if failed:
        raise RuntimeError(f"{prompt_tokens} tokens on {server.url}: {answer['requests']}")
    request = answer["requests"][0]
    return float(request["first"] - request["start"])


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """The load test's own bar and table would hide ours."""
    with io.StringIO() as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def sharding(server: LaunchedServer) -> list[dict[str, float]]:
    """What each rank computed and holds, from /metrics: totals over all requests so far."""
    ranks: dict[str, dict[str, float]] = {}
    for line in httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines():
        if line.startswith("sp:rank_"):
            name, rest = line.split("{", 1)
            labels, value = rest.rsplit("} ", 1)
            rank = next(label.split('"')[1] for label in labels.split(",") if label.startswith("rank="))
            ranks.setdefault(rank, {})[name] = float(value)
    return [ranks[rank] for rank in sorted(ranks, key=int)]


def report(times: Times, ranks: dict[str, list[dict[str, float]]]) -> None:
    labels = list(next(iter(times.values())))
    print(f"{'tokens':>8}" + "".join(f"{label:>30}" for label in labels))
    for length, row in times.items():
        first = statistics.median(row[labels[0]])
        medians = [statistics.median(row[label]) for label in labels]
        print(f"{length:>8}" + "".join(f"{median:>19.3f} s x {median / first:5.2f} " for median in medians))
    for label, counted in ranks.items():
        print(label)
        shares("query-key pairs", [rank["sp:rank_query_key_pairs_total"] for rank in counted])
        shares("pages", [rank["sp:rank_pages_used"] + rank["sp:rank_pages_cached"] for rank in counted])


def report_efficiency(times: Times, rates: Rates, model: ModelConfig) -> None:
    """Of the first setup: model FLOPs by the time and the matrix rate of two cores."""
    label = next(iter(next(iter(times.values()))))
    for length, row in times.items():
        rate, seconds = statistics.median(rates[length]), statistics.median(row[label])
        share = model_flops(model, length) / seconds / (2 * rate)
        print(f"{label}, {length} tokens: {share:.1%} of two cores' matrix rate ({rate / 1e9:.0f} GFLOP/s each)")


def shares(name: str, values: list[float]) -> None:
    print(f"  {name} by rank: " + ", ".join(f"{value / (sum(values) or 1):.1%}" for value in values))


def as_json(
    args: argparse.Namespace,
    times: Times,
    ranks: dict[str, list[dict[str, float]]],
    rates: Rates,
) -> dict[str, Any]:
    return {
        "peers": peers.versions("torch", *PACKAGES.values()) if args.compare == "peers" else {},
        "matrix_flops_per_core": rates,
        "ttft_seconds": times,
        "ranks": ranks,
    }


def plot(file: Path, times: Times) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for label in next(iter(times.values())):
        medians = [statistics.median(row[label]) for row in times.values()]
        axes.plot(list(times), medians, marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="time to first token (s)")
    axes.set_xticks(list(times), [f"{n // 1024}k" if n >= 1024 else str(n) for n in times])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
