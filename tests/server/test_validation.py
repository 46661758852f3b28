"""Whatever a client sends, it is told what is wrong: a 4xx that names the field, never a 500."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.openai_types import UNSUPPORTED
from tests.server.fake_client import FakeClient
from tests.server.live import Live, live_server

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
GENERATE = "/generate"
HTTP = httpx.Client(timeout=20)
USER = [{"role": "user", "content": "x"}]


def post(live: Live, path: str, body: bytes | dict[str, Any], **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTP.post(live.url + path, content=content, headers={"content-type": "application/json", **headers})


def error(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    result: dict[str, Any] = body["error"]
    return result


WRONG_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["x", ""]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [4032]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1, "x"]}, "prompt"),
    ({"prompt": ["x", 1]}, "prompt"),
    ({"prompt": [[1], 2]}, "prompt"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": float("-inf")}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"n": 128, "prompt": ["x"] * 100}, "n"),
    ({"best_of": 3, "n": 2}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"suffix": "x"}, "suffix"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop[1]"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop_token_ids": [5000]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"9999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream_options": 5, "stream": True}, "stream_options"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format"),
    ({"json_schema": "{"}, "json_schema"),
    ({"regex": "(["}, "regex"),
    ({"ebnf": "root ::= missing"}, "ebnf"),
    ({"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]"),
    ({"seed": "x"}, "seed"),
    ({"seed": 2**70}, "seed"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG_FIELDS)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_fields_of_completions(live: Live, fields: dict[str, Any], param: str, stream: bool) -> None:
    body = {"prompt": "x", **({"stream": True} if stream and "stream_options" not in fields else {}), **fields}
    response = post(live, COMPLETIONS, body)
    assert response.status_code == 400, response.text
    assert error(response)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": USER, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": USER, "logprobs": 3}, "logprobs"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens"),
        ({"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": USER, "max_completion_tokens": 10**7}, "max_tokens"),
        ({"messages": USER, "tools": [{"type": "function"}]}, "tools"),
    ],
)
def test_wrong_fields_of_chat(live: Live, fields: dict[str, Any], param: str) -> None:
    response = post(live, CHAT, fields)
    assert response.status_code == 400, response.text
    assert error(response)["param"] == param


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "x"', "not valid JSON"),
        (b'{"prompt": "x",}', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "JSON"),
        (b"[]", "array"),
        (b"null", "null"),
        (b"{}", "prompt"),
        (b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}", ""),
        (b'{"prompt":"x","y":' + b"[" * 100_000 + b"]" * 100_000 + b"}", ""),
    ],
)
def test_broken_bodies(live: Live, body: bytes, part: str) -> None:
    response = post(live, COMPLETIONS, body)
    assert response.status_code == 400, response.text
    assert part in error(response)["message"]


def test_content_types(live: Live) -> None:
    body = b'{"prompt": "x", "max_tokens": 1}'
    assert post(live, COMPLETIONS, body, **{"content-type": "text/plain"}).status_code == 415
    assert post(live, COMPLETIONS, body, **{"content-type": "Application/JSON; charset=utf-8"}).status_code == 200


def test_nulls_and_unknown_fields_are_fine(live: Live) -> None:
    fields = "model max_tokens temperature top_p n stop logprobs stream stream_options seed logit_bias best_of user"
    body = {"prompt": "x", **dict.fromkeys(fields.split()), "frobnicate": {"a": [1]}, "ignore_eos": None}
    assert post(live, COMPLETIONS, body).status_code == 200
    assert post(live, CHAT, {**body, "messages": USER, "tools": [], "tool_choice": "auto"}).status_code == 200


@pytest.mark.parametrize("top_k", [4032, 2**64, 10**30])
def test_a_top_k_beyond_the_vocabulary_is_all_of_it(live: Live, top_k: int) -> None:
    assert post(live, COMPLETIONS, {"prompt": "x", "top_k": top_k}).status_code == 200
    assert live.client.requests[-1].sampling.top_k == 4032


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_other_servers_can_do_is_refused_not_ignored(live: Live, name: str) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": USER})):
        response = post(live, path, {**body, name: 1})
        assert response.status_code == 400 and error(response)["param"] == name
        assert error(response)["message"].startswith(f"{name} is not supported: ")
        for none in (None, False, "", [], {}):
            assert post(live, path, {**body, "max_tokens": 1, name: none}).status_code == 200


def test_too_long_prompts_say_so_in_words_that_clients_look_for() -> None:
    with live_server(FakeClient(capacity_tokens=100)) as live:
        response = post(live, COMPLETIONS, {"prompt": [5] * 100})
        message = error(response)["message"]
        assert response.status_code == 400 and error(response)["code"] == "context_length_exceeded"
        assert "This model's maximum context length is 100 tokens." in message
        assert "is longer than the model's context length (100 tokens)." in message
        response = post(live, COMPLETIONS, {"prompt": [5] * 90, "max_tokens": 11})
        assert error(response)["code"] == "context_length_exceeded"
        assert "exceeds the model's maximum context length of 100 tokens" in error(response)["message"]
        assert post(live, COMPLETIONS, {"prompt": [5] * 90, "max_tokens": 10}).status_code == 200
        assert post(live, COMPLETIONS, {"prompt": [5] * 90}).json()["usage"]["completion_tokens"] == 10
        assert post(live, COMPLETIONS, {"prompt": [5] * 100, "max_tokens": 0}).status_code == 200
        assert error(post(live, COMPLETIONS, {"prompt": [5] * 101, "max_tokens": 0}))["param"] == "prompt"


def test_paths_and_methods(live: Live) -> None:
    assert error(HTTP.get(live.url + "/nope"))["type"] == "not_found_error"
    assert HTTP.get(live.url + COMPLETIONS).status_code == 405
    assert error(HTTP.get(live.url + COMPLETIONS))["message"].startswith("Method Not Allowed")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    "prompt messages model max_tokens max_completion_tokens min_tokens temperature top_p top_k min_p seed n stop "
    "stop_token_ids ignore_eos presence_penalty repetition_penalty logit_bias logprobs top_logprobs echo best_of "
    "stream stream_options response_format json_schema regex ebnf structured_outputs rid user tools tool_choice "
    "chat_template_kwargs continue_final_message "
    "input encoding_format dimensions "
    "text input_ids sampling_params return_logprob logprob_start_len top_logprobs_num"
).split()


@given(
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    st.sampled_from([COMPLETIONS, CHAT, EMBEDDINGS, GENERATE]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_makes_a_server_error(live: Live, fields: dict[str, Any], path: str) -> None:
    body = {"prompt": "x", "messages": USER, "input": "x", "text": "x", "max_tokens": 1, **fields}
    response = post(live, path, body)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error(response)
