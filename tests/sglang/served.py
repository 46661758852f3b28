"""A real SGLang server on CPU ranks, in processes of its own."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from benchmarks.launched import ROOT, free_port
from tests.sglang.process import start

LINES = 60  # of its log, in errors


class SGLangServer:
    """Ready once the context is entered; no process of it is left once the context is left."""

    def __init__(
        self,
        model: Path,
        backend: str,
        *args: str,
        cp_size: int = 2,
        tp_size: int | None = None,
        env: Mapping[str, str] | None = None,
        startup_seconds: float = 280,
        imported: bool = True,
    ) -> None:
        """tp_size: SGLang's, which counts CP ranks too; None: cp_size. args: more flags, which win. imported: see
        process.py.
        """
        self.port = free_port()
        tp_size = tp_size or cp_size
        self.arguments = ["--model-path", str(model), "--device", "cpu"]
        self.arguments += ["--attention-backend", backend, "--tp-size", str(tp_size), "--attn-cp-size", str(cp_size)]
        self.arguments += ["--enable-prefill-cp", "--cp-strategy", "zigzag", "--dtype", "float32"]
        self.arguments += ["--mem-fraction-static", "0.1", "--sleep-on-idle", "--port", str(self.port), *args]
        cores = sorted(os.sched_getaffinity(0))
        self._env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "sglang" / "shims"), str(ROOT)]),
            "HF_HUB_OFFLINE": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(cores[r % len(cores)]) for r in range(tp_size)),
            **(env or {}),
        }
        self._startup_seconds, self._imported = startup_seconds, imported
        self._log = tempfile.NamedTemporaryFile("r")  # noqa: SIM115

    def __enter__(self) -> SGLangServer:
        self._process = start(self.arguments, self._env, Path(self._log.name), imported=self._imported)
        deadline = time.monotonic() + self._startup_seconds
        while not self._is_ready():
            if not self._process.is_alive() or time.monotonic() > deadline:
                self._end()
                shown = "\n".join(self.log().splitlines()[-LINES:])
                raise RuntimeError(f"sglang.launch_server {' '.join(self.arguments)} did not get ready:\n{shown}")
            time.sleep(0.2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._log.close()

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[dict[str, Any]]:
        """Greedy, as one request: SGLang's answers, with output_ids and meta_info."""
        sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        body = {"input_ids": [list(p) for p in prompts], "sampling_params": sampling}
        response = httpx.post(f"http://127.0.0.1:{self.port}/generate", json=body, timeout=600)
        response.raise_for_status()
        answers: list[dict[str, Any]] = response.json()
        return answers

    def log(self) -> str:
        """What all of its processes have printed so far."""
        self._log.seek(0)
        return self._log.read()

    def _is_ready(self) -> bool:
        """Its own warm-up request is through."""
        return "The server is fired up and ready to roll!" in self.log()

    def _end(self) -> None:
        """Nobody waits for a test's requests, so its whole session is killed."""
        try:
            os.killpg(self._process.ident, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.kill()
        self._process.join(30)
