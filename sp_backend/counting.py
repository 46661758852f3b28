"""What an executor has done so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Waited = TypeVar("Waited")


@dataclass(slots=True)
class Counters:
    """Totals since the executor was made."""

    bytes_sent: int = 0
    wait_seconds: float = 0.0
    query_key_pairs: float = 0.0
    kernel_calls: int = 0

    def timed(self, wait: Callable[[], Waited]) -> Waited:
        """Wait, and count the seconds."""
        since = time.perf_counter()
        done = wait()
        self.wait_seconds += time.perf_counter() - since
        return done
