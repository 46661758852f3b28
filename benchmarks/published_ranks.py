"""The ranks behind `python -m benchmarks.published --measure`: how long each computes and waits in a ring, contiguous
against zigzag, on gloo ranks of one thread each on this machine, and what the simulator says for it.

A layer lasts until its last rank is done. What a rank does not spend blocked on transfers, or idle after its own last
block, it computes; where ranks share cores, that includes the time for which it has none.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import msgspec
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from sp_backend.execute import Executor
from sp_backend.kernels import get_kernel
from sp_backend.layout import Kind
from sp_backend.measure import measure
from sp_backend.native import choose_kernel
from sp_backend.placement import lay_out
from sp_backend.shape import ModelShape
from sp_backend.simulate import simulate
from sp_backend.strategies import plan_for
from sp_backend.transport.gloo import GlooTransport

LAYOUTS: Final[tuple[Kind, ...]] = ("contiguous", "zigzag")


@dataclass(frozen=True, slots=True)
class Share:
    """Parts of the time until the last rank is done."""

    num_ranks: int
    layout: Kind
    rank: int
    computes: float
    computes_simulated: float
    seconds: float  # of the layer


def measure_shares(num_ranks: int, strategy: str, shape: ModelShape, tokens: int, repeats: int) -> list[Share]:
    """Of every layout and rank, the median of `repeats` layers. shape.itemsize must be 4: ranks compute in fp32."""
    assert shape.itemsize == torch.float32.itemsize
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (num_ranks, strategy, shape, tokens, repeats, folder), nprocs=num_ranks)
        return msgspec.json.decode((Path(folder) / "shares").read_bytes(), type=list[Share])


def _rank(rank: int, num_ranks: int, strategy: str, shape: ModelShape, tokens: int, repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(minutes=5)
    dist.init_process_group("gloo", f"file://{folder}/store", limit, num_ranks, rank)
    transport = GlooTransport.create(num_ranks, num_ranks, rank, limit.total_seconds())
    kernel = get_kernel(choose_kernel()[0])
    machine = measure(transport, kernel, shape, torch.float32)
    shares = []
    for kind in LAYOUTS:
        plan = plan_for(
            strategy, num_ranks=num_ranks, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, kind=kind
        )
        geometry = lay_out(plan.layout, [(tokens, 0)])
        executor = Executor(plan, rank, kernel, transport, head_dim=shape.head_dim, dtype=torch.float32)
        schedule, rows = executor.schedule(geometry), geometry.rows[0]
        q = {c: torch.randn(rows[c], shape.num_heads, shape.head_dim) for c in plan.layout.q_of(rank)}
        kv = {c: torch.randn(rows[c], 2, shape.num_kv_heads, shape.head_dim) for c in plan.layout.kv_of(rank)}
        computes, seconds = _median(executor, lambda: executor.run(schedule, q, kv), repeats)  # noqa: B023
        simulated = simulate(plan, machine, shape, geometry)
        for r in range(num_ranks):
            busy = sum(e.end - e.start for e in simulated.timeline if e.rank == r and e.kind not in ("send", "wait"))
            shares.append(Share(num_ranks, kind, r, computes[r], busy / simulated.seconds, seconds))
    if rank == 0:
        (Path(folder) / "shares").write_bytes(msgspec.json.encode(shares))
    dist.destroy_process_group()


def _median(executor: Executor, run: Callable[[], object], repeats: int) -> tuple[list[float], float]:
    """Of several layers: each rank's share of computing, and the seconds of the slowest rank. The first warms up."""
    shares, slowest = [], []
    for _ in range(repeats + 1):
        dist.barrier()
        waited, since = executor.counters.wait_seconds, time.perf_counter()
        run()
        elapsed = time.perf_counter() - since
        mine = torch.tensor([elapsed, elapsed - (executor.counters.wait_seconds - waited)])
        ranks = [torch.empty(2) for _ in range(executor.transport.size)]
        dist.all_gather(ranks, mine)
        longest, computing = torch.stack(ranks)[:, 0].max(), torch.stack(ranks)[:, 1]
        shares.append((computing / longest).tolist())
        slowest.append(float(longest))
    return [statistics.median(each) for each in zip(*shares[1:], strict=True)], statistics.median(slowest[1:])
