"""The asyncio bridge, with a real controller thread on fake workers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from scheduler.client import Client, Draining, QueueFull, RequestTooLong, Unavailable
from scheduler.config import SchedulerConfig
from scheduler.request import FinishReason, GenerateRequest
from scheduler.worker_pool import WorkerFailed
from sp_backend.commands import StepResult
from tests.scheduler.fake_workers import FakeWorkers, backend_config, expected_tokens

BACKEND = backend_config(sp_size=2, context_length=300)
PAGES = 50


class PacedWorkers(FakeWorkers):
    """Takes real time, can be held, and can die."""

    def __init__(self) -> None:
        super().__init__(BACKEND, PAGES)
        self.go = threading.Event()
        self.go.set()
        self.dead = False

    def poll(self, timeout: float) -> list[StepResult] | None:
        if self.dead:
            raise WorkerFailed("worker 1 was killed by signal 9")
        if self._results is None or not self.go.wait(timeout):
            return None
        time.sleep(0.001)
        return super().poll(timeout)


@asynccontextmanager
async def client_on(workers: PacedWorkers, **config: object) -> AsyncIterator[Client]:
    client = Client(SchedulerConfig(**config), BACKEND, workers, PAGES)  # type: ignore[arg-type]
    client.start()
    yield client
    client.close()


async def run(client: Client, request: GenerateRequest) -> tuple[list[int], FinishReason | None]:
    tokens: list[int] = []
    reason = None
    async for output in client.generate(request):
        tokens += [token.token for token in output.tokens]
        reason = output.finish_reason
    return tokens, reason


def request(name: str, length: int = 20, max_tokens: int = 10) -> GenerateRequest:
    return GenerateRequest(name, list(range(length)), max_tokens)


async def until(condition: object, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_requests_run_side_by_side_and_end() -> None:
    async def main() -> None:
        async with client_on(PacedWorkers()) as client:
            results = await asyncio.gather(*(run(client, request(f"r{n}", 5 + n)) for n in range(20)))
            for n, (tokens, reason) in enumerate(results):
                assert reason is FinishReason.LENGTH and tokens == expected_tokens(list(range(5 + n)), 10)
            stats = client.stats()
            assert stats.num_running == stats.num_waiting == stats.pages_used == 0
            assert stats.num_finished["length"] == 20 and stats.generated_tokens == 200

    asyncio.run(main())


def test_closing_the_iterator_frees_the_pages() -> None:
    async def main() -> None:
        async with client_on(PacedWorkers()) as client:
            async with aclosing(client.generate(request("r", max_tokens=200))) as outputs:
                await anext(outputs)
                with pytest.raises(ValueError, match="duplicate"):
                    await run(client, request("r"))
            await until(lambda: client.stats().num_running == 0)
            stats = client.stats()
            assert stats.pages_used == 0 and stats.num_finished["abort"] == 1
            assert (await run(client, request("r")))[1] is FinishReason.LENGTH, "the id is free again"

    asyncio.run(main())


def test_abort_ends_the_stream() -> None:
    async def main() -> None:
        async with client_on(PacedWorkers()) as client:
            task = asyncio.create_task(run(client, request("r", max_tokens=200)))
            await until(lambda: client.stats().num_running == 1)
            client.abort("r")
            client.abort("nobody")
            assert (await task)[1] is FinishReason.ABORT

    asyncio.run(main())


def test_refusals_come_before_the_first_output() -> None:
    async def main() -> None:
        workers = PacedWorkers()
        async with client_on(workers, max_running_requests=1, max_queued_requests=1) as client:
            with pytest.raises(RequestTooLong) as refused:
                await run(client, request("long", 200, 101))
            assert (refused.value.needs, refused.value.fits) == (301, 300)
            with pytest.raises(ValueError):
                await run(client, request("empty", 0))
            workers.go.clear()
            running = asyncio.create_task(run(client, request("a")))
            await until(lambda: client.stats().num_running == 1)
            queued = asyncio.create_task(run(client, request("b")))
            await until(lambda: client.stats().num_waiting == 1)
            with pytest.raises(QueueFull):
                await run(client, request("c"))
            workers.go.set()
            assert (await running)[1] is (await queued)[1] is FinishReason.LENGTH

    asyncio.run(main())


def test_drain_refuses_new_requests_and_waits_for_the_others() -> None:
    async def main() -> None:
        workers = PacedWorkers()
        async with client_on(workers) as client:
            task = asyncio.create_task(run(client, request("r", max_tokens=50)))
            await until(lambda: client.stats().num_running == 1)
            workers.go.clear()
            assert not await client.drain(timeout=0.05)
            with pytest.raises(Draining):
                await run(client, request("late"))
            workers.go.set()
            assert await client.drain(timeout=5.0)
            assert (await task)[1] is FinishReason.LENGTH

    asyncio.run(main())


def test_close_ends_what_is_left() -> None:
    async def main() -> None:
        workers = PacedWorkers()
        workers.go.clear()
        async with client_on(workers) as client:
            task = asyncio.create_task(run(client, request("r")))
            await until(lambda: client.stats().num_running == 1)
            client.close()
            assert (await task)[1] is FinishReason.ERROR
            with pytest.raises(Unavailable):
                await run(client, request("late"))

    asyncio.run(main())


@pytest.mark.parametrize("busy", [True, False])
def test_a_dead_worker_ends_every_request_and_is_reported_once(busy: bool) -> None:
    async def main() -> None:
        workers = PacedWorkers()
        async with client_on(workers) as client:
            tasks = []
            if busy:
                tasks = [asyncio.create_task(run(client, request(f"r{n}", max_tokens=200))) for n in range(3)]
                await until(lambda: client.stats().num_running == 3)
            workers.dead = True
            await until(lambda: client.healthy() is not None, seconds=2.0)
            assert client.healthy() == "worker 1 was killed by signal 9"
            assert [(await task)[1] for task in tasks] == [FinishReason.ERROR] * len(tasks)
            await until(lambda: client.healthy() == "worker 1 was killed by signal 9")
            with pytest.raises(Unavailable):
                await run(client, request("late"))

    asyncio.run(main())
