"""Routes for operators, probes and load tools."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.errors import invalid
from server.openai_types import AbortRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from server.prompts import in_thread_if_long
from server.requests import read_json
from server.responses import json_response
from server.service import service_of
from server.streaming import until_disconnect
from server.version import VERSION

router = APIRouter(tags=["control"])
Handler = Callable[[Request], Awaitable[Response]]


def _route(methods: str, *paths: str) -> Callable[[Handler], Handler]:
    """The first path is documented; the others are other servers' names for it."""

    def register(handler: Handler) -> Handler:
        for path in paths:
            for method in methods.split():
                documented = path == paths[0] and method == methods.split()[0]
                router.add_api_route(path, handler, methods=[method], include_in_schema=documented)
        return handler

    return register


@_route("GET HEAD", "/health", "/ready", "/ping", "/health/", "/ready/")
async def health(request: Request) -> Response:
    """Warmed up, not draining, and every worker answers. No forward pass."""
    why = service_of(request).why_not_serving()
    return json_response({"status": "ok"}) if why is None else json_response({"status": why}, 503)


@_route("GET HEAD", "/live")
async def live(request: Request) -> Response:
    """This process answers."""
    return json_response({"status": "ok"})


@_route("GET POST", "/health_generate")
async def health_generate(request: Request) -> Response:
    """One token through the whole model, generated or embedded."""
    service = service_of(request)
    if (why := service.why_not_serving()) is not None:
        return json_response({"status": why}, 503)
    if service.config.why_no_generation is not None:
        await until_disconnect(request.receive, service.embedder.probe(1))
        return json_response({"status": "ok"})
    body = CompletionRequest(prompt=msgspec.Raw(b"[0]"), max_tokens=1, ignore_eos=True)
    writer = await service.jobs.completion(body)
    await until_disconnect(request.receive, writer.whole(service.generator.run(writer.job)))
    return json_response({"status": "ok"})


@_route("GET HEAD", "/metrics", "/metrics/")
async def metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@_route("GET POST", "/server_info", "/get_server_info")
async def server_info(request: Request) -> Response:
    service = service_of(request)
    stats = msgspec.to_builtins(service.client.stats(), str_keys=True)
    return json_response(
        {**service.config.summary(), "version": VERSION, "status": service.phase.value, "stats": stats}
    )


@_route("GET POST", "/model_info", "/get_model_info")
async def model_info(request: Request) -> Response:
    config = service_of(request).config
    return json_response(
        {
            "model_path": config.backend.model_path,
            "tokenizer_path": str(config.text.tokenizer_path),
            "is_generation": config.why_no_generation is None,
            "architecture": config.model.architecture,
            "vocab_size": config.model.vocab_size,
            "context_length": config.backend.context_length,
            "dtype": config.backend.dtype,
        }
    )


@_route("GET", "/version")
async def server_version(request: Request) -> Response:
    return json_response({"version": VERSION})


@_route("GET", "/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """With this, /tokenize and /detokenize, lm-evaluation-harness needs no copy of the tokenizer."""
    template = service_of(request).template
    return json_response({**template.special_tokens, "chat_template": template.source})


@_route("POST", "/tokenize", "/v1/tokenize")
async def tokenize(request: Request) -> Response:
    service = service_of(request)
    body = await read_json(request, TokenizeRequest)
    service.jobs.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("Exactly one of prompt and messages is needed.", "prompt")
    if body.messages is not None:
        tokens: Any = await service.jobs.chat_ids(
            body.messages, add_generation_prompt=body.add_generation_prompt is not False
        )
    else:
        texts = body.prompt if isinstance(body.prompt, list) else [body.prompt or ""]
        special = body.add_special_tokens is not False
        tokens = await in_thread_if_long(sum(map(len, texts)), lambda: service.tokenizer.encode_batch(texts, special))
        tokens = tokens if isinstance(body.prompt, list) else tokens[0]
    nested = bool(tokens) and isinstance(tokens[0], list)
    count: Any = [len(ids) for ids in tokens] if nested else len(tokens)
    return json_response({"tokens": tokens, "count": count, "max_model_len": service.config.backend.context_length})


@_route("POST", "/detokenize", "/v1/detokenize")
async def detokenize(request: Request) -> Response:
    """`text` is SGLang's name for the answer, `prompt` vLLM's."""
    service = service_of(request)
    body = await read_json(request, DetokenizeRequest)
    service.jobs.check_model(body.model)
    size = service.config.model.vocab_size
    if max(body.tokens, default=0) >= size:
        raise invalid(f"tokens: token id out of vocabulary (its size is {size})", "tokens")
    skip = body.skip_special_tokens is not False
    text = await in_thread_if_long(4 * len(body.tokens), lambda: service.tokenizer.decode(body.tokens, skip))
    return json_response({"text": text, "prompt": text})


@_route("GET POST", "/flush_cache", "/reset_prefix_cache")
async def flush_cache(request: Request) -> Response:
    service_of(request).client.flush_cache()
    return json_response({"status": "ok"})


@_route("POST", "/abort_request", "/abort_requests")
async def abort_request(request: Request) -> Response:
    body = await read_json(request, AbortRequest)
    if body.rid is None and not body.abort_all:
        raise invalid("rid or abort_all is needed.", "rid")
    aborted = service_of(request).generator.abort(None if body.abort_all else body.rid)
    return json_response({"aborted": aborted})
