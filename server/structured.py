"""Structured output: what a request wants its text to match, as one llguidance grammar.

The fields are OpenAI's `response_format`, SGLang's `json_schema`, `regex` and `ebnf`, and vLLM's `structured_outputs`.
A grammar is checked here, before the request is scheduled; the workers follow it (sp_backend/grammars.py).
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
from llguidance import LLMatcher, grammar_from
from msgspec import Meta

from server.errors import invalid

if TYPE_CHECKING:
    from server.openai_types import SamplingFields

WHITESPACE = r"[ \t\n]{0,32}"  # between JSON's tokens: small models would go on with it for ever
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True):
    schema: dict[str, Any]
    name: str | None = None
    strict: bool | None = None  # output always matches


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    grammar: str | None = None


class Wanted(NamedTuple):
    field: str  # that asks for it
    kind: Literal["json", "regex", "choice", "ebnf"]
    text: Any


async def read_grammar(request: SamplingFields, has_eos: bool) -> str | None:
    """None: any text. In a thread, as a large grammar takes up to a second."""
    wanted = [each for each in _all(request) if each.text is not None]
    if not wanted:
        return None
    if len(wanted) > 1:
        raise invalid(f"Only one of {' and '.join(each.field for each in wanted)} can be given.", wanted[1].field)
    if not has_eos:
        raise invalid("Structured output needs a model with an end-of-sequence token.", wanted[0].field)
    return await asyncio.to_thread(_grammar, wanted[0])


def _all(request: SamplingFields) -> list[Wanted]:
    """Every field that can ask for a structure; text None: it does not."""
    vllm = request.structured_outputs or StructuredOutputs()
    return [
        Wanted("response_format", "json", _schema_of(request.response_format)),
        Wanted("json_schema", "json", request.json_schema),
        Wanted("regex", "regex", request.regex),
        Wanted("ebnf", "ebnf", request.ebnf),
        Wanted("structured_outputs.json", "json", vllm.json),
        Wanted("structured_outputs.json_object", "json", ANY_OBJECT if vllm.json_object else None),
        Wanted("structured_outputs.regex", "regex", vllm.regex),
        Wanted("structured_outputs.choice", "choice", vllm.choice),
        Wanted("structured_outputs.grammar", "ebnf", vllm.grammar),
    ]


def _schema_of(given: ResponseFormat | None) -> dict[str, Any] | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return ANY_OBJECT
    if given.json_schema is None:
        raise invalid("response_format: json_schema is missing.", "response_format.json_schema")
    return given.json_schema.schema


def _grammar(wanted: Wanted) -> str:
    try:
        if wanted.kind == "json":
            grammar = LLMatcher.grammar_from_json_schema(wanted.text, defaults={"whitespace_pattern": WHITESPACE})
        else:
            text = json.dumps(wanted.text) if wanted.kind == "choice" else wanted.text
            grammar = grammar_from(wanted.kind, text)
    except ValueError as error:
        raise invalid(f"{wanted.field}: {error}", wanted.field) from None
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise invalid(f"{wanted.field}: {'; '.join(messages)}", wanted.field)
    return grammar
