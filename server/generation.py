"""Runs the completions of one request on the scheduler and merges their streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from scheduler.request import (
    Draining,
    FinishReason,
    GenerateRequest,
    Output,
    QueueFull,
    Refused,
    RequestTooLong,
    Unavailable,
)
from server.choice import Choice, Delta
from server.errors import NO_RETRY, RETRY_AFTER, ApiError, invalid, too_long, unavailable
from server.metrics import Metrics
from server.sampling import Decoding
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from scheduler.stats import Stats


class Client(Protocol):
    """What the server needs of scheduler.client.Client."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]: ...
    def abort(self, request_id: str) -> None: ...
    def stats(self) -> Stats: ...
    def healthy(self) -> str | None: ...
    def flush_cache(self) -> None: ...
    async def drain(self, timeout: float) -> bool: ...


@dataclass(frozen=True, slots=True)
class Job:
    """All completions of one HTTP request: n for each prompt."""

    id: str  # of the response
    prompts: list[list[int]]
    decoding: Decoding
    max_tokens: list[int]  # for each prompt
    rid: str | None = None  # the client's own name for it
    explain: bool = False  # the answer says which steps it took
    prompt_logprobs: int | None = None  # None: none; k: of each prompt token and the k most likely alternatives

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.decoding.n

    def request(self, index: int) -> GenerateRequest:
        which, k = divmod(index, self.decoding.n)
        return GenerateRequest(
            request_id=f"{self.id}-{index}",
            prompt=self.prompts[which],
            max_tokens=self.max_tokens[which],
            sampling=self.decoding.sampling_of(k),
            stop_token_ids=self.decoding.stop_token_ids,
            min_tokens=self.decoding.min_tokens,
            explain=self.explain,
            prompt_logprobs=self.prompt_logprobs,
        )


class Generator:
    def __init__(self, client: Client, tokenizer: Tokenizer, metrics: Metrics, queue_full_status: int) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._queue_full_status = queue_full_status
        self._live: dict[str, list[str]] = {}  # response id or rid -> the scheduler's request ids

    async def run(self, job: Job) -> AsyncGenerator[Delta, None]:
        """Closing it early aborts what still runs."""
        with self._named(job.id, job.rid, [f"{job.id}-{index}" for index in range(job.num_choices)]):
            streams = [self._one(job, index) for index in range(job.num_choices)]
            async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as deltas:
                async for delta in deltas:
                    yield delta

    async def embed(self, name: str, rid: str | None, requests: list[GenerateRequest]) -> list[Output]:
        """The one output of each request, all of which embed. Cancelling it, or an error in one, aborts all."""
        with self._named(name, rid, [request.request_id for request in requests]):
            tasks = [asyncio.create_task(self._embed(request)) for request in requests]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    @contextmanager
    def _named(self, name: str, rid: str | None, ids: list[str]) -> Iterator[None]:
        """While they run, the scheduler's requests `ids` can be aborted under either name."""
        names = [name] if rid is None else [name, rid]
        if rid in self._live:
            raise invalid(f"Duplicate request ID {rid!r}: it is still running.", "rid")
        self._live.update(dict.fromkeys(names, ids))
        try:
            yield
        finally:
            for each in names:
                self._live.pop(each, None)

    def abort(self, name: str | None) -> int:
        """Ends the completions of a response id or rid; None: all. Returns how many."""
        live = self._live.values() if name is None else [self._live.get(name, [])]
        ids = {request_id for ids in live for request_id in ids}
        for request_id in ids:
            self._client.abort(request_id)
        return len(ids)

    async def _one(self, job: Job, index: int) -> AsyncGenerator[Delta, None]:
        request = job.request(index)
        choice = Choice(index, self._tokenizer, request.prompt, job.decoding.text)
        async with self._outputs(request) as (outputs, clock):
            async for output in outputs:
                if output.finish_reason is FinishReason.ERROR:
                    raise ApiError(500, output.error or "generation failed", headers=NO_RETRY)
                delta = choice.add(output)
                clock.saw(delta)
                yield delta
                if delta.finish_reason is not None:
                    return

    async def _embed(self, request: GenerateRequest) -> Output:
        async with self._outputs(request) as (outputs, clock):
            output = await anext(outputs)
            if output.finish_reason is FinishReason.ERROR:
                raise ApiError(500, output.error or "embedding failed", headers=NO_RETRY)
            assert output.finish_reason is not None, "there is one output only"
            clock.saw(Delta(0, finish_reason=output.finish_reason.value))
            if output.finish_reason is FinishReason.ABORT:
                raise ApiError(499, "The request was aborted.", code="aborted", headers=NO_RETRY)
            return output

    @asynccontextmanager
    async def _outputs(self, request: GenerateRequest) -> AsyncGenerator[tuple[AsyncGenerator[Output, None], _Clock]]:
        """Its outputs, and a clock for them; errors as the client shall see them."""
        clock = _Clock(self._metrics)
        try:
            async with aclosing(self._client.generate(request)) as outputs:
                yield outputs, clock
        except Refused as refused:
            clock.closed = True
            raise self._as_api_error(refused) from refused
        except ApiError:
            clock.failed()
            raise
        finally:
            clock.close()

    def _as_api_error(self, refused: Refused) -> ApiError:
        if isinstance(refused, RequestTooLong):
            return too_long(refused.needs, refused.fits)
        if isinstance(refused, QueueFull):
            return ApiError(self._queue_full_status, refused.message, code="queue_full", headers=RETRY_AFTER)
        if isinstance(refused, Draining | Unavailable):
            return unavailable(refused.message)
        return invalid(refused.message, None)


class _Clock:
    """Observes the latencies of one completion, and how it ended."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = self._last = time.perf_counter()
        self._num_tokens = 0
        self.closed = False

    def saw(self, delta: Delta) -> None:
        now = time.perf_counter()
        new = delta.num_tokens - self._num_tokens
        if new > 0:
            if self._num_tokens == 0:
                self._metrics.first_token(now - self._start)
            else:
                self._metrics.next_tokens(now - self._last, new)
            self._num_tokens, self._last = delta.num_tokens, now
        if delta.finish_reason is None:
            return
        if delta.finish_reason == FinishReason.ABORT.value:
            self.close()
        else:
            self._metrics.finished(delta.finish_reason, now - self._start)
            self.closed = True

    def failed(self) -> None:
        if not self.closed:  # an aborted embedding is answered with an error, too
            self._metrics.failed()
            self.closed = True

    def close(self) -> None:
        if not self.closed:
            self._metrics.aborted()
            self.closed = True


async def _merge(streams: list[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Yields from all streams as they come. Closing it, or an error in one, closes all."""
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

    async def forward(stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(forward(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
