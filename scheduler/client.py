"""The asyncio side of the controller: one stream of outputs for each request.

Everything here runs on the event loop; the controller's thread only schedules `_deliver`, once a step.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.plans import StepPlanner
from scheduler.request import Draining, GenerateRequest, Output, QueueFull, Refused, RequestTooLong, Unavailable
from scheduler.stats import Stats
from scheduler.worker_pool import Workers
from sp_backend.config import BackendConfig

__all__ = ["Client", "Draining", "QueueFull", "Refused", "RequestTooLong", "Unavailable"]


class _Stream:
    """An asyncio.Queue for one reader at a third of its cost, which every token of every stream pays."""

    def __init__(self) -> None:
        self._outputs: deque[Output] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        self._outputs.append(output)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> Output:
        while not self._outputs:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._outputs.popleft()


class Client:
    def __init__(
        self,
        config: SchedulerConfig,
        backend: BackendConfig,
        workers: Workers,
        pages_per_rank: int,
        planner: StepPlanner | None = None,
    ) -> None:
        self._controller = Controller(config, backend, workers, pages_per_rank, self._hand_over, planner=planner)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, _Stream] = {}  # of requests that have not ended
        self._empty = asyncio.Event()
        self._empty.set()

    def start(self) -> None:
        self._controller.start()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        """Outputs as they come, the last with a finish_reason. Closing the iterator early aborts the request.

        Raises Refused (or ValueError for a malformed request) before the first output.
        """
        if request.request_id in self._streams:
            raise ValueError(f"duplicate request ID {request.request_id!r}")
        self._loop = asyncio.get_running_loop()
        self._controller.submit(request)
        stream = self._streams[request.request_id] = _Stream()
        self._empty.clear()
        finished = False
        try:
            while not finished:
                output = await stream.get()
                finished = output.finish_reason is not None
                yield output
        finally:
            if not finished:
                self._controller.abort(request.request_id)

    def abort(self, request_id: str) -> None:
        """Ends a request; its stream gets a last output with FinishReason.ABORT."""
        self._controller.abort(request_id)

    def stats(self) -> Stats:
        return self._controller.stats()

    def healthy(self) -> str | None:
        return self._controller.healthy()

    def flush_cache(self) -> None:
        self._controller.flush_cache()

    async def drain(self, timeout: float | None = None) -> bool:
        """Refuses new requests and waits for those that run; False if some were left after `timeout` seconds."""
        self._controller.drain()
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Ends the controller, and requests that are left with an error. The workers are left to their owner."""
        self._controller.close()

    def _hand_over(self, outputs: list[Output]) -> None:
        assert self._loop is not None, "outputs follow requests"
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._streams[output.request_id].put(output)
            if output.finish_reason is not None:  # the id is free again, even if its reader left long ago
                del self._streams[output.request_id]
        if not self._streams:
            self._empty.set()
