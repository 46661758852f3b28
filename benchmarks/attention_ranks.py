"""What sharing attention over the ranks of one host costs; a part of benchmarks.attention.

One layer's attention of one causal prompt as the server runs it: keys into the pages, the plan, the output in the
model's dtype. One rank with one thread, then P ranks with one thread each, in turns. Each of the ranks is the one, in
turn, since cores that other guests of a host use too differ in speed: the one's seconds are their mean. Efficiency is
that over P times the seconds of the slowest of P. By CPU time, which other work on the machine hardly disturbs, it is
the one's over the sum of the others', and says nothing of waiting. What the cores take from each other (memory, caches,
clock) shows when each rank attends a whole prompt of its own: `independent`, which is as uncertain as the others. How
quiet the host was is `pace` (benchmarks/turns.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.turns import rank_medians
from sp_backend.execute import Executor
from sp_backend.geometry import Geometry
from sp_backend.kernels import get_kernel
from sp_backend.kv_cache import KVCache, Rows
from sp_backend.layer import StepAttention
from sp_backend.local_batch import GroupRows, LocalBatch
from sp_backend.native import choose_kernel
from sp_backend.strategies import plan_for
from sp_backend.transport import Transport
from sp_backend.transport.gloo import GlooTransport
from sp_backend.transport.lockstep import LockstepNetwork
from sp_backend.transport.shared_memory import shared_memory

DTYPE = torch.bfloat16
PAGE_SIZE = 64


class Shape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_heads}:{self.num_kv_heads} D {self.head_dim}"

    def flops(self, tokens: int) -> float:
        """Of a causal prompt, work counted once."""
        return 2 * self.num_heads * self.head_dim * tokens * tokens

    def tensors(self, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        kv = torch.randn(keys, 2, self.num_kv_heads, self.head_dim).to(DTYPE)
        return torch.randn(queries, self.num_heads, self.head_dim).to(DTYPE), kv


@dataclass(frozen=True, slots=True)
class Job:
    num_ranks: int
    kernel: str
    strategies: tuple[str, ...]
    shapes: tuple[Shape, ...]
    lengths: tuple[int, ...]
    turns: int
    overlap: bool
    folder: str


@dataclass(frozen=True, slots=True)
class Result:
    """Medians over the turns, in seconds: of the slowest rank, and of CPU time summed over ranks.

    pace: the highest that counts, here or of the one.
    """

    strategy: str
    transport: str
    shape: Shape
    tokens: int
    one: float
    all: float
    one_cpu: float
    all_cpu: float
    efficiency: float
    efficiency_by_cpu_time: float
    independent: float
    pace: float


def measure(
    shapes: Sequence[Shape],
    lengths: Sequence[int],
    turns: int,
    *,
    num_ranks: int = 2,
    strategies: Sequence[str] = ("ring_pass_kv", "token_ring"),
    overlap: bool = True,
) -> list[Result]:
    """With the kernel that the server would choose here, over gloo and, if this host can, shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = choose_kernel()[0]
        job = Job(num_ranks, chosen, tuple(strategies), tuple(shapes), tuple(lengths), turns, overlap, folder)
        spawn(_rank, (job,), nprocs=num_ranks)
        found = json.loads((Path(folder) / "results").read_text())
        return [Result(**each | {"shape": Shape(*each["shape"])}) for each in found]


def layer_of(
    strategy: str,
    transport: Transport,
    kernel: str,
    shape: Shape,
    tokens: int,
    overlap: bool = True,
    tensors: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Callable[[], torch.Tensor]:
    """This rank's attention of one layer, on its rows of q and kv or on random ones. All ranks run it together."""
    plan = plan_for(
        strategy, num_ranks=transport.size, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, kind="zigzag"
    )
    layout, rank = plan.layout, transport.rank
    counts = layout.cut_pages(tokens, PAGE_SIZE, 0)
    own = layout.q_of(rank)
    rows = dict(zip(own, pairwise(accumulate((counts[c] for c in own), initial=0)), strict=True))
    slices = {c: slice(*each) for c, each in rows.items()}
    num_rows = sum(counts[c] for c in own)
    device = torch.device("cpu")
    group = GroupRows(
        plan="it",
        geometry=Geometry([[*counts, *[0] * (layout.num_chunks - len(counts))]]),
        q_rows=slices,
        kv_rows=slices,
        own_rows=slice(0, num_rows),
        own_slots=Rows(np.arange(num_rows), device),
        places={c: Rows(np.arange(*each), device) for c, each in rows.items()},
    )
    cache = KVCache(
        num_layers=1,
        num_pages=-(-num_rows // PAGE_SIZE),
        page_size=PAGE_SIZE,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=DTYPE,
        device=device,
    )
    executor = Executor(
        plan, rank, get_kernel(kernel), transport, head_dim=shape.head_dim, dtype=DTYPE, overlap=overlap
    )
    none = torch.empty(0, dtype=torch.int64)
    batch = LocalBatch(none, none, slice(0, num_rows), [group], last=None, samples=[], pooled=[], scored=[])
    attention = StepAttention(batch, cache, {"it": executor}, [None])
    q, kv = tensors or shape.tensors(num_rows, num_rows)
    return lambda: attention.attend(0, q, kv)


def _rank(rank: int, job: Job) -> None:
    torch.set_num_threads(1)
    wait = timedelta(minutes=10)
    dist.init_process_group("gloo", f"file://{job.folder}/store", wait, job.num_ranks, rank)
    gloo = GlooTransport.create(job.num_ranks, job.num_ranks, rank, wait.total_seconds())
    in_memory = shared_memory(gloo, wait.total_seconds())
    transports: list[Transport] = [gloo] if in_memory is None else [gloo, in_memory]
    alone = LockstepNetwork(1).rank(0)
    results: list[Result] = []
    for shape in job.shapes:
        for tokens in job.lengths:
            one_rank = layer_of(job.strategies[0], alone, job.kernel, shape, tokens)
            runs: dict[str, Callable[[], object]] = {"each": one_rank}
            for lone in range(job.num_ranks):
                runs[f"rank {lone}"] = one_rank if rank == lone else lambda: None
            shared = [(strategy, transport) for strategy in job.strategies for transport in transports]
            for strategy, transport in shared:
                layer = layer_of(strategy, transport, job.kernel, shape, tokens, job.overlap)
                runs[f"{strategy} over {transport.name}"] = layer
            times = rank_medians(runs, job.turns)
            ones = [times[f"rank {r}"] for r in range(job.num_ranks)]
            one, one_cpu = fmean(each.wall for each in ones), fmean(each.cpu for each in ones)
            independent = round(one / times["each"].wall, 4)
            for strategy, transport in shared:
                seconds, cpu, pace = times[f"{strategy} over {transport.name}"]
                by_time, by_cpu = round(one / job.num_ranks / seconds, 4), round(one_cpu / cpu, 4)
                pace = max(pace, *(each.pace for each in ones))
                taken = one, seconds, one_cpu, cpu, by_time, by_cpu, independent, pace
                results.append(Result(strategy, transport.name, shape, tokens, *taken))
    if rank == 0:
        (Path(job.folder) / "results").write_text(json.dumps([asdict(each) for each in results]))
