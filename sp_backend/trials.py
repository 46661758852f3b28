"""Trial steps at start: what the planner should know of this machine, by a few prefills on the very workers.

Every rank of the world runs them together, with its weights, pages and executors. Rank 0 chooses the steps, fits the
corrections (calibrate.py) and tells the others; what it found is kept in a file, so that only the first start of a
model on a machine runs any.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from sp_backend.calibrate import REPEATS, Trial, choose_trials, correct
from sp_backend.catalog import shape_of
from sp_backend.commands import Group, Sampling, SequenceStep, Step, StepResult
from sp_backend.config import AUTO, BackendConfig
from sp_backend.kept import file_of, read_machine, write_machine
from sp_backend.layout import Layout
from sp_backend.measure import machine_of
from sp_backend.models.config import ModelConfig
from sp_backend.planner import OFF, Planner
from sp_backend.presets import load_machine
from sp_backend.shape import ModelShape
from sp_backend.topology import Machine
from sp_backend.transport import Transport

logger = logging.getLogger(__name__)

TRUSTED = 0.1  # how far off corrected predictions may still be (median) for the corrections to be believed
REQUEST = 0  # the id of every trial's prompt


def machine_for(config: BackendConfig, transport: Transport) -> tuple[Machine | None, Path | None]:
    """What times are predicted for, equal on all ranks of the world; None where nothing is spread. And the file that
    trial steps are to be kept in; None where they are not needed.
    """
    if config.sp_size == 1:
        return None, None
    if config.topology is not None:
        return load_machine(config.topology, config.sp_size), None
    shape, dtype = shape_of(config, ModelConfig.load(config.model_path)), getattr(torch, config.dtype)
    found = [machine_of(transport, config.kernel, shape, dtype)]
    dist.broadcast_object_list(found, src=0)  # every SP group has measured its own
    if not has_trials(config):
        return found[0], None
    path = path_of(config, found[0], shape)
    known = recall(path, config.sp_size)
    return (found[0], path) if known is None else (known, None)


def has_trials(config: BackendConfig) -> bool:
    """Whether there is something to learn: a choice, on a machine that nobody described."""
    return config.sp_size > 1 and config.strategy == AUTO and config.layout == "tokens" and config.topology is None


def path_of(config: BackendConfig, machine: Machine, shape: ModelShape) -> Path:
    """Of the file for a machine as measured, a model's sizes, and this version of what predicts and runs steps."""
    sizes = msgspec.to_builtins(shape), config.tp_size, config.page_size, config.causal, config.num_threads
    return file_of("corrected", [machine.to_json(), sizes])


def recall(path: Path, num_ranks: int) -> Machine | None:
    """What an earlier start learned; equal on all ranks of the world, all of which call it."""
    found = [read_machine(path, num_ranks) if dist.get_rank() == 0 else None]
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
            write_machine(path, found[0])
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
