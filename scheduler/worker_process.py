"""One worker process: started in a session of its own, listened to, ended, and its end remembered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import sp_backend
from sp_backend.config import BackendConfig


class WorkerProcess:
    """Its output goes to our standard error."""

    def __init__(self, rank: int, command: Sequence[str], start: bytes, config: BackendConfig) -> None:
        """start: what it reads from its standard input."""
        self.rank = rank
        self._last_lines: deque[str] = deque(maxlen=20)
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(config),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._forward, name=f"worker-{rank}-output", daemon=True)
        self._reader.start()
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError):  # it has died already: found out when it is awaited
            self._popen.stdin.write(start)
            self._popen.stdin.close()

    @property
    def exit_code(self) -> int | None:
        return self._popen.poll()

    def wait(self, timeout: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(max(timeout, 0.0))

    def kill(self, number: signal.Signals) -> None:
        """Signals the worker and what it may have started itself."""
        if self.exit_code is None:
            with suppress(ProcessLookupError):
                os.killpg(self._popen.pid, number)

    def close(self) -> None:
        self._reader.join(1.0)
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def obituary(self) -> str:
        code = self.exit_code
        assert code is not None
        self._reader.join(1.0)
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        said = "\n".join(self._last_lines)
        return f"worker {self.rank} {how}" + (f", after saying:\n{said}" if said else "")

    def _forward(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            text = line.decode(errors="replace").rstrip()
            self._last_lines.append(text)
            print(text, file=sys.stderr, flush=True)


def wait_all(processes: Sequence[WorkerProcess], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    for process in processes:
        process.wait(deadline - time.monotonic())


def _environment(config: BackendConfig) -> dict[str, str]:
    """Workers import the same packages, wherever they are started, and compute with as many threads as configured."""
    root = str(Path(next(iter(sp_backend.__path__))).parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "GLOO_SOCKET_IFNAME": "lo",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(config.num_threads),
        "PYTHONUNBUFFERED": "1",
    }
