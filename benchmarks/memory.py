"""`python -m benchmarks.memory`: peak memory of each rank against prompt length, through the server.

A server of its own for each length, since pages of keys, once used, stay. Resident memory as the kernel counts it
(VmHWM): memory that ranks share, such as messages, counts in each of them. What should not grow with the prompt is the
rest: the peak without the rank's share of the prompt's keys and values.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks.command import parser_of, write_results
from benchmarks.launched import LaunchedServer
from benchmarks.prefill import time_to_first_token
from benchmarks.prefill_peers import write_model
from server.arguments import DEFAULT_MODEL
from sp_backend.models.config import ModelConfig

LENGTHS = (8192, 16384, 32768, 65536)
QUICK_LENGTHS = (4096, 8192)
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Result:
    """Bytes, of the rank with the largest peak."""

    tokens: int
    start: int  # peak until the server was ready
    ready: int  # resident before the prompt
    peak: int  # from then on
    kv: int  # a rank's share of the prompt's keys and values, in bf16
    rest: int  # peak - kv


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.memory", __doc__)
    parser.add_argument("--model", choices=("default", "dummy"), default="default", help="dummy: 12 layers, heads 12:4")
    parser.add_argument("--sp-size", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="(default: 8k to 64k, two minutes)")
    parser.add_argument("--quick", action="store_true", help="4k and 8k: under a minute")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        flags = ["--sp-size", str(args.sp_size), "--threads-per-rank", "1"]
        if args.model == "dummy":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_model(folder)
            flags += ["--model-path", str(folder)]
        flags += args.server_args
        model = ModelConfig.load(model_folder(flags))
        progress = tqdm(args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS), desc="Lengths", disable=None)
        results = [measure(model, tokens, args.sp_size, flags) for tokens in progress]
    report(results)
    write_results(args.json, {"results": [asdict(r) for r in results]})
    return 0


def report(results: Sequence[Result]) -> None:
    columns = "start", "ready", "peak", "KV share", "peak - KV"
    print(f"{'tokens':>8}" + "".join(f"{name:>12}" for name in columns) + "  MiB of a rank")
    for r in results:
        print(f"{r.tokens:>8}" + "".join(f"{n / MIB:>12.0f}" for n in (r.start, r.ready, r.peak, r.kv, r.rest)))
    first, last = results[0], results[-1]
    if last.tokens > first.tokens:
        growth = (last.rest - first.rest) / MIB / (last.tokens - first.tokens) * 1000
        print(f"beyond keys: {growth:+.2f} MiB every 1,000 tokens from {first.tokens} to {last.tokens}")


def model_folder(flags: Sequence[str]) -> Path:
    """The model that a server with these flags serves."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model-path", type=Path, default=DEFAULT_MODEL)
    found: Path = parser.parse_known_args(flags)[0].model_path
    return found


def measure(model: ModelConfig, tokens: int, sp_size: int, flags: Sequence[str]) -> Result:
    with LaunchedServer(*flags) as server:
        ranks = [rank.pid for rank in psutil.Process(server.process.pid).children(recursive=True)]
        start, ready = (max(resident_bytes(rank, what) for rank in ranks) for what in ("VmHWM", "VmRSS"))
        for rank in ranks:
            Path(f"/proc/{rank}/clear_refs").write_text("5")  # its peak starts anew
        time_to_first_token(server, tokens, seed=tokens)
        peak = max(resident_bytes(rank, "VmHWM") for rank in ranks)
    per_token = model.num_layers * 2 * model.num_kv_heads * model.head_dim * 2
    kv = tokens * per_token // sp_size
    return Result(tokens, start, ready, peak, kv, peak - kv)


def resident_bytes(pid: int, what: str) -> int:
    """Of a process: VmRSS, or VmHWM for the most since its peak was cleared. Linux."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(what)))


if __name__ == "__main__":
    sys.exit(main())
