"""X-SP-Explain: an answer that tells which plan each of its steps ran, and why."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.server.live import Live

ASKED = {"X-SP-Explain": "1"}
PROMPT = list(range(100, 150))
COMPLETION = {"prompt": PROMPT, "max_tokens": 4}
STEPS = [
    {
        "kind": "prefill",
        "plan": "ring_pass_q",
        "reason": "as this test says",
        "num_new": 50,
        "num_cached": 0,
        "batch_tokens": 50,
        "predicted_seconds": 0.5,
        "measured_seconds": 0.25,
        "num_steps": 1,
    },
    {
        "kind": "decode",
        "plan": "decode",
        "reason": "few tokens",
        "num_new": 3,
        "num_cached": 51,
        "batch_tokens": 3,
        "predicted_seconds": None,
        "measured_seconds": 0.375,
        "num_steps": 3,
    },
]


@pytest.fixture
def http(live: Live) -> httpx.Client:
    return live.http()


def test_an_answer_tells_its_steps_decode_steps_as_one(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json=COMPLETION, headers=ASKED).json()
    assert answer["sp_explain"] == [{"index": 0, "steps": STEPS}]


def test_every_choice_tells_its_own(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "n": 2}
    answer = http.post("/v1/chat/completions", json=body, headers=ASKED).json()
    assert [part["index"] for part in answer["sp_explain"]] == [0, 1]
    assert all(len(part["steps"]) == 2 for part in answer["sp_explain"])


def test_a_stream_tells_them_with_the_last_piece(http: httpx.Client) -> None:
    text = http.post("/v1/completions", json={**COMPLETION, "stream": True}, headers=ASKED).text
    chunks: list[dict[str, Any]] = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    *earlier, last = chunks
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["sp_explain"] == [{"index": 0, "steps": STEPS}]
    assert not any("sp_explain" in chunk for chunk in earlier)


@pytest.mark.parametrize("headers", [{}, {"X-SP-Explain": "0"}, {"X-SP-Explain": "false"}])
def test_nobody_else_is_told(http: httpx.Client, headers: dict[str, str]) -> None:
    assert "sp_explain" not in http.post("/v1/completions", json=COMPLETION, headers=headers).json()


def test_the_official_client_can_ask(live: Live) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model="default", prompt=PROMPT, max_tokens=4, extra_headers=ASKED)
    assert answer.model_extra is not None and answer.model_extra["sp_explain"][0]["steps"] == STEPS
