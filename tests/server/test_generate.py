"""`/generate` answers in SGLang's words: its load test, and evaluation harnesses, read these fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from scheduler.request import GenerateRequest
from server.arguments import DEFAULT_MODEL
from server.tokenizer import Tokenizer
from tests.server.fake_client import FakeClient, echo_token
from tests.server.live import Live, live_server

TOKENIZER = Tokenizer(DEFAULT_MODEL)
IDS = TOKENIZER.encode("a b c")


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx.Client]:
    with live.http() as client:
        yield client


def answer(http: httpx.Client, **body: Any) -> Any:
    response = http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    lines = [line for line in http.post("/generate", json={**body, "stream": True}).text.splitlines() if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_an_answer(http: httpx.Client) -> None:
    found = answer(http, text="a b c", sampling_params={"max_new_tokens": 4}, rid="mine")
    assert found == {
        "text": "a b ca",
        "output_ids": [*IDS, IDS[0]],
        "meta_info": {
            "id": "mine",
            "finish_reason": {"type": "length", "length": 4},
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "cached_tokens": 2,
        },
    }


def test_ids_and_defaults(http: httpx.Client, live: Live) -> None:
    assert answer(http, input_ids=IDS)["meta_info"]["completion_tokens"] == 128
    assert live.client.requests[-1].prompt == IDS


def test_parameters_by_sglangs_names(http: httpx.Client, live: Live) -> None:
    params = {"max_new_tokens": 9, "min_new_tokens": 2, "sampling_seed": 7, "temperature": 0, "ignore_eos": True}
    answer(http, text="x", sampling_params={**params, "regex": "", "stop_token_ids": [5]})
    request = live.client.requests[-1]
    assert (request.max_tokens, request.min_tokens, request.stop_token_ids) == (9, 2, {5})
    assert (request.sampling.seed, request.sampling.temperature, request.sampling.grammar) == (7, 0, None)


def test_stops(http: httpx.Client) -> None:
    params = {"max_new_tokens": 9, "stop": " b"}
    found = answer(http, text="a b c", sampling_params=params)
    assert found["text"] == "a" and found["meta_info"]["finish_reason"] == {"type": "stop", "matched": " b"}
    assert answer(http, text="a b c", sampling_params={**params, "no_stop_trim": True})["text"] == "a b"
    found = answer(http, text="a b c", sampling_params={"stop_token_ids": IDS[1:2]})
    assert found["meta_info"]["finish_reason"] == {"type": "stop", "matched": IDS[1]}
    assert found["output_ids"] == IDS[:2] and found["meta_info"]["completion_tokens"] == 2
    found = answer(http, text="a b c", sampling_params={"stop_token_ids": IDS[1:2]}, return_logprob=True)
    assert [token for _, token, _ in found["meta_info"]["output_token_logprobs"]] == IDS[:2]


def test_every_event_tells_all_so_far(http: httpx.Client) -> None:
    found = events(http, text="a b c", sampling_params={"max_new_tokens": 3})
    assert [event["text"] for event in found] == ["a", "a b", "a b c"]
    assert [event["output_ids"] for event in found] == [IDS[:1], IDS[:2], IDS]
    assert [event["meta_info"]["completion_tokens"] for event in found] == [1, 2, 3]
    assert [event["meta_info"]["finish_reason"] for event in found[:-1]] == [None, None]
    assert "index" not in found[0]


def test_many_prompts_and_choices(http: httpx.Client) -> None:
    body = {"text": ["a b c", "d"], "sampling_params": {"max_new_tokens": 1, "n": 2}}
    assert [each["text"] for each in answer(http, **body)] == ["a", "a", "d", "d"]
    assert {event["index"]: event["text"] for event in events(http, **body)} == {0: "a", 1: "a", 2: "d", 3: "d"}


def test_logprobs(http: httpx.Client) -> None:
    """The fake scheduler's token n of a prompt has the log-probability -n, a generated one -0.5."""
    body: dict[str, Any] = {"input_ids": IDS, "sampling_params": {"max_new_tokens": 1}, "return_logprob": True}
    meta = answer(http, **body)["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, IDS[0], None]] and meta["output_top_logprobs"] == [None]
    assert "input_token_logprobs" not in meta
    meta = answer(http, **body, logprob_start_len=0, top_logprobs_num=2, return_text_in_logprobs=True)["meta_info"]
    assert meta["input_token_logprobs"] == [[None, IDS[0], "a"], [-1, IDS[1], " b"], [-2, IDS[2], " c"]]
    assert [top and [pair[:2] for pair in top] for top in meta["input_top_logprobs"]] == [
        None,
        [[-1, IDS[1]], [-2, IDS[1] + 1]],
        [[-2, IDS[2]], [-3, IDS[2] + 1]],
    ]
    assert len(meta["output_top_logprobs"][0]) == 2
    assert answer(http, **body, logprob_start_len=1)["meta_info"]["input_token_logprobs"] == [
        [None, IDS[1], None],
        [-2, IDS[2], None],
    ]
    assert answer(http, **body, logprob_start_len=9)["meta_info"]["input_token_logprobs"] == []


def test_logprobs_of_the_prompt_alone(http: httpx.Client) -> None:
    params = {"sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
    found = answer(http, input_ids=IDS, **params)
    assert (found["text"], found["output_ids"], found["meta_info"]["output_token_logprobs"]) == ("", [], [])
    assert found["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert [logprob for logprob, *_ in found["meta_info"]["input_token_logprobs"]] == [None, -1, -2]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "x", "input_ids": [5]}, "text"),
        ({"text": ""}, "text"),
        ({"input_ids": [4032]}, "input_ids"),
        ({"input_ids": [[1], "x"]}, "input_ids"),
        ({"text": "x", "sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
        ({"text": "x", "sampling_params": {"max_new_tokens": 10**9}}, "sampling_params.max_new_tokens"),
        (
            {"text": "x", "sampling_params": {"max_new_tokens": 1, "min_new_tokens": 2}},
            "sampling_params.min_new_tokens",
        ),
        ({"text": "x", "sampling_params": {"stop_token_ids": [9999]}}, "sampling_params.stop_token_ids"),
        ({"text": "x", "sampling_params": {"regex": "(["}}, "sampling_params.regex"),
        ({"text": "x", "sampling_params": [{}]}, "sampling_params"),
        ({"text": "x", "top_logprobs_num": 21}, "top_logprobs_num"),
    ],
)
def test_errors_name_the_field_as_it_was_given(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = http.post("/generate", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert "max_tokens" not in error["message"] and "min_tokens" not in error["message"]


def test_an_aborted_request() -> None:
    def next_token(request: GenerateRequest, position: int) -> int:
        if position == 2:
            client.abort(request.request_id)
        return echo_token(request, position)

    client = FakeClient(next_token=next_token)
    with live_server(client) as live, live.http() as http:
        meta = answer(http, text="a b c", sampling_params={"max_new_tokens": 9})["meta_info"]
        assert meta["finish_reason"] == {"type": "abort", "message": "The request was aborted."}
        assert meta["completion_tokens"] == 2
