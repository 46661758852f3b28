"""Attention of a sharded prompt inside SGLang: this plugin's backends against SGLang's own all-gather of keys.

    PYTHONPATH=tests/sglang/shims .venv-sglang/bin/python -m benchmarks.sglang --json out.json

Every rank is a process with SGLang's pools and its zigzag strategy (no server: a layer's attention, with the exchange
of keys and their writing to the pool). Per rank: bytes sent; seconds, the slowest rank's best of some repeats, by the
clock and of processor time, which a busy machine stretches less; and peak extra memory, by which the process's resident
set rose above what it was before the first call. Results that the JSON file holds already stay, but for those measured
again, so that lengths and backends can be measured one by one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sp_backend.native import choose_kernel
from tests.ranks import RankPool

ALL_GATHER = "all_gather_for_tests"
BACKENDS = (ALL_GATHER, "sp_ring_pass_kv", "sp_token_ring", "sp_ring_pass_q", "sp_auto")
SIZES = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128}  # of Qwen3-0.6B and 1.7B


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], help="tokens of a prompt")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = json.loads(args.json.read_text())["results"] if args.json and args.json.exists() else []
    cells = [(length, backend) for length in args.lengths for backend in args.backends]
    for length, backend in tqdm(cells, desc="Attention inside SGLang", disable=None):
        result = measure_cell(backend, length, args.ranks, args.repeats)
        results = [r for r in results if not same_cell(r, result)] + [result]
        tqdm.write(show(result))
        if args.json:
            about = {"sglang": version("sglang"), "torch": version("torch"), "sizes": SIZES, "dtype": "float32"}
            args.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


def measure_cell(backend: str, tokens: int, ranks: int, repeats: int) -> dict[str, Any]:
    pool = RankPool(ranks)  # fresh processes, so that no memory was grown before
    try:
        found = pool.run(measure, (backend, tokens, repeats), timeout=3600)
    finally:
        pool.close()
    return {
        "backend": backend,
        "tokens": tokens,
        "ranks": ranks,
        "date": date.today().isoformat(),
        "kernel": choose_kernel()[0],
        "seconds": max(r["seconds"] for r in found),
        "cpu_seconds": max(r["cpu_seconds"] for r in found),
        "bytes_sent": [r["bytes_sent"] for r in found],
        "peak_extra_bytes": [r["peak_extra_bytes"] for r in found],
        "plan": found[0]["plan"],
    }


def same_cell(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[name] == b[name] for name in ("backend", "tokens", "ranks"))


def show(result: dict[str, Any]) -> str:
    sent, extra = (max(result[name]) / 1e6 for name in ("bytes_sent", "peak_extra_bytes"))
    return (
        f"{result['tokens']} tokens over {result['ranks']} ranks, {result['backend']}, which ran {result['plan']}: "
        f"{result['seconds']:.3f} s, {result['cpu_seconds']:.3f} s of processor time; largest of the ranks: sent "
        f"{sent:.1f} MB, peak extra {extra:.1f} MB"
    )


def measure(rank: int, size: int, name: str, length: int, repeats: int) -> dict[str, Any]:
    """One layer on one rank. The first call, of a short prompt, opens connections and loads code."""
    from tests.sglang.pools import Prompt, logged, prepared
    from tests.sglang.reports import read_reports

    times, cpu_times, sent, peaks = [], [], 0, []
    with prepared(rank, size, name, [Prompt(64)], **SIZES) as run:
        run()
    with prepared(rank, size, name, [Prompt(length)], **SIZES) as run, logged() as lines:
        for _ in range(repeats):
            before, since, worked = run.bytes_sent, time.perf_counter(), time.process_time()
            with PeakMemory() as memory:
                run()
            times.append(time.perf_counter() - since)
            cpu_times.append(time.process_time() - worked)
            sent = run.bytes_sent - before
            peaks.append(memory.extra)
    plans = {report.plan for report in read_reports("\n".join(lines))} or {"all-gather of SGLang"}
    return {
        "seconds": min(times),
        "cpu_seconds": min(cpu_times),
        "bytes_sent": sent,
        "peak_extra_bytes": peaks[0],
        "plan": plans.pop(),
    }


class PeakMemory:
    """By how much this process's resident set rose, at its peak (Linux)."""

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        self.extra = _status("VmHWM") - self._before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(name)]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
