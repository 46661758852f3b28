"""Errors that a client sees: always `{"error": {"message", "type", "param", "code"}}`.

The nesting matters: JavaScript's openai client shows "no body" for a flat object.
"""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response


class ApiError(Exception):
    """Raised anywhere on the request path; becomes the response, or an SSE event once streaming began."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        return Response(orjson.dumps(self.body()), self.status, headers=self.headers, media_type="application/json")


_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
RETRY_AFTER = {"Retry-After": "2"}
NO_RETRY = {"x-should-retry": "false"}  # the openai clients would send a long prefill again


def invalid(message: str, param: str | None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def invalid_json(error: Exception, param: str | None = None) -> ApiError:
    detail = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return invalid(f"The body is not valid JSON: {detail}", param, "invalid_json")


def too_long(needs: int, fits: int, param: str = "prompt", hint: str = "") -> ApiError:
    """Both phrases are matched by clients that recover by shortening the prompt. hint: what the operator can do."""
    return invalid(
        f"This model's maximum context length is {fits} tokens. The input ({needs} tokens) is longer than the "
        f"model's context length ({fits} tokens).{hint}",
        param,
        "context_length_exceeded",
    )


def internal() -> ApiError:
    return ApiError(500, "Internal server error; see the server's log.", headers=NO_RETRY)


def unavailable(message: str) -> ApiError:
    """The connection is closed so that the client's next attempt can reach another server."""
    return ApiError(503, message, code="service_unavailable", headers={**RETRY_AFTER, "Connection": "close"})


def model_not_found(name: str) -> ApiError:
    return ApiError(404, f"The model `{name}` does not exist.", param="model", code="model_not_found")
