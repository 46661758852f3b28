"""`python -m benchmarks.attention`: attention alone, bf16. The kernel on one core, decode, and two ranks of one thread.

Everything is timed in turns, and ratios are of medians: against torch's flash kernel, the machine's own bf16 matrix
product and a plain read. One core is timed by processor time; ranks by the clock, so they want a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

import sp_backend
from sp_backend.kernels import HeadMap, Span, Work, get_kernel
from sp_backend.native import choose_kernel

KERNELS = ("native", "torch_cpu")
STRATEGIES = ("ring_pass_kv", "token_ring")
MATRIX = 2048
READ_BYTES = 256 << 20


class Shape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_heads}:{self.num_kv_heads} D {self.head_dim}"

    def flops(self, tokens: int) -> float:
        return 2 * self.num_heads * self.head_dim * tokens * tokens  # causal

    def tensors(self, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        kv = torch.randn(keys, 2, self.num_kv_heads, self.head_dim, dtype=torch.bfloat16)
        return torch.randn(queries, self.num_heads, self.head_dim, dtype=torch.bfloat16), kv


PREFILL = Shape(8, 8, 64), Shape(16, 2, 128)
DECODE = Shape(8, 8, 64), Shape(4, 2, 128), Shape(8, 2, 128), Shape(16, 2, 128)


def kernel_call(name: str, shape: Shape, q: torch.Tensor, kv: torch.Tensor) -> Callable[[], object]:
    heads = HeadMap(0, shape.num_heads, shape.num_heads // shape.num_kv_heads)
    work = Work((Span(0, len(q), 0, len(kv)),), True, heads, shape.head_dim, shape.head_dim**-0.5, len(q))
    attention = get_kernel(name)(work)
    return lambda: attention(q, kv)


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of this thread's processor time, in turns; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            since = time.thread_time()
            call()
            if turn:
                seconds[name].append(time.thread_time() - since)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_prefill(shape: Shape, tokens: int, rounds: int) -> dict[str, Any]:
    q, kv = shape.tensors(tokens, tokens)
    a, b = torch.randn(2, MATRIX, MATRIX).bfloat16()
    calls: dict[str, Callable[[], object]] = {name: kernel_call(name, shape, q, kv) for name in KERNELS}
    found = medians({**calls, "matrix product": lambda: a @ b}, rounds)
    rates = {name: shape.flops(tokens) / found[name] / 1e9 for name in KERNELS}
    matrix = 2 * MATRIX**3 / found["matrix product"] / 1e9
    return {
        "shape": str(shape),
        "tokens": tokens,
        "gflops": {**rates, "matrix product": matrix},
        "over_torch": rates["native"] / rates["torch_cpu"],
        "of_matrix_rate": rates["native"] / matrix,
    }


def measure_decode(shape: Shape, tokens: int, rounds: int) -> dict[str, Any]:
    q, kv = shape.tensors(1, tokens)
    large = torch.zeros(READ_BYTES // 4)
    calls: dict[str, Callable[[], object]] = {name: kernel_call(name, shape, q, kv) for name in KERNELS}
    found = medians({**calls, "read": large.sum}, 3 * rounds)
    read = READ_BYTES / found["read"] / 1e9
    rates = {name: kv.nbytes / found[name] / 1e9 for name in KERNELS}
    return {
        "shape": str(shape),
        "tokens": tokens,
        "gb_per_second": {**rates, "read": read},
        "of_read": rates["native"] / read,
    }


def measure_ranks(shape: Shape, tokens: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (folder, shape, tokens, rounds), nprocs=2)
        return dict(json.loads((Path(folder) / "result").read_text()))


def _rank(rank: int, folder: str, shape: Shape, tokens: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=5), 2, rank)
    q, kv = shape.tensors(tokens, tokens)
    alone = kernel_call(choose_kernel()[0], shape, q, kv)
    part = [t[: tokens // 2].contiguous() for t in (q, kv[:, 0], kv[:, 1])]
    seconds: dict[str, list[float]] = {name: [] for name in ("one rank", *STRATEGIES)}
    for turn in range(rounds + 1):
        for name in seconds:
            dist.barrier()
            since = time.perf_counter()
            if name != "one rank":
                sp_backend.attention(*part, lengths=tokens, strategy=name)
                dist.barrier()
            elif rank == 0:
                alone()
            if turn:
                seconds[name].append(time.perf_counter() - since)
    found = {name: statistics.median(values) for name, values in seconds.items()}
    efficiency = {name: found["one rank"] / (2 * found[name]) for name in STRATEGIES}
    result = {"shape": str(shape), "tokens": tokens, "seconds": found, "efficiency": efficiency}
    if rank == 0:
        (Path(folder) / "result").write_text(json.dumps(result))
    dist.destroy_process_group()


def plot(results: list[dict[str, Any]], path: str) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(layout="constrained")
    for shape in dict.fromkeys(r["shape"] for r in results):
        rows = [r for r in results if r["shape"] == shape]
        for name in rows[0]["gflops"]:
            axes.plot([r["tokens"] for r in rows], [r["gflops"][name] for r in rows], "o-", label=f"{name}, {shape}")
    axes.set(xscale="log", xlabel="tokens", ylabel="GFLOP/s, one core, bf16, causal", ylim=(0, None))
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and turns: under a minute")
    parser.add_argument("--rounds", type=int, default=None, help="turns (default: 5; --quick: 3)")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--plot", help="draw the kernel's rates here")
    args = parser.parse_args()
    name, why = choose_kernel()
    if name != "native":
        parser.error(why)
    torch.set_num_threads(1)
    rounds = args.rounds or (3 if args.quick else 5)
    lengths = (4096, 8192) if args.quick else (4096, 8192, 16384, 32768)
    shared = (8192,) if args.quick else (8192, 16384, 32768)
    jobs: list[tuple[str, Callable[..., dict[str, Any]], Shape, int]] = [
        *(("kernel", measure_prefill, s, n) for s in (PREFILL[:1] if args.quick else PREFILL) for n in lengths),
        *(("decode", measure_decode, s, 32768) for s in DECODE),
        *(("two ranks", measure_ranks, s, n) for s in (PREFILL[:1] if args.quick else PREFILL) for n in shared),
    ]
    results: dict[str, list[dict[str, Any]]] = {}
    for kind, measure, shape, tokens in tqdm(jobs, desc="Attention", disable=None):
        found = measure(shape, tokens, rounds)
        results.setdefault(kind, []).append(found)
        tqdm.write(f"{kind}: {json.dumps(found)}")
    if args.json:
        about = {"machine": platform.machine(), "torch": torch.__version__, "rounds": rounds}
        Path(args.json).write_text(json.dumps({**about, **results}, indent=1))
    if args.plot:
        plot(results["kernel"], args.plot)


if __name__ == "__main__":
    main()
