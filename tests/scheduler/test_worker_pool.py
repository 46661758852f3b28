"""The pool against stub processes: start, work, every way to fail, and nothing left behind."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from scheduler.worker_pool import WorkerFailed, WorkerPool
from sp_backend.commands import Step
from tests.scheduler.fake_workers import backend_config

STUB = str(Path(__file__).with_name("stub_worker.py"))


@contextmanager
def make_pool(mode: str = "well:0", **backend: object) -> Iterator[WorkerPool]:
    """A pool of stubs that must leave no process of this test behind."""
    pool = WorkerPool(backend_config(sp_size=2, **backend), command=(sys.executable, STUB, mode))
    before = set(psutil.Process().children(recursive=True))
    try:
        yield pool
    finally:
        pool.stop(grace=1.0)
        left = set(psutil.Process().children(recursive=True)) - before
        assert not left


def test_steps_reach_every_rank_and_results_come_back_by_rank() -> None:
    with make_pool(tp_size=2) as pool:
        seen: list[tuple[int, int]] = []
        pool.start(timeout=20, progress=lambda *counts: seen.append(counts))
        assert seen == [(1, 2), (2, 2)], "rank 0's"
        assert pool.num_pages == 97, "the smallest rank's"
        assert pool.poll(0.0) is None
        for step_id in (1, 2):
            pool.submit([Step(step_id, []), Step(step_id, [])])
            results = pool.poll(5.0)
            assert results is not None and [r.rank for r in results] == [0, 1, 2, 3]
            assert all(r.step_id == step_id for r in results)
        pool.submit([None, Step(3, [])])
        pool.submit([Step(4, []), None])
        assert sorted([(r.step_id, r.rank) for r in pool.poll(5.0) or ()] for _ in range(2)) == [
            [(3, 1), (3, 3)],
            [(4, 0), (4, 2)],
        ]


def test_steps_of_a_rank_end_in_order_and_those_of_others_do_not_wait() -> None:
    with make_pool("slow:1") as pool:
        pool.start(timeout=20)
        pool.submit([None, Step(1, [])])
        pool.submit([Step(2, []), None])
        pool.submit([Step(3, []), Step(3, [])])
        pool.submit([Step(4, []), None])
        assert [results[0].step_id for _ in range(4) if (results := pool.poll(5.0))] == [2, 1, 3, 4]


@pytest.mark.parametrize(
    "mode,message",
    [
        ("exits-early:1", "worker 1 exited with code 3, after saying:\nno such model"),
        ("fails:1", "worker 1 failed: weights do not fit"),
        ("other-plan:1", "workers 0 and 1 would run different plans"),
    ],
)
def test_a_failed_start_says_why_and_leaves_nothing(mode: str, message: str) -> None:
    with make_pool(mode) as pool:
        with pytest.raises(WorkerFailed, match=message):
            pool.start(timeout=20)
        assert not pool._processes and pool._directory is None


def test_a_start_that_takes_too_long_fails() -> None:
    with make_pool("sleeps:0") as pool, pytest.raises(WorkerFailed, match=r"workers \[0.* were not ready in time"):
        pool.start(timeout=1.0)


def test_a_worker_that_dies_in_a_step_is_noticed_within_a_second() -> None:
    with make_pool("dies:1") as pool:
        pool.start(timeout=20)
        pool.submit([Step(1, []), Step(1, [])])
        began = time.monotonic()
        with pytest.raises(WorkerFailed, match="worker 1 was killed by signal 9"):
            pool.poll(10.0)
        assert time.monotonic() - began < 1.0


def test_a_worker_that_dies_between_steps_is_noticed() -> None:
    with make_pool() as pool:
        pool.start(timeout=20)
        os.kill(pool._processes[0]._popen.pid, 9)
        time.sleep(0.3)
        with pytest.raises(WorkerFailed, match="worker 0 was killed by signal 9"):
            pool.poll(0.0)


def test_a_late_step_is_no_failure_but_no_result_either() -> None:
    with make_pool("hangs:1") as pool:
        pool.start(timeout=20)
        pool.submit([Step(1, []), Step(1, [])])
        assert pool.poll(0.3) is None


def test_stop_kills_what_does_not_listen_and_its_children() -> None:
    with make_pool("ignores-sigterm:0") as pool:
        pool.start(timeout=20)
        directory = pool._directory
        assert directory is not None and directory.exists()
        began = time.monotonic()
        pool.stop(grace=0.3)
        assert time.monotonic() - began < 3.5
        assert not directory.exists()
