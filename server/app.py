"""The HTTP application: OpenAI routes, middleware, and errors in one shape."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from server import control
from server.completion import Writer
from server.errors import ApiError, internal, model_not_found
from server.generate import GenerateBody, GenerateWriter
from server.middleware import Auth, RequestId
from server.openai_types import ChatRequest, CompletionRequest, EmbeddingRequest, json_schema
from server.requests import read_json
from server.responses import json_response
from server.service import Service, service_of
from server.streaming import ClientGone, EventStream, until_disconnect
from server.version import VERSION

B = TypeVar("B", CompletionRequest, ChatRequest, GenerateBody)
AnyWriter = Writer | GenerateWriter
router = APIRouter(prefix="/v1", tags=["OpenAI"])
native = APIRouter(tags=["SGLang"])


def create_app(service: Service) -> FastAPI:
    app = FastAPI(title="sp-serve", version=VERSION, openapi_url="/openapi.json")
    app.state.service = service
    app.include_router(router)
    app.include_router(native)
    app.include_router(control.router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(Exception, _bug)
    _describe_bodies(app, CompletionRequest, ChatRequest, EmbeddingRequest, GenerateBody)
    if service.config.http.api_key is not None:
        app.add_middleware(Auth, api_key=service.config.http.api_key)
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"], expose_headers=["*"]
    )
    app.add_middleware(RequestId, metrics=service.metrics, log_requests=service.config.http.log_requests)
    return app


def _body(kind: type[msgspec.Struct]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _describe_bodies(app: FastAPI, *kinds: type[msgspec.Struct]) -> None:
    """Bodies are msgspec structs, which FastAPI does not know: their schemas join /openapi.json here."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for kind in kinds:
            schemas.update(json_schema(kind))
        return document

    app.openapi = openapi  # type: ignore[method-assign]


@router.post("/completions", openapi_extra=_body(CompletionRequest))
async def completions(request: Request) -> Response:
    return await _generated(request, CompletionRequest, service_of(request).jobs.completion)


@router.post("/chat/completions", openapi_extra=_body(ChatRequest))
async def chat_completions(request: Request) -> Response:
    return await _generated(request, ChatRequest, service_of(request).jobs.chat)


@native.post("/generate", openapi_extra=_body(GenerateBody))
async def generate(request: Request) -> Response:
    return await _generated(request, GenerateBody, service_of(request).jobs.generate)


@router.post("/embeddings", openapi_extra=_body(EmbeddingRequest))
async def embeddings(request: Request) -> Response:
    service = service_of(request)
    body = await read_json(request, EmbeddingRequest)
    service.check_taking_requests()
    service.jobs.check_model(body.model)
    job = await service.embedder.read(body, _explain(request))
    answer = service.embedder.run(job, body.model or service.model_name)
    return json_response(await until_disconnect(request.receive, answer))


def _explain(request: Request) -> bool:
    """Whether the answer shall tell the plan of each step, and why it was chosen."""
    return request.headers.get("x-sp-explain", "0").strip().lower() not in ("", "0", "false")


async def _generated(request: Request, kind: type[B], read: Callable[[B, bool], Awaitable[AnyWriter]]) -> Response:
    service = service_of(request)
    body = await read_json(request, kind)
    service.check_taking_requests()  # after the body: a refusal that leaves it unread may reset the connection
    writer = await read(body, _explain(request))
    deltas = service.generator.run(writer.job)
    if body.stream:
        return EventStream(writer.events(deltas), service.config.http.sse_keepalive_interval)
    return json_response(await until_disconnect(request.receive, writer.whole(deltas)))


@router.get("/models")
async def models(request: Request) -> Response:
    return json_response({"object": "list", "data": [_model(service_of(request))]})


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    service = service_of(request)
    if name not in service.config.http.served_model_names:
        raise model_not_found(name)
    return json_response(_model(service) | {"id": name})


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "sp-serve",
        "root": service.config.backend.model_path,
        "max_model_len": service.config.backend.context_length,
    }


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # never read


async def _bug(request: Request, error: Exception) -> Response:
    # uvicorn logs it: the handler's caller raises it again
    return internal().response()
