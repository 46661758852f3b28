"""Server-sent events, and work that ends when its client leaves.

Both need the raw ASGI channel: BaseHTTPMiddleware and StreamingResponse notice a departed client late or not at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import ApiError, internal

log = logging.getLogger("server.streaming")
T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keep-alive\n\n"


class ClientGone(Exception):
    """Nobody reads the answer any more."""


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancels it and raises ClientGone if the client leaves first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come. Headers wait for the first one, so that a refusal still has its own status."""

    def __init__(self, events: AsyncGenerator[bytes, None], keepalive: float) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._keepalive = keepalive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(scope, receive, send))
        except ClientGone:
            return

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._kept_alive()) as events:
                async for data in events:
                    await asyncio.sleep(0)  # all streams' events first, then all writes: a local reader wakes up less
                    if not started:
                        await self._start(send)
                        started = True
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except ApiError as error:
            if not started:
                await error.response()(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": event(error.body()), "more_body": True})
        except Exception:
            if not started:
                raise
            log.exception("A stream failed")
            await send({"type": "http.response.body", "body": event(internal().body()), "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    def _kept_alive(self) -> AsyncGenerator[bytes, None]:
        return _with_keepalive(self._events, self._keepalive) if self._keepalive else self._events

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})


async def _with_keepalive(events: AsyncGenerator[bytes, None], interval: float) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        upcoming = asyncio.ensure_future(anext(events))
        try:
            while True:
                done, _ = await asyncio.wait({upcoming}, timeout=interval)
                if not done:
                    yield KEEPALIVE
                    continue
                try:
                    yield upcoming.result()
                except StopAsyncIteration:
                    return
                upcoming = asyncio.ensure_future(anext(events))
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
