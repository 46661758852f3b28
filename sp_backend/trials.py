"""Trial steps at start: what the planner should know of this machine, by a few prefills on the very workers.

Every rank of the world runs them together, with its weights, pages and executors. Rank 0 chooses the steps, fits the
corrections (calibrate.py) and tells the others; what it found is kept in a file, so that only the first start of a
model on a machine runs any.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
import torch.distributed as dist

from sp_backend.calibrate import REPEATS, Trial, choose_trials, correct
from sp_backend.commands import Group, Sampling, SequenceStep, Step, StepResult
from sp_backend.config import AUTO, BackendConfig, cache_folder
from sp_backend.layout import Layout
from sp_backend.measure import keep
from sp_backend.planner import OFF, Planner
from sp_backend.shape import ModelShape
from sp_backend.topology import Machine

logger = logging.getLogger(__name__)

TRUSTED = 0.1  # how far off corrected predictions may still be (median) for the corrections to be believed
REQUEST = 0  # the id of every trial's prompt


def has_trials(config: BackendConfig) -> bool:
    """Whether there is something to learn: a choice, on a machine that nobody described."""
    return config.sp_size > 1 and config.strategy == AUTO and config.layout == "tokens" and config.topology is None


def path_of(config: BackendConfig, machine: Machine, shape: ModelShape) -> Path:
    """Of the file for a machine as measured, a model's sizes, and this version of what predicts and runs steps."""
    sizes = msgspec.to_builtins(shape), config.tp_size, config.page_size, config.causal, config.num_threads
    about = json.dumps([machine.to_json(), sizes, _sources()])
    return cache_folder() / f"corrected-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


@lru_cache(maxsize=1)
def _sources() -> str:
    files = sorted(f for f in Path(__file__).parent.rglob("*") if f.suffix in (".py", ".cpp", ".h"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def recall(path: Path, num_ranks: int) -> Machine | None:
    """What an earlier start learned; equal on all ranks of the world, all of which call it."""
    found: list[Machine | None] = [None]
    if dist.get_rank() == 0:
        try:
            found = [Machine.from_json(path.read_bytes(), str(path)).first(num_ranks)]
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            logger.warning("trial steps are run again: %s", error)
    dist.broadcast_object_list(found, src=0)
    return found[0]


def learn(
    planner: Planner,
    run: Callable[[Step], StepResult],
    layouts: dict[str, Layout],
    sp_rank: int,
    page_size: int,
    longest: int,
    path: Path,
    draws: bool,
) -> Machine:
    """The planner's machine, corrected by steps of at most `longest` tokens; equal on all ranks of the world, all of
    which call it. layouts: of the planner's winners, by name. path: where to keep it. draws: whether the model has a
    head to draw tokens with.
    """
    since = time.perf_counter()
    chosen: list[list[Trial]] = [choose_trials(planner, longest) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(chosen, src=0)
    steps = [trial_step(trial, layouts[str(trial.variant)], sp_rank, page_size, draws) for trial in chosen[0]]
    mine = [_timed(run, steps) for _ in range(1 + REPEATS)][1:]  # first runs open connections and touch pages
    everyone: list[list[list[float]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    found = [planner.machine]
    if dist.get_rank() == 0 and steps:
        # Of the repeats the median: ranks that wait for each other are held up more often than one alone, which the
        # fastest does not show
        typical = np.median(np.max(everyone, 0), 0)  # of [repeats, trials], each as long as its slowest rank
        correction = correct(planner, chosen[0], typical.tolist())
        if correction.after <= TRUSTED:
            found = [replace(correction.machine, name=f"{planner.machine.name}, {correction}")]
            keep(path, found[0])
        else:
            logger.warning(
                "trial steps varied too much to learn from (a busy machine?); the next start tries again: %s",
                correction,
            )
        logger.info("trial steps took %.2f s", time.perf_counter() - since)
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _timed(run: Callable[[Step], StepResult], steps: list[Step]) -> list[float]:
    seconds = []
    for step in steps:
        dist.barrier()
        seconds.append(run(step).seconds)
    return seconds


def trial_step(trial: Trial, layout: Layout, sp_rank: int, page_size: int, draws: bool = True) -> Step:
    """One rank's command, as the scheduler would send it: a prompt that begins on rank 0, and its next token drawn."""
    start, new = trial.cached // page_size * page_size, trial.new
    if trial.variant == OFF:
        degree, owners = 1, [0] * -(-(start + new) // page_size)
        num_tokens = new if sp_rank == 0 else 0
    else:
        degree, num_pages = layout.group_size, start // page_size
        owners = [page * degree // num_pages for page in range(num_pages)] + [*layout.page_ranks(new, page_size)]
        rows = layout.cut_pages(new, page_size)
        num_tokens = sum(rows[chunk] for chunk in layout.q_of(sp_rank))
    sequence = SequenceStep(
        request_id=REQUEST,
        start=start,
        num_new=new,
        home=0,
        degree=degree,
        page_owners=bytes(owners),
        pages=np.arange(owners.count(sp_rank), dtype="<i4").tobytes(),
        tokens=bytes(4 * num_tokens),
        sampling=Sampling(temperature=0.0) if draws and owners[-1] == sp_rank else None,
    )
    return Step(-1, [Group(str(trial.variant), [sequence])], release=[REQUEST])
