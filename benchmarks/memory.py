"""`python -m benchmarks.memory`: peak memory of each rank against prompt length, through the server.

A server of its own for each length, since pages of keys, once used, stay. Resident memory as the kernel counts it
(VmHWM): memory that ranks share, such as messages, counts in each of them. What should not grow with the prompt is the
rest: the peak without the rank's share of the prompt's keys and values.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks.launched import LaunchedServer
from benchmarks.prefill import time_to_first_token
from benchmarks.prefill_peers import write_model
from server.arguments import DEFAULT_MODEL
from sp_backend.models.config import ModelConfig

LENGTHS = (8192, 16384, 32768, 65536)
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Result:
    """Bytes, of the rank with the largest peak."""

    tokens: int
    ready: int  # resident before the prompt
    peak: int
    kv: int  # a rank's share of the prompt's keys and values, in bf16
    rest: int  # peak - kv


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("default", "dummy"), default="default", help="dummy: 12 layers, heads 12:4")
    parser.add_argument("--sp-size", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", default=LENGTHS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("server_args", nargs="*", help="after --: further flags of the server")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        flags = ["--sp-size", str(args.sp_size), "--threads-per-rank", "1"]
        if args.model == "dummy":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_model(folder)
            flags += ["--model-path", str(folder)]
        flags += args.server_args
        model = ModelConfig.load(model_folder(flags))
        progress = tqdm(args.lengths, desc="Lengths", disable=None)
        results = [measure(model, tokens, args.sp_size, flags) for tokens in progress]
    print(f"{'tokens':>8}{'ready':>12}{'peak':>12}{'KV share':>12}{'peak - KV':>12}  MiB of a rank")
    for r in results:
        print(f"{r.tokens:>8}" + "".join(f"{n / MIB:>12.0f}" for n in (r.ready, r.peak, r.kv, r.rest)))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")
    return 0


def model_folder(flags: Sequence[str]) -> Path:
    """The model that a server with these flags serves."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model-path", type=Path, default=DEFAULT_MODEL)
    found: Path = parser.parse_known_args(flags)[0].model_path
    return found


def measure(model: ModelConfig, tokens: int, sp_size: int, flags: Sequence[str]) -> Result:
    with LaunchedServer(*flags) as server:
        ranks = psutil.Process(server.process.pid).children(recursive=True)
        ready = max(rank.memory_info().rss for rank in ranks)
        time_to_first_token(server, tokens, seed=tokens)
        peak = max(peak_bytes(rank.pid) for rank in ranks)
    per_token = model.num_layers * 2 * model.num_kv_heads * model.head_dim * 2
    kv = tokens * per_token // sp_size
    return Result(tokens, ready, peak, kv, peak - kv)


def peak_bytes(pid: int) -> int:
    """The most resident memory that a process ever had. Linux."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    sys.exit(main())
