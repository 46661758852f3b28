"""The real worker on the shared pool of gloo ranks, driven by the real controller: no server, no new processes."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.plans import StepPlanner
from scheduler.request import GeneratedToken, GenerateRequest, Output
from sp_backend.commands import Pooling, Sampling, Step, StepResult
from sp_backend.config import BackendConfig
from sp_backend.kernels import Attention, get_kernel
from sp_backend.state import AttentionState
from sp_backend.topology import Machine
from sp_backend.transport.links import Links, connect
from sp_backend.worker import Worker
from tests.ranks import run_on_ranks

GREEDY = Sampling(temperature=0.0)
_worker: dict[str, Worker] = {}  # in each rank's process: the one built last

Logits = dict[int, np.ndarray[Any, Any]]  # position -> [vocab]


@cache
def _connect(tp_size: int, sp_size: int, layout: str, rank: int) -> Links:
    """Once for all workers of a mesh: idle process groups cost processor time."""
    config = BackendConfig(
        model_path="", dtype="float32", context_length=1, tp_size=tp_size, sp_size=sp_size, layout=layout
    )
    return connect(config, rank)


def build(rank: int, size: int, config: BackendConfig, machine: Machine | None = None) -> dict[str, str]:
    links = _connect(config.tp_size, config.sp_size, config.layout, rank)
    _worker["it"] = Worker(config, rank, links, machine=machine)
    return _worker["it"].ready().plan_digests


def step(rank: int, size: int, steps: list[Step | None], with_logits: bool) -> tuple[StepResult | None, Logits]:
    """A step on one rank, and the logits of every row of the last layer; None: it has no part in the step."""
    worker = _worker["it"]
    mine = steps[rank % len(steps)]
    if mine is None:
        return None, {}
    with mock.patch("sp_backend.last_layer.FEW", 1):  # short prompts show what long ones do
        batch, hidden = worker.forward(mine)
    logits: Logits = {}
    if with_logits and len(hidden):
        positions = batch.positions if batch.last is None else batch.positions[batch.last.rows]
        logits = dict(zip(positions.tolist(), worker.decoder.logits(hidden).numpy(), strict=True))
    return worker.finish(mine.step_id, batch, hidden, time.monotonic()), logits


class RankWorkers:
    """A `Workers` over the pool. While `logits` is set, every position's are added to it."""

    def __init__(self, config: BackendConfig, machine: Machine | None = None) -> None:
        self._config = config
        self._results: deque[list[StepResult]] = deque()
        self.logits: Logits | None = None
        digests = run_on_ranks(config.world_size, build, config, machine)
        assert all(digest == digests[0] for digest in digests)

    def submit(self, steps: list[Step | None]) -> None:
        answers = run_on_ranks(self._config.world_size, step, steps, self.logits is not None)
        self._results.append([result for result, _ in answers if result is not None])
        for _, logits in answers:
            if self.logits is not None:
                self.logits |= logits

    def poll(self, timeout: float) -> list[StepResult] | None:
        return self._results.popleft() if self._results else None


class Engine:
    """Controller and workers; `complete` runs requests together to their end."""

    def __init__(
        self,
        config: BackendConfig,
        scheduler: SchedulerConfig,
        machine: Machine | None = None,
        planner: StepPlanner | None = None,
    ) -> None:
        """machine: whose planner says which plans the workers build. planner: who chooses among them."""
        self.backend = config
        self.workers = RankWorkers(config, machine)
        self._outputs: dict[str, list[Output]] = defaultdict(list)
        assert config.num_pages is not None
        self.controller = Controller(scheduler, config, self.workers, config.num_pages, self._collect, planner=planner)
        self._num_requests = 0

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        answers = self._run(prompts, max_tokens, sampling=GREEDY)
        return [[t.token for output in outputs for t in output.tokens] for outputs in answers]

    def score(self, prompts: list[list[int]], num_top: int) -> list[list[GeneratedToken]]:
        """Every prompt token but the first."""
        answers = self._run(prompts, 3, sampling=GREEDY, prompt_logprobs=num_top)
        return [[token for output in outputs for token in output.prompt] for outputs in answers]

    def embed(self, prompts: list[list[int]], pooling: Pooling) -> list[Output]:
        """The last output of each."""
        return [outputs[-1] for outputs in self._run(prompts, 0, pooling=pooling)]

    def _run(self, prompts: list[list[int]], max_tokens: int, **fields: Any) -> list[list[Output]]:
        names = [f"request-{self._num_requests + i}" for i in range(len(prompts))]
        self._num_requests += len(prompts)
        for name, prompt in zip(names, prompts, strict=True):
            self.controller.submit(GenerateRequest(name, prompt, max_tokens, **fields))
        while self.controller.step():
            pass
        assert self.controller.healthy() is None, self.controller.healthy()
        return [self._outputs[name] for name in names]

    def cached_tokens(self, number: int) -> int:
        return self._outputs[f"request-{number}"][-1].cached_tokens

    def _collect(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._outputs[output.request_id].append(output)


def sabotage(rank: int, size: int, config: BackendConfig, how: str) -> None:
    """Builds a worker that is wrong in one way, to show that the comparison notices."""
    if how == "base-2 LSE":
        kernel = get_kernel(config.kernel)
        with mock.patch("sp_backend.worker.get_kernel", return_value=lambda work: _in_base_2(kernel(work))):
            build(rank, size, config)
        return
    build(rank, size, config)
    worker = _worker["it"]
    if how == "wrong RoPE factor":
        worker.decoder._inv_freq *= 0.98
    elif how == "dropped KV block":
        pages = worker._cache.pages
        worker._cache.pages = lambda layer: pages(layer) * (rank != 0)  # type: ignore[method-assign]
    else:
        raise ValueError(how)


def _in_base_2(attention: Attention) -> Attention:
    def attend(
        q: torch.Tensor, kv: torch.Tensor, into: AttentionState | None = None, merge: bool = True
    ) -> AttentionState:
        state = attention(q, kv)
        wrong = AttentionState(state.out, state.lse / math.log(2))
        if into is None:
            return wrong
        return into.merge_(wrong) if merge else into.copy_(wrong)

    return attend
