"""Limits of a container, as cgroup version 2 tells them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from server import machine


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 12), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("6400000 100000", 12)],
)
def test_cores_of_a_container(cgroup: Path, limit: str, cores: int) -> None:
    (cgroup / "cpu.max").write_text(limit + "\n")
    assert machine.num_cores() == cores


def test_memory_of_a_container(cgroup: Path) -> None:
    (cgroup / "memory.current").write_text("1000\n")
    (cgroup / "memory.max").write_text("5000\n")
    assert machine.available_memory() == 4000
    (cgroup / "memory.max").write_text("max\n")
    assert machine.available_memory() > 4000


def test_without_a_container_it_is_the_machine(cgroup: Path) -> None:
    assert machine.num_cores() == 12
    assert 0 < machine.available_memory() <= psutil.virtual_memory().total
