"""What this machine offers, or the container if that is less: cores, memory, arithmetic."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # version 2


def num_cores() -> int:
    """A container's limit is a quota of time: threads beyond it would be stopped in the middle of a step."""
    cores, limit = len(os.sched_getaffinity(0)), CGROUP / "cpu.max"
    quota, period = limit.read_text().split() if limit.exists() else ("max", "")
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def available_memory() -> int:
    """Bytes."""
    available: int = psutil.virtual_memory().available
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available


def has_bfloat16() -> bool:
    """Whether the CPU multiplies it."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags
