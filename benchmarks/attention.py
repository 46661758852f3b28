"""`python -m benchmarks.attention`: attention alone, bf16. The kernel on one core, decode, and two ranks of one thread.

Everything is timed in turns, and ratios are of medians: against torch's flash kernel, the machine's own bf16 matrix
product and a plain read. One core is timed by processor time; ranks by the clock, so they want a quiet machine.
`--only peers` times two ranks against two of torch's context_parallel and of yunchang (`make bench-peers`).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import matplotlib
import torch
from tqdm import tqdm

from benchmarks import peers
from benchmarks.attention_peers import measure as measure_peers
from benchmarks.attention_ranks import DTYPE, PAGE_SIZE, Shape
from benchmarks.attention_ranks import measure as measure_ranks
from benchmarks.command import parser_of, write_results
from sp_backend.kernels import HeadMap, Span, Work, get_kernel
from sp_backend.kv_cache import KVCache
from sp_backend.native import choose_kernel

KERNELS = ("native", "torch_cpu")
DEFAULT_PARTS = ("kernel", "decode", "ranks")
MATRIX = 2048
READ_BYTES = 256 << 20
PREFILL = Shape(8, 8, 64), Shape(16, 2, 128)
DECODE = Shape(8, 8, 64), Shape(4, 2, 128), Shape(8, 2, 128), Shape(16, 2, 128)


def kernel_call(
    name: str, shape: Shape, q: torch.Tensor, kv: torch.Tensor, rows: torch.Tensor | None = None
) -> Callable[[], object]:
    """rows: those of kv that hold the keys, in order."""
    heads = HeadMap(0, shape.num_heads, shape.num_heads // shape.num_kv_heads)
    spans = (Span(0, len(q), 0, len(kv)),)
    work = Work(spans, True, heads, shape.head_dim, shape.head_dim**-0.5, len(q), k_rows=rows)
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
    """Keys lie in a KV cache, pages in order, as in a new server, or in any. A read of another cache is the measure."""
    q, kv = shape.tensors(1, tokens)
    pool = pool_of(shape, tokens).copy_(kv)
    rows = torch.randperm(tokens // PAGE_SIZE)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)
    large = pool_of(shape, READ_BYTES * tokens // kv.nbytes).zero_().view(torch.float32)
    calls: dict[str, Callable[[], object]] = {name: kernel_call(name, shape, q, pool) for name in KERNELS}
    any_order = kernel_call("native", shape, q, pool, rows.flatten())
    found = medians({**calls, "pages in any order": any_order, "read": large.sum}, 3 * rounds)
    read = READ_BYTES / found.pop("read") / 1e9
    rates = {name: kv.nbytes / seconds / 1e9 for name, seconds in found.items()}
    return {
        "shape": str(shape),
        "tokens": tokens,
        "gb_per_second": {**rates, "read": read},
        "of_read": rates["native"] / read,
        "of_read_in_any_order": rates["pages in any order"] / read,
    }


def pool_of(shape: Shape, tokens: int) -> torch.Tensor:
    """[tokens, 2, kv_heads, head_dim]"""
    return KVCache(
        num_layers=1,
        num_pages=tokens // PAGE_SIZE,
        page_size=PAGE_SIZE,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=DTYPE,
        device=torch.device("cpu"),
    ).pages(0)


def measure_shared(shape: Shape, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds and efficiency of each strategy on two ranks, by transport."""
    results = measure_ranks([shape], [tokens], rounds)
    found = [{**asdict(r), "shape": str(shape)} for r in results]
    return {"shape": str(shape), "tokens": tokens, "strategies": found}


MEASURES: dict[str, Callable[[Shape, int, int], dict[str, Any]]] = {
    "kernel": measure_prefill,
    "decode": measure_decode,
    "ranks": measure_shared,
    "peers": measure_peers,
}


def plot(results: dict[str, list[dict[str, Any]]], path: str) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    on = {"kernel": "one core", "peers": "two ranks of one thread"}
    parts = [part for part in on if part in results]
    figure, all_axes = pyplot.subplots(
        1, len(parts), figsize=(6.4 * len(parts), 6), layout="constrained", squeeze=False
    )
    for part, axes in zip(parts, all_axes[0], strict=True):
        rows = results[part]
        for shape, line in zip(dict.fromkeys(r["shape"] for r in rows), ("o-", "s--"), strict=False):
            own = [r for r in rows if r["shape"] == shape]
            axes.set_prop_cycle(None)
            for name in own[0]["gflops"]:
                axes.plot([r["tokens"] for r in own], [r["gflops"][name] for r in own], line, label=f"{name}, {shape}")
        lengths = sorted({r["tokens"] for r in rows})
        axes.set(xscale="log", xlabel="tokens", ylabel=f"GFLOP/s, {on[part]}, bf16, causal", ylim=(0, None))
        axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axes.minorticks_off()
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.savefig(path)


def main() -> None:
    parser = parser_of("benchmarks.attention", __doc__, server_args=None)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and turns: under a minute")
    parser.add_argument("--repeats", "--rounds", type=int, help="turns (default: 5; --quick: 3)")
    parser.add_argument(
        "--only", choices=tuple(MEASURES), nargs="+", default=DEFAULT_PARTS, help="(default: all but peers)"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="TOKENS", help="(default: 4k to 32k; --quick: 4k, 8k)"
    )
    parser.add_argument("--plot", help="draw the rates of the kernel and of the peers here")
    args = parser.parse_args()
    name, why = choose_kernel()
    if name != "native":
        parser.error(why)
    if "peers" in args.only and (reason := peers.missing()):
        parser.error(reason)
    torch.set_num_threads(1)
    rounds = args.repeats or (3 if args.quick else 5)
    lengths = args.lengths or ((4096, 8192) if args.quick else (4096, 8192, 16384, 32768))
    shapes = PREFILL[:1] if args.quick else PREFILL
    jobs = [("kernel", s, n) for s in shapes for n in lengths]
    jobs += [("decode", s, 32768) for s in DECODE]
    jobs += [(part, s, n) for part in ("ranks", "peers") for s in shapes for n in lengths if n >= 8192]
    jobs = [job for job in jobs if job[0] in args.only]
    results: dict[str, list[dict[str, Any]]] = {}
    for kind, shape, tokens in tqdm(jobs, desc="Attention", disable=None):
        found = MEASURES[kind](shape, tokens, rounds)
        results.setdefault(kind, []).append(found)
        tqdm.write(f"{kind}: {json.dumps(found)}")
    versions = peers.versions("torch", "yunchang") if "peers" in args.only else {}
    write_results(args.json, {"rounds": rounds, "peers_installed": versions, **results})
    if args.plot and {"kernel", "peers"} & set(args.only):
        plot(results, args.plot)


if __name__ == "__main__":
    main()
