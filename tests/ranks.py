"""Runs a function on N gloo ranks: processes that stay, one pool per world size, every wait with a time limit."""

from __future__ import annotations

import atexit
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

_pools: dict[int, RankPool] = {}


def run_on_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """[function(rank, size, *args) for each rank], all at once. `function` must be importable by name."""
    if size not in _pools or not _pools[size].alive:
        _pools[size] = RankPool(size)
    return _pools[size].run(function, args, timeout)


class RankPool:
    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")  # which imports torch once for all ranks
        context.set_forkserver_preload([__name__])
        self._store = tempfile.TemporaryDirectory()
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            args = (rank, size, str(Path(self._store.name) / "store"), theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)
        self.alive = True
        atexit.register(self.close)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for end in self._ends:
            end.send((function, args))
        results: dict[int, Any] = {}
        deadline = monotonic() + timeout
        while len(results) < len(self._ends):
            waiting = [end for r, end in enumerate(self._ends) if r not in results]
            ready = wait(waiting, max(0.0, deadline - monotonic()))
            if not ready:
                self._fail(f"ranks without an answer after {timeout:g} s: {self._missing(results)}")
            for end in ready:
                rank = self._ends.index(end)  # type: ignore[arg-type]
                try:
                    ok, value = pickle.loads(self._ends[rank].recv_bytes())
                except EOFError:
                    self._fail(f"rank {rank} died")
                if not ok:
                    self._fail(f"rank {rank} failed:\n{value}")
                results[rank] = value
        return [results[r] for r in range(len(self._ends))]

    def close(self) -> None:
        self.alive = False
        for process in self._processes:
            process.kill()
            process.join()
        self._store.cleanup()

    def _missing(self, results: dict[int, Any]) -> list[int]:
        return [r for r in range(len(self._ends)) if r not in results]

    def _fail(self, message: str) -> None:
        self.close()
        raise RuntimeError(message)


def _serve(rank: int, size: int, store: str, end: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            function, args = end.recv()
        except EOFError:
            return
        try:
            answer = (True, function(rank, size, *args))
        except Exception:
            answer = (False, traceback.format_exc())
        end.send_bytes(pickle.dumps(answer))
