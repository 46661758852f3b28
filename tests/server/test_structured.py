"""Each way to ask for structured output becomes a grammar that llguidance accepts; see also test_validation.py."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from llguidance import LLMatcher, LLTokenizer

from server.arguments import DEFAULT_MODEL
from tests.server.fake_client import FakeClient
from tests.server.live import live_server

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOKENIZER = LLTokenizer(str(DEFAULT_MODEL / "tokenizer.json"), 4032, [1])
CHAT = "/v1/chat/completions"


def grammar_of(fields: dict[str, Any], path: str = "/v1/completions") -> str | None:
    """What the scheduler is given."""
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **fields}
    with live_server(FakeClient()) as live:
        answer = httpx.post(live.url + path, json=body, timeout=20)
        assert answer.status_code == 200, answer.text
        (request,) = live.client.requests
    return request.sampling.grammar


def matches(grammar: str | None, text: str) -> bool:
    assert grammar is not None
    matcher, tokens = LLMatcher(TOKENIZER, grammar, log_level=0), TOKENIZER.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
def test_response_format(path: str) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}
    grammar = grammar_of({"response_format": schema}, path)
    assert matches(grammar, '{"a": 5}') and not matches(grammar, '{"b": 5}')
    anything = grammar_of({"response_format": {"type": "json_object"}}, path)
    assert matches(anything, '{"b":\n  [1, null]}') and not matches(anything, "[1]")
    assert grammar_of({"response_format": {"type": "text"}}, path) is None
    assert grammar_of({"response_format": None}, path) is None


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"json_schema": '{"type": "integer"}'}, "12", "x"),
        ({"regex": r"\d{2}"}, "12", "123"),
        ({"ebnf": 'root ::= "a" | "b"'}, "b", "c"),
        ({"structured_outputs": {"json": SCHEMA}}, '{"a": 5}', "{}"),
        ({"structured_outputs": {"json": {}}}, "[1]", "x"),
        ({"structured_outputs": {"json_object": True}}, "{}", "[]"),
        ({"structured_outputs": {"regex": "a+"}}, "aaa", "b"),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, 'n"o', "maybe"),
        ({"structured_outputs": {"grammar": 'start: "x" "y"'}}, "xy", "x"),
    ],
)
def test_other_servers_names(fields: dict[str, Any], good: str, bad: str) -> None:
    grammar = grammar_of(fields)
    assert matches(grammar, good) and not matches(grammar, bad)


def test_space_between_tokens_of_json_is_bounded() -> None:
    grammar = grammar_of({"response_format": {"type": "json_object"}})
    assert matches(grammar, '{"a":' + " " * 32 + "1}") and not matches(grammar, '{"a":' + " " * 33 + "1}")
