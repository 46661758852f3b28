"""Measures the machine that a planner needs, on the ranks that will run: links and kernel as the executor uses them.

Every rank of the group calls `machine_of` at the same time. Pairs of ranks are timed one after the other, each way
alone and both at once, then all ranks together; kernels on all ranks at once, as they will run. It takes some tenths
of a second, so the result is kept in a file for the same hosts, versions and sizes. All ranks get the same machine.
"""

from __future__ import annotations

import json
import logging
import platform
import socket
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from sp_backend.execute import Executor
from sp_backend.flow import flow_of
from sp_backend.geometry import Geometry
from sp_backend.kept import file_of, read_machine, write_machine
from sp_backend.kernels import HeadMap, Kernel, Span, Work, get_kernel
from sp_backend.shape import ModelShape
from sp_backend.state import AttentionState
from sp_backend.strategies import plan_for
from sp_backend.timing import REPEATS, barrier, exchange, of_all_ranks, settle, shortest, shortest_together
from sp_backend.topology import KernelRates, Link, Machine, Rates, Topology
from sp_backend.transport import Expected, Message, Transport
from sp_backend.transport.gather import gather_bytes

logger = logging.getLogger(__name__)

QUERIES = (1, 16, 64, 256, 1024)
KEYS = (64, 512, 2048)
LARGE_BYTES = 2 << 20
SMALL_BYTES = 64
MOST_FLOPS = 1e9  # of the largest block timed: fewer heads where it would take more
STEP_SECONDS = 1e-3  # scheduling and sampling: the same for every candidate, so it decides nothing


def machine_of(
    transport: Transport, kernel: str, shape: ModelShape, dtype: torch.dtype, *, folder: Path | None = None
) -> Machine:
    """The machine under an SP group: from its file, or else measured. Collective.

    kernel: its name in KERNELS. folder: of the file; None: sp-serve below XDG_CACHE_HOME or ~/.cache.
    """
    hosts = [part.decode() for part in gather_bytes(transport, socket.gethostname().encode())]
    versions = version("torch"), platform.machine(), torch.get_num_threads()
    sizes = shape.num_heads, shape.num_kv_heads, shape.head_dim, str(dtype)
    path = file_of("machine", [hosts, transport.name, kernel, versions, sizes], folder)
    found = read_machine(path, transport.size) if transport.rank == 0 else None
    known = gather_bytes(transport, b"" if found is None else found.to_json().encode())[0]
    if known:
        return Machine.from_json(known)
    since = time.perf_counter()
    machine = measure(transport, get_kernel(kernel), shape, dtype)
    logger.info("measured links and kernels in %.2f s", time.perf_counter() - since)
    if transport.rank == 0:
        write_machine(path, machine)
    return machine


def measure(transport: Transport, kernel: Kernel, shape: ModelShape, dtype: torch.dtype) -> Machine:
    """Collective; equal on all ranks. shape: heads and head_dim count, the rest does not."""
    topology = _measure_links(transport)
    barrier(transport)
    mine = _measure_rates(transport, kernel, shape, dtype, topology)
    theirs = [json.loads(part) for part in gather_bytes(transport, json.dumps(mine).encode())]
    rates = {name: statistics.fmean(each[name] for each in theirs) for name in mine if not isinstance(mine[name], list)}
    full, causal = (np.mean([each[name] for each in theirs], axis=0).tolist() for name in ("full", "causal"))
    kernel_rates = KernelRates(QUERIES, KEYS, tuple(map(tuple, full)), tuple(causal))
    return Machine(
        f"measured on {platform.machine()}",
        topology,
        Rates(kernel=kernel_rates, step_seconds=STEP_SECONDS, **rates),
    )


# Links


def _measure_links(transport: Transport) -> Topology:
    """Each way of a pair is a resource, so are both ways together, and all ranks together."""
    size = transport.size
    resources: dict[str, float] = {}
    links: list[Link] = []
    for a in range(size):
        for b in range(a + 1, size):
            latency, up, down, both = _measure_pair(transport, a, b)
            pair = f"{a}-{b} both ways"
            resources |= {f"{a} to {b}": up, f"{b} to {a}": down, pair: both}
            links.append(Link(a, b, latency, (f"{a} to {b}", pair)))
            links.append(Link(b, a, latency, (f"{b} to {a}", pair)))
    if size > 2:
        right, left = (transport.rank + 1) % size, (transport.rank - 1) % size
        seconds = shortest_together(transport, lambda: exchange(transport, {right: LARGE_BYTES}, {left: LARGE_BYTES}))
        resources["all ranks"] = size * LARGE_BYTES / max(each for (each,) in of_all_ranks(transport, [seconds]))
        links = [Link(x.src, x.dst, x.latency, (*x.resources, "all ranks")) for x in links]
    return Topology(size, resources, tuple(links))


def _measure_pair(transport: Transport, a: int, b: int) -> tuple[float, float, float, float]:
    """Latency (s), and bytes/s from a to b, from b to a, and both ways in total. The others wait."""
    rank, seconds = transport.rank, [0.0] * 4
    if rank in (a, b):
        peer = a + b - rank

        def send(sender: int, num_bytes: int) -> None:
            """One way, and a small answer."""
            if rank == sender:
                exchange(transport, {peer: num_bytes}, {})
                exchange(transport, {}, {peer: SMALL_BYTES})
            else:
                exchange(transport, {}, {peer: num_bytes})
                exchange(transport, {peer: SMALL_BYTES}, {})

        send(a, LARGE_BYTES)  # connections open at their first use
        seconds = [
            shortest(lambda: send(a, SMALL_BYTES), 4 * REPEATS) / 2,
            shortest(lambda: send(a, LARGE_BYTES)),
            shortest(lambda: send(b, LARGE_BYTES)),
            shortest(lambda: exchange(transport, {peer: LARGE_BYTES}, {peer: LARGE_BYTES})),
        ]
    latency, up, down, both = (max(values) for values in zip(*(of_all_ranks(transport, seconds)), strict=True))
    return (
        latency,
        LARGE_BYTES / max(up - 2 * latency, up / 2),
        LARGE_BYTES / max(down - 2 * latency, down / 2),
        2 * LARGE_BYTES / max(both - latency, both / 2),
    )


# One rank's own work, while the others do the same


def _measure_rates(
    transport: Transport, kernel: Kernel, shape: ModelShape, dtype: torch.dtype, topology: Topology
) -> dict[str, float | list[float] | list[list[float]]]:
    group = shape.num_heads // shape.num_kv_heads
    most = QUERIES[-1] * KEYS[-1] * 4 * shape.head_dim * group
    kv_heads = max(1, min(shape.num_kv_heads, int(MOST_FLOPS / most)))
    timer = _KernelTimer(kernel, kv_heads * group, kv_heads, shape.head_dim, dtype)
    call = timer.seconds(1, 1, causal=False)

    def rate(queries: int, keys: int, causal: bool) -> float:
        pairs = queries * (queries + 1) / 2 if causal else queries * keys
        seconds = timer.seconds(queries, keys, causal)
        return 4 * shape.head_dim * kv_heads * group * pairs / max(seconds - call, seconds / 2)

    fold = _merge_seconds(1, shape)
    merge = max(_merge_seconds(256, shape) - fold, fold / 10)
    source, target = torch.zeros(2, LARGE_BYTES, dtype=torch.uint8)
    x, weight = torch.randn(256, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    big = torch.randn(2048, 2048).to(dtype)
    message, round_seconds = _measure_overheads(transport, kernel, shape, dtype, topology, call, fold)
    return {
        "full": [[rate(q, k, False) for k in KEYS] for q in QUERIES],
        "causal": [rate(q, q, True) for q in QUERIES],
        "call_seconds": call,
        "fold_seconds": fold,
        "merge_bytes": 255 * shape.num_heads * (shape.head_dim + 1) * 4 / merge,
        "copy_bytes": LARGE_BYTES / shortest(lambda: target.copy_(source)),
        "dense_flops": 2 * x.numel() * 1024 / shortest(lambda: x @ weight),
        "memory_bytes": big.nbytes / shortest(lambda: big[:1] @ big),
        "message_seconds": message,
        "round_seconds": round_seconds,
        "overlap": _measure_overlap(transport, timer),
    }


class _KernelTimer:
    """Times one kernel on random blocks of some of the model's heads."""

    def __init__(self, kernel: Kernel, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self._kernel, self._heads = kernel, HeadMap(0, heads, heads // kv_heads)
        self._q = torch.randn(QUERIES[-1], heads, head_dim).to(dtype)
        self._kv = torch.randn(KEYS[-1], 2, kv_heads, head_dim).to(dtype)
        self._head_dim = head_dim

    def call(self, queries: int, keys: int, causal: bool) -> Callable[[], object]:
        spans = (Span(0, queries, 0, keys),)
        work = Work(spans, causal, self._heads, self._head_dim, self._head_dim**-0.5, queries)
        attention, q, kv = self._kernel(work), self._q[:queries], self._kv[:keys]
        return lambda: attention(q, kv)

    def seconds(self, queries: int, keys: int, causal: bool) -> float:
        return shortest(self.call(queries, keys, causal), 3)


def _merge_seconds(rows: int, shape: ModelShape) -> float:
    state = AttentionState.empty(rows, shape.num_heads, shape.head_dim)
    state.lse.zero_()
    other = state.merge(state)
    return shortest(lambda: state.merge_(other))


def _measure_overheads(
    transport: Transport,
    kernel: Kernel,
    shape: ModelShape,
    dtype: torch.dtype,
    topology: Topology,
    call: float,
    fold: float,
) -> tuple[float, float]:
    """Seconds to post a message, and what a round of a plan costs beside its messages and kernel calls."""
    size = transport.size
    right, left = (transport.rank + 1) % size, (transport.rank - 1) % size
    posting: list[float] = []

    def post() -> None:
        since = time.perf_counter()
        receiving, sending = transport.exchange(
            [Expected(left, SMALL_BYTES)], [Message(right, transport.take(SMALL_BYTES))]
        )
        posting.append((time.perf_counter() - since) / 2)
        settle(receiving, sending)

    if size > 1:
        for _ in range(4 * REPEATS):
            post()
    message = min(posting, default=0.0)
    plan = plan_for("ring_pass_kv", num_ranks=size, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads)
    executor = Executor(plan, transport.rank, kernel, transport, head_dim=shape.head_dim, dtype=dtype)
    layout = plan.layout
    schedule = executor.schedule(Geometry([[1] * layout.num_chunks]))
    q = {c: torch.zeros(1, shape.num_heads, shape.head_dim, dtype=dtype) for c in layout.q_of(transport.rank)}
    kv = {c: torch.zeros(1, 2, shape.num_kv_heads, shape.head_dim, dtype=dtype) for c in layout.kv_of(transport.rank)}
    before = executor.counters.kernel_calls
    seconds = shortest(lambda: executor.run(schedule, q, kv), 2 * REPEATS)
    calls = (executor.counters.kernel_calls - before) / (2 * REPEATS + 1)
    latency = max((link.latency for link in topology.links), default=0.0)
    folds = flow_of(plan, paged=False).num_merges(transport.rank)
    rest = seconds - calls * call - folds * fold - (size - 1) * (latency + 2 * message)
    return message, max(rest / size, 0.1 * seconds / size)


def _measure_overlap(transport: Transport, timer: _KernelTimer) -> float:
    """How much of an exchange goes on beside a kernel: 1, all of it."""
    if transport.size == 1:
        return 1.0
    right, left = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    kernel = timer.call(256, KEYS[-1], False)

    def alone() -> None:
        exchange(transport, {right: LARGE_BYTES}, {left: LARGE_BYTES})

    def together() -> None:
        exchange(transport, {right: LARGE_BYTES}, {left: LARGE_BYTES}, meanwhile=kernel)

    computing, moving = shortest(kernel), shortest_together(transport, alone)
    both = shortest_together(transport, together)
    return min(1.0, max(0.0, (computing + moving - both) / min(computing, moving)))
