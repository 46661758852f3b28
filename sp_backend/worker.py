"""A worker process: build the model and the plans once, then command -> result until told to stop.

Started by the controller as `python -m sp_backend.worker`, with a `WorkerStart` (msgpack) on standard input.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
import zmq

from sp_backend.answers import Answers
from sp_backend.batch import BatchBuilder
from sp_backend.buffers import BufferPool
from sp_backend.catalog import planner_for, plans_for
from sp_backend.commands import (
    LOCAL,
    Failure,
    Loading,
    Ready,
    Shutdown,
    Step,
    StepResult,
    WorkerStart,
    decode_command,
    decode_start,
    encode,
    fill_in,
)
from sp_backend.config import BackendConfig
from sp_backend.execute import Executor
from sp_backend.grammars import Grammars
from sp_backend.kernels import get_kernel
from sp_backend.kv_cache import KVCache
from sp_backend.layer import StepAttention
from sp_backend.local_batch import LocalBatch
from sp_backend.models.config import ModelConfig
from sp_backend.models.decoder import Decoder
from sp_backend.models.weights import Progress
from sp_backend.parallel import Shard
from sp_backend.plan import Plan
from sp_backend.topology import Machine
from sp_backend.transport.links import Links, connect
from sp_backend.trials import learn, machine_for

logger = logging.getLogger(__name__)


class Worker:
    """One rank: its part of the weights, its pages, its side of every plan."""

    def __init__(
        self,
        config: BackendConfig,
        rank: int,
        links: Links,
        progress: Progress | None = None,
        machine: Machine | None = None,
    ) -> None:
        self._config = config
        self._rank = rank
        self._machine = machine
        device, dtype = torch.device(config.device), getattr(torch, config.dtype)
        model = ModelConfig.load(config.model_path)
        shard = Shard.of_rank(rank, config.tp_size, config.sp_size, config.layout)
        self._shard = shard
        self._links, self._model = links, model
        self.decoder = Decoder(model, shard, dtype, device, links.collectives)
        if config.load_format == "dummy":
            self.decoder.fill_dummy(config.seed)
        else:
            self.decoder.load(config.model_path, progress)
        self._num_pages = self._page_budget(model, dtype)
        self._cache = KVCache(
            num_layers=model.num_layers,
            num_pages=self._num_pages,
            page_size=config.page_size,
            num_kv_heads=self.decoder.num_kv_heads,
            head_dim=model.head_dim,
            dtype=dtype,
            device=device,
        )
        grammars = Grammars(config.tokenizer_path or config.model_path, model.vocab_size, model.eos_ids)
        self._answers = Answers(self.decoder, grammars)
        self._use(plans_for(config, model, planner_for(config, model, machine)))

    def _use(self, plans: dict[str, Plan]) -> None:
        """Steps run under these plans from now on; there are no requests yet."""
        config, device = self._config, torch.device(self._config.device)
        self._plans = plans
        self._builder = BatchBuilder(
            layouts={name: plan.layout for name, plan in plans.items()},
            sp_rank=self._shard.sp_rank,
            page_size=config.page_size,
            windowed=any(self._model.windows),
            device=device,
        )
        pool = BufferPool(device)
        self._executors = {
            name: Executor(
                plan,
                self._shard.sp_rank,
                get_kernel(config.kernel),
                self._links.transport,
                head_dim=self._model.head_dim,
                dtype=getattr(torch, config.dtype),
                device=device,
                pool=pool,
                overlap=config.overlap,
            )
            for name, plan in plans.items()
        }

    def learn(self, path: Path) -> None:
        """Correct the machine by trial steps, and use the plans that then win. All ranks of the world call it."""
        config = self._config
        planner = planner_for(config, self._model, self._machine)
        assert planner is not None, "there is something to choose from"
        self._machine = learn(
            planner,
            self.step,
            {name: plan.layout for name, plan in self._plans.items()},
            self._shard.sp_rank,
            config.page_size,
            min(config.context_length, self._num_pages * config.page_size),
            path,
            self._model.has_head,
        )
        self._use(plans_for(config, self._model, planner.on(self._machine)))

    def ready(self) -> Ready:
        return Ready(
            rank=self._rank,
            num_pages=self._num_pages,
            page_size=self._config.page_size,
            plan_digests={name: plan.digest for name, plan in self._plans.items()},
            weight_bytes=self.decoder.weight_bytes,
            machine=self._machine,
        )

    def step(self, step: Step) -> StepResult:
        began = time.monotonic()
        batch, hidden = self.forward(step)
        return self.finish(step.step_id, batch, hidden, began)

    @torch.inference_mode()
    def forward(self, step: Step) -> tuple[LocalBatch, torch.Tensor]:
        """Lay the step out and run the model: this rank's rows and their hidden states [n, hidden]."""
        self._answers.forget(step.release)
        drawn = self._answers.drawn
        batch = self._builder.build(fill_in(step, {**drawn, **_moved(step.moved, drawn)}))
        if not len(batch.tokens) and all(group.plan == LOCAL for group in step.groups):  # nobody waits for this rank
            return batch, torch.empty(0, self.decoder.config.hidden_size, device=batch.tokens.device)
        attention = StepAttention(batch, self._cache, self._executors, self.decoder.config.windows)
        return batch, self.decoder.forward(batch.tokens, batch.positions, attention)

    @torch.inference_mode()
    def finish(self, step_id: int, batch: LocalBatch, hidden: torch.Tensor, began: float) -> StepResult:
        """Draw the tokens that the batch asks for, and report."""
        tokens = self._answers.tokens(batch, hidden)
        counters = [executor.counters for executor in self._executors.values()]
        return StepResult(
            step_id=step_id,
            rank=self._rank,
            tokens=tokens,
            seconds=time.monotonic() - began,
            query_key_pairs=round(sum(c.query_key_pairs for c in counters) / self.decoder.config.num_layers),
            bytes_sent=sum(c.bytes_sent for c in counters),
            wait_seconds=sum(c.wait_seconds for c in counters),
            pooled=self._answers.pooled(batch, hidden),
            scores=self._answers.scores(batch, hidden),
        )

    def _page_budget(self, model: ModelConfig, dtype: torch.dtype) -> int:
        if self._config.num_pages is not None:
            return self._config.num_pages
        assert self._config.kv_memory_bytes is not None, "one of num_pages and kv_memory_bytes is set"
        per_page = KVCache.bytes_per_page(
            num_layers=model.num_layers,
            page_size=self._config.page_size,
            num_kv_heads=self.decoder.num_kv_heads,
            head_dim=model.head_dim,
            itemsize=dtype.itemsize,
        )
        num_pages = self._config.kv_memory_bytes // per_page
        if num_pages < 1:
            raise ValueError(f"no room for a single KV page of {per_page} bytes: raise --mem-fraction-static")
        return num_pages


def _moved(requests: list[int], drawn: Mapping[int, int]) -> dict[int, int]:
    """Tokens drawn in the previous step on one rank and needed on another. All ranks of the world call it."""
    if not requests:
        return {}
    tokens = torch.tensor([drawn.get(request, -1) for request in requests])
    dist.all_reduce(tokens, op=dist.ReduceOp.MAX)
    return dict(zip(requests, tokens.tolist(), strict=True))


def serve(worker: Worker, socket: zmq.Socket[bytes]) -> None:
    """Answer commands until Shutdown."""
    gc.collect()
    gc.freeze()  # a full collection over torch's own objects would stop a step for 100 ms
    socket.send(encode(worker.ready()))
    while True:
        answered = time.monotonic()
        command = decode_command(socket.recv())
        idle = time.monotonic() - answered
        if isinstance(command, Shutdown):
            return
        socket.send(encode(msgspec.structs.replace(worker.step(command), idle_seconds=idle)))


def main() -> int:
    start: WorkerStart = decode_start(sys.stdin.buffer.read())
    _die_with(start.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controller decides when to end
    torch.set_num_threads(start.config.num_threads)
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, str(start.rank).encode())
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(start.address)
    try:
        worker = _build(start, socket)
    except ValueError as error:  # the user's to mend: a message, no traceback
        socket.send(encode(Failure(start.rank, str(error))))
        return 1
    try:
        serve(worker, socket)
    except Exception as error:
        logger.exception("rank %d failed", start.rank)
        socket.send(encode(Failure(start.rank, f"{type(error).__name__}: {error}")))
        return 1
    finally:
        context.destroy(linger=2000)
    return 0


def _build(start: WorkerStart, socket: zmq.Socket[bytes]) -> Worker:
    config = start.config
    dist.init_process_group(
        "gloo",
        init_method=f"file://{start.rendezvous}",
        rank=start.rank,
        world_size=config.world_size,
        timeout=timedelta(seconds=config.dist_timeout),
    )
    links = connect(config, start.rank)
    machine, trials_at = machine_for(config, links.transport)
    progress: Progress = lambda done, total: socket.send(encode(Loading(start.rank, done, total)))  # noqa: E731
    worker = Worker(config, start.rank, links, progress, machine)
    if trials_at is not None:
        worker.learn(trials_at)
    return worker


def _die_with(parent: int) -> None:
    """Linux: be killed if the controller, process `parent`, dies without a word."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died while this process was importing
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
