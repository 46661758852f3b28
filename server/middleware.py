"""Pure ASGI wrappers: they pass the channel through, so that disconnects stay visible."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError
from server.metrics import Metrics

log = logging.getLogger("server.access")
OPEN_PATHS = ("/health", "/ready", "/ping", "/live", "/metrics")
SAFE_ID = re.compile(rb"[\x21-\x7e]{1,256}")


class Auth:
    """`Authorization: Bearer KEY` for everything but probes and metrics."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/") not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(
                    401,
                    "Invalid or missing API key.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class RequestId:
    """Echoes X-Request-Id (or makes one), counts responses and, if asked, logs them."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log_requests: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        started, status = time.perf_counter(), 499  # what a client that left gets

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")  # not the raw path: a label for each scan
            self._metrics.responded(route, status)
            if self._log_requests:
                seconds = time.perf_counter() - started
                path = scope["raw_path"].decode("latin-1")  # as it was sent: a decoded one could write lines of its own
                log.info("%s %s %d %.3fs id=%s", scope["method"], path, status, seconds, request_id.decode())
