"""The ranks behind `python -m benchmarks.planner --measured`: every candidate of every batch, in turn, on ranks of this
host that are connected as a server's are, with the kernel that it would choose.

A layer is what a server's step has in one: the dense products of a rank's own new tokens, then attention under the
plan; a step is as many as the model has.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from benchmarks.regret import Result, result
from benchmarks.turns import rank_medians
from sp_backend.calibrate import REPEATS, Correction, choose_trials, correct
from sp_backend.execute import Executor
from sp_backend.geometry import Geometry
from sp_backend.kernels import Kernel, get_kernel
from sp_backend.measure import measure
from sp_backend.native import choose_kernel
from sp_backend.placement import Batch
from sp_backend.plan import Plan
from sp_backend.planner import Planner
from sp_backend.shape import ModelShape
from sp_backend.transport import Transport
from sp_backend.transport.gloo import GlooTransport
from sp_backend.transport.shared_memory import shared_memory

DTYPE = torch.bfloat16
HIDDEN = 256  # of the dense products: their sizes, not their number, are those of a small model
LONGEST_TRIAL = 32768  # tokens


@dataclass(frozen=True, slots=True)
class Job:
    num_ranks: int
    batches: list[list[tuple[int, int]]]
    shape: ModelShape
    repeats: int
    seconds: float  # quick candidates take more turns, until these have passed
    page_size: int
    limit: float  # seconds after which no other batch is begun
    folder: str


def measure_all(
    num_ranks: int,
    batches: Sequence[Batch],
    shape: ModelShape,
    repeats: int,
    seconds: float,
    page_size: int,
    limit: float,
) -> tuple[list[Result], list[Result], dict[str, Any]]:
    """Results by what the planner measured at start, by what trial steps made of that, and the machine. Those so far,
    if interrupted.
    """
    with tempfile.TemporaryDirectory() as folder:
        shape = replace(shape, itemsize=DTYPE.itemsize)
        job = Job(num_ranks, [list(batch) for batch in batches], shape, repeats, seconds, page_size, limit, folder)
        with suppress(KeyboardInterrupt):
            spawn(_rank, (job,), nprocs=num_ranks)
        found = (Path(folder) / "results").read_bytes()
        return msgspec.json.decode(found, type=tuple[list[Result], list[Result], dict[str, Any]])


def _rank(rank: int, job: Job) -> None:
    torch.set_num_threads(1)
    wait = timedelta(minutes=10)
    dist.init_process_group("gloo", f"file://{job.folder}/store", wait, job.num_ranks, rank)
    gloo = GlooTransport.create(job.num_ranks, job.num_ranks, rank, wait.total_seconds())
    transport: Transport = shared_memory(gloo, wait.total_seconds()) or gloo
    kernel = get_kernel(choose_kernel()[0])
    machine = measure(transport, kernel, job.shape, DTYPE)
    told = Planner(machine, job.shape, job.num_ranks, page_size=job.page_size)
    correction = _corrected(told, kernel, transport)
    corrected = told.on(correction.machine)
    about: dict[str, Any] = {"machine": msgspec.to_builtins(machine), "correction": str(correction)}
    about |= {"torch": str(torch.__version__), "highest_pace": 1.0}
    results: tuple[list[Result], list[Result]] = ([], [])
    since = time.perf_counter()
    for batch in tqdm(job.batches, desc="Batches", unit="batch", disable=rank > 0):
        runs = {
            str(c.variant): _layer(c.plan, c.geometry, job.shape, kernel, transport)
            for c in told.rank_candidates(batch)
        }
        layer = rank_medians(runs, job.repeats, job.seconds)
        seconds = {name: job.shape.num_layers * each.wall for name, each in layer.items()}
        about["highest_pace"] = max(about["highest_pace"], *(each.pace for each in layer.values()))
        for planner, found in zip((told, corrected), results, strict=True):
            choice = planner.choose(batch)
            named = f"{job.num_ranks} ranks, {transport.name}", "bfloat16", batch, str(choice.variant), choice.seconds
            found.append(result(*named, seconds))
        if rank == 0:
            (Path(job.folder) / "results").write_bytes(msgspec.json.encode((*results, about)))
        if _slowest(time.perf_counter() - since) > job.limit:
            break
    dist.destroy_process_group()


def _corrected(planner: Planner, kernel: Kernel, transport: Transport) -> Correction:
    """By trial steps, as a server's start runs them."""
    shape, trials = planner.shape, choose_trials(planner, LONGEST_TRIAL)
    runs = []
    for trial in trials:
        plan, geometry = planner.plan(trial.variant), planner.lay_out(trial.variant, trial.batch)
        runs.append(_layer(plan, geometry, shape, kernel, transport))
    layers = [[_timed(run) for run in runs] for _ in range(1 + REPEATS)][1:]
    fixed = planner.machine.rates.step_seconds
    return correct(
        planner, trials, [fixed + shape.num_layers * statistics.median(each) for each in zip(*layers, strict=True)]
    )


def _timed(run: Callable[[], object]) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    since = time.perf_counter()
    run()
    return _slowest(time.perf_counter() - since)


def _slowest(seconds: float) -> float:
    found = torch.tensor([seconds])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _layer(
    plan: Plan, geometry: Geometry, shape: ModelShape, kernel: Kernel, transport: Transport
) -> Callable[[], object]:
    """One layer of this rank under a plan, on random tensors."""
    rank, layout, heads = transport.rank, plan.layout, shape.num_kv_heads
    executor = Executor(plan, rank, kernel, transport, head_dim=shape.head_dim, dtype=DTYPE)
    schedule = executor.schedule(geometry)
    rows = [sum(row[c] for row in geometry.rows) for c in range(layout.num_chunks)]
    q = {c: torch.randn(rows[c], shape.num_heads, shape.head_dim).to(DTYPE) for c in layout.q_of(rank)}
    kv = {c: torch.randn(rows[c], 2, heads, shape.head_dim).to(DTYPE) for c in layout.kv_of(rank)}
    hidden = torch.randn(sum(rows[c] for c in layout.q_of(rank)), HIDDEN).to(DTYPE)
    weight = torch.randn(HIDDEN, round(shape.dense_flops / shape.num_layers / 2 / HIDDEN)).to(DTYPE)

    def run() -> None:
        hidden @ weight
        executor.run(schedule, q, kv)

    return run
