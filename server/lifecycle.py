"""From an open port to a clean end: warm-up, drain on SIGTERM, stop on Ctrl-C, exit when a worker fails."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import signal
import socket
from collections.abc import Generator

import uvicorn
import uvloop
from fastapi import FastAPI

from server.choice import TextOptions
from server.generation import Job
from server.sampling import Decoding
from server.service import Phase, Service
from sp_backend.commands import Sampling

log = logging.getLogger("server.lifecycle")
WARMUP_TIMEOUT = 600.0  # seconds
LONGEST_WARMUP = 4096  # tokens: a high --sp-threshold must not make the start take minutes
WATCH_INTERVAL = 0.25  # seconds between looks at the workers
LAST_ANSWERS = 3.0  # seconds for responses to reach their clients once the server stops


class _Server(uvicorn.Server):
    """Signals are handled by `_Lifecycle`: uvicorn would stop at once instead of draining."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def run(app: FastAPI, service: Service, listener: socket.socket) -> int:
    """Serves until a signal or a failure. Returns the exit code."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Lifecycle(app, service, listener).run())
    except OSError as error:  # two servers may reserve a port; only one can listen on it
        log.error("Fatal: %s", error)
        return 1


class _Lifecycle:
    def __init__(self, app: FastAPI, service: Service, listener: socket.socket) -> None:
        self._service = service
        self._listener = listener
        http = service.config.http
        self._server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                ssl_certfile=http.ssl_certfile,
                ssl_keyfile=http.ssl_keyfile,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=LAST_ANSWERS,  # type: ignore[arg-type]
            )
        )
        self._exit_code = 0
        self._drain: asyncio.Task[None] | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_terminate)
        loop.add_signal_handler(signal.SIGINT, self._on_interrupt)
        watching = asyncio.create_task(self._watch())
        starting = asyncio.create_task(self._start())
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            watching.cancel()
            starting.cancel()
            await asyncio.gather(watching, starting, return_exceptions=True)
        return self._exit_code

    async def _start(self) -> None:
        while not self._server.started:
            await asyncio.sleep(0.01)
        if self._service.config.warmup:
            try:
                async with asyncio.timeout(WARMUP_TIMEOUT):
                    await self._warm_up()
            except Exception as error:
                if self._service.phase is Phase.STARTING:  # else a signal has ended it
                    self._fail(f"the warm-up request failed: {str(error) or type(error).__name__}")
                return
        gc.collect()
        gc.freeze()  # a full collection over all that was imported would stop the controller and every stream for 40 ms
        if self._service.phase is Phase.STARTING:
            self._service.phase = Phase.READY
            self._announce()

    async def _warm_up(self) -> None:
        """Long enough to be spread over the ranks, so that every path has run before the first user."""
        service, config = self._service, self._service.config
        spread = 1024 if config.scheduler.sp_threshold is None else config.scheduler.sp_threshold + 1
        length = max(1, min(spread, LONGEST_WARMUP, service.max_request_tokens - 2))
        if config.why_no_generation is not None:
            await service.embedder.probe(length)
            return
        decoding = Decoding(Sampling(temperature=0.0), TextOptions(), frozenset(), 2, 0, 1)
        job = Job("warmup", [[index % config.model.vocab_size for index in range(length)]], decoding, [2])
        async for _ in service.generator.run(job):
            pass
        service.client.flush_cache()

    def _announce(self) -> None:
        http = self._service.config.http
        host = f"[{http.host}]" if ":" in http.host else http.host
        scheme = "http" if http.ssl_certfile is None else "https"
        url = f"{scheme}://{host}:{self._listener.getsockname()[1]}"
        path, body = "completions", {"model": self._service.model_name, "prompt": "def add(a, b):", "max_tokens": 32}
        if self._service.config.why_no_generation is not None:
            path, body = "embeddings", {"model": self._service.model_name, "input": "def add(a, b):"}
        key = "" if http.api_key is None else " -H 'Authorization: Bearer YOUR_KEY'"
        curl = f"curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
        print(f"The server is fired up and ready to roll! {url}\n{curl}", flush=True)  # one write: scripts read both

    def _on_interrupt(self) -> None:
        """Ctrl-C: somebody is waiting for the prompt, so running requests are cut short instead of finished."""
        if self._service.phase is Phase.DRAINING:
            self._on_terminate()
            return
        log.info("Interrupted: shutting down")
        self._service.phase = Phase.DRAINING
        self._service.generator.abort(None)
        self._stop()

    def _on_terminate(self) -> None:
        if self._service.phase is Phase.DRAINING:
            log.warning("Second signal: stopping at once")
            self._stop(force=True)
            return
        self._service.phase = Phase.DRAINING
        self._drain = asyncio.create_task(self._drain_and_stop())

    async def _drain_and_stop(self) -> None:
        log.info("Draining requests and shutting down... (a second signal stops at once)")
        await self._service.client.drain(self._service.config.drain_timeout)
        self._service.generator.abort(None)
        self._stop()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            if (why := self._service.client.healthy()) is not None:
                self._fail(why)
                return

    def _fail(self, why: str) -> None:
        """Running requests get their errors from the scheduler; uvicorn lets them out, then the process ends."""
        log.error("Fatal: %s", why)
        self._service.phase = Phase.FAILED
        self._exit_code = 1
        self._stop()

    def _stop(self, force: bool = False) -> None:
        if force:  # uvicorn would log a traceback for each request that is cut off
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._server.force_exit = force
        self._server.should_exit = True
