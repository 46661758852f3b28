"""A real server in a process of its own, for benchmarks and end-to-end tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from types import TracebackType

import httpx

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """Not among those that Linux gives to whoever does not ask for one: a server's own workers might get it first."""
    for port in Random().sample(range(10_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port between 10000 and 30000 is free")


class LaunchedServer:
    """`python -m server.launch *args` on a free port; ready once the context is entered, gone once it is left."""

    def __init__(self, *args: str, startup_seconds: float = 180, stop_seconds: float = 30) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "server.launch", "--port", str(self.port), *args]
        self._startup_seconds, self._stop_seconds = startup_seconds, stop_seconds
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def __enter__(self) -> LaunchedServer:
        self.process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + self._startup_seconds
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop(signal.SIGKILL)
                raise RuntimeError(f"{' '.join(self._command)} did not get ready:\n{self.output()}")
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(signal.SIGTERM)
        self._log.close()

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def stop(self, with_signal: signal.Signals) -> int:
        """Signal the server, wait, and return its exit code; a server that does not end is killed."""
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
        try:
            return self.process.wait(self._stop_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(10)

    def output(self) -> str:
        """What it has printed so far."""
        self._log.seek(0)
        return self._log.read()
