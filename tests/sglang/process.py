"""A server's process, which starts as `python -m sglang.launch_server`, or forks from one that has imported SGLang.

To import SGLang takes each process of a server 8 s of CPU time, and all else of a start 4 s. So where many servers are
started, one process imports it, and each server and each of its processes is a fork of that one.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = ["sglang.launch_server", "sglang.srt.entrypoints.http_server", "sglang.srt.models.registry"]


def start(arguments: Sequence[str], env: Mapping[str, str], log: Path, *, imported: bool) -> ForkServerProcess:
    """`sglang.launch_server` in a session of its own, which prints to the log.

    env: the whole environment; of PYTHONPATH and what SGLang reads while it is imported, the first call's is kept if
    `imported`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_become, args=(list(arguments), dict(env), log, imported))
    process.start()
    return process


def _become(arguments: list[str], env: dict[str, str], log: Path, imported: bool) -> None:
    from sglang.srt.utils import kill_itself_when_parent_died

    kill_itself_when_parent_died()  # as SGLang's ranks do: no server outlives the tests, whatever ends them
    os.close(multiprocessing.forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]  # or it stays
    os.setsid()
    for output in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), output)
    if not imported:
        os.execve(sys.executable, [sys.executable, "-m", "sglang.launch_server", *arguments], env)
    os.environ.clear()
    os.environ.update(env)
    contexts = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    contexts["spawn"] = contexts["fork"]  # SGLang asks for spawn
    sys.argv[1:] = arguments
    runpy.run_module("sglang.launch_server", run_name="__main__")
