"""Reads a JSON body into a struct. Whatever is wrong with it is the client's fault and named."""

from __future__ import annotations

import json
import math
import re
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from server.errors import ApiError, invalid, invalid_json
from server.prompts import in_thread_if_long
from server.streaming import ClientGone

S = TypeVar("S", bound=msgspec.Struct)
MAX_BODY = 256 * 2**20  # bytes
PATH = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`")
MISSING = re.compile(r"missing required field `([^`]*)`")


async def read_json(request: Request, kind: type[S]) -> S:
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ApiError(415, f"Content-Type {content_type!r} is not supported; send application/json.")
    body = await _body(request)
    return await in_thread_if_long(len(body), lambda: decode(body, kind))


async def _body(request: Request) -> bytes:
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > MAX_BODY:
                raise ApiError(413, f"The request body is larger than {MAX_BODY} bytes.")
            chunks.append(chunk)
    except ClientDisconnect as error:
        raise ClientGone from error
    return b"".join(chunks)


def decode(body: bytes, kind: type[S]) -> S:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from None
    except (ValueError, RecursionError) as error:
        _refuse_non_finite(body)
        raise invalid_json(error) from None


def _invalid_field(message: str) -> ApiError:
    parts = [found.group(1) for found in (PATH.search(message), MISSING.search(message)) if found]
    field = ".".join(part for part in parts if part) or None
    text = PATH.sub("", message)
    return invalid(f"{field}: {text}" if field else text, field)


def _refuse_non_finite(body: bytes) -> None:
    """Python clients write NaN and Infinity, which JSON does not have: name the field that holds one."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if isinstance(value, float) and not math.isfinite(value):
            raise invalid(f"{name}: must be a finite number.", name)
