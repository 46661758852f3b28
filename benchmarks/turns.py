"""Times of the ranks of one host, taken in turns and beside a measure of how fast its cores are just then.

A shared host's cores change their speed by a tenth, each for itself, for milliseconds to minutes; for seconds both may
get the time of one. So before and after a run all ranks compute the same products at the same time; what the slowest of
those which the run keeps busy takes for them, over the least that was ever seen, is the run's pace. Every run is
repeated until enough of its repeats have a pace of at most QUIET, but not more than MOST times as often; those of the
lowest pace count. What takes longer than LONG_SECONDS outlasts what the products tell, and is not repeated for them.

Ranks start at one moment, awake: woken out of a barrier, two of them may share a core for milliseconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

AWAKE_SECONDS = 0.02  # before a run
QUIET = 1.05
MOST = 3
LONG_SECONDS = 10
MOST_TURNS = 15
PRODUCTS, SIDE = 8, 512  # 10 ms


class Run(NamedTuple):
    wall: float  # seconds of the slowest rank
    cpu: float  # of all
    pace: float  # seconds of the products before or after it, on the slowest of the ranks that it kept busy


class Medians(NamedTuple):
    """Over the quietest runs; pace: the highest among them."""

    wall: float
    cpu: float
    pace: float


def rank_medians(runs: Mapping[str, Callable[[], object]], turns: int, seconds: float = 0.0) -> dict[str, Medians]:
    """Of `turns` repeats of each run; if those take less than `seconds`, of more, up to MOST_TURNS. All ranks call it
    together. The first turn does not count.
    """
    taken: dict[str, list[Run]] = {name: [] for name in runs}
    before, fastest = _products(), math.inf
    turn, lasted = 0, 0.0
    while turn <= MOST * turns:
        for name in [name for name, of in taken.items() if sum(_counts(run, fastest) for run in of) < turns]:
            _wait_together()
            began, began_cpu = time.perf_counter(), time.process_time()
            runs[name]()
            wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
            after = _products()
            walls, cpus, paces = _of_all_ranks(wall, cpu, max(before, after))
            busy = [pace for pace, used in zip(paces, cpus, strict=True) if used > max(walls) / 2]
            before, fastest = after, min(fastest, *paces)
            lasted += max(walls)
            if turn:
                taken[name].append(Run(max(walls), sum(cpus), max(busy, default=max(paces))))
        if turn == 0:
            turns = max(turns, min(MOST_TURNS, round(seconds / lasted)))
        turn += 1
    return {name: medians(of, turns, fastest) for name, of in taken.items()}


def _counts(run: Run, fastest: float) -> bool:
    return run.pace <= QUIET * fastest or run.wall > LONG_SECONDS


def medians(taken: Sequence[Run], turns: int, fastest: float) -> Medians:
    counted = sorted(taken, key=lambda run: run.pace)[:turns]
    wall, cpu = median(run.wall for run in counted), median(run.cpu for run in counted)
    return Medians(wall, cpu, round(counted[-1].pace / fastest, 3))


def _products() -> float:
    """Seconds on this rank, while all others compute them too."""
    left, right = (torch.randn(SIDE, SIDE).bfloat16() for _ in range(2))
    _wait_together()
    began = time.perf_counter()
    for _ in range(PRODUCTS):
        left @ right
    return time.perf_counter() - began


def _of_all_ranks(*numbers: float) -> list[list[float]]:
    """number -> of each rank"""
    mine = torch.tensor(numbers, dtype=torch.float64)
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(each, mine)
    return torch.stack(each, dim=1).tolist()


def _wait_together() -> None:
    """Until a moment after all ranks have come here, which rank 0 names; without sleeping."""
    dist.barrier()
    moment = torch.tensor([time.monotonic() + AWAKE_SECONDS], dtype=torch.float64)
    dist.broadcast(moment, 0)
    while time.monotonic() < float(moment[0]):
        pass
