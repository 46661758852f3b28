"""A client that leaves frees its request, streaming or not, in prefill or later. Failures reach the client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from scheduler.request import Draining, GenerateRequest, QueueFull, RequestTooLong, Unavailable
from tests.server.fake_client import FakeClient
from tests.server.live import Live, live_server

LONG = {"prompt": "a b c", "max_tokens": 5000}


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def idle(client: FakeClient, num_requests: int) -> bool:
    return len(client.requests) == len(client.aborted) == num_requests and not client.running


async def leave(live: Live, body: dict[str, Any], num_running: int) -> None:
    """Goes away as soon as the completions run."""
    async with httpx.AsyncClient(base_url=live.url, timeout=60) as http:
        request = asyncio.create_task(http.post("/v1/completions", json=body))
        while len(live.client.running) < num_running:
            await asyncio.sleep(0.01)
        request.cancel()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_leaving_during_prefill(stream: bool, n: int) -> None:
    with live_server(FakeClient(prefill_seconds=60)) as live:
        asyncio.run(leave(live, {**LONG, "stream": stream, "n": n}, n))
        eventually(lambda: idle(live.client, n))
        assert b'sp:num_aborted_requests_total{model_name="default"} %d' % n in live.service.metrics.text()


def test_leaving_while_the_answer_is_generated() -> None:
    with live_server(FakeClient(token_seconds=0.01)) as live:
        asyncio.run(leave(live, LONG, 1))
        eventually(lambda: idle(live.client, 1))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_leaving_a_stream(path: str) -> None:
    body = {"prompt": "a b c", "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True, "stream": True}
    with live_server(FakeClient(token_seconds=0.01)) as live, live.http() as http:
        with http.stream("POST", path, json={**body, "max_tokens": 5000, "n": 2}) as response:
            assert next(response.iter_lines()).startswith("data: ")
        eventually(lambda: idle(live.client, 2))


def test_many_leave_and_the_next_is_served() -> None:
    async def storm(live: Live) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=live.url, timeout=0.5, limits=limits) as http:
            calls = [http.post("/v1/completions", json=LONG) for _ in range(200)]
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, httpx.TimeoutException) for result in results)

    with live_server(FakeClient(prefill_seconds=60)) as live, live.http() as http:
        asyncio.run(storm(live))
        eventually(lambda: not live.client.running)
        live.client.prefill_seconds = 0
        assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (QueueFull("The request queue is full."), 429, "queue_full"),
        (Draining("draining"), 503, "service_unavailable"),
        (Unavailable("rank 1 failed"), 503, "service_unavailable"),
        (RequestTooLong(200, 100, "too long"), 400, "context_length_exceeded"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_have_their_status(refusal: Exception, status: int, code: str, stream: bool) -> None:
    with live_server(FakeClient(refusal=refusal)) as live, live.http() as http:
        response = http.post("/v1/completions", json={"prompt": "x", "stream": stream, "n": 2})
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert ("retry-after" in response.headers) == (status in (429, 503))


def test_queue_full_status_can_be_chosen() -> None:
    with live_server(FakeClient(refusal=QueueFull("full")), "--queue-full-status", "503") as live, live.http() as http:
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 503


def test_failure_before_the_first_token() -> None:
    with live_server(FakeClient(fail_after=0)) as live, live.http() as http:
        for stream in (False, True):
            response = http.post("/v1/completions", json={"prompt": "x", "stream": stream})
            assert response.status_code == 500
            assert response.json()["error"]["message"] == "rank 1 failed: out of memory"
            assert response.headers["x-should-retry"] == "false"


def test_failure_in_mid_stream_is_an_event() -> None:
    with live_server(FakeClient(fail_after=3)) as live, live.http() as http:
        response = http.post("/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 9})
        assert response.status_code == 200
        *chunks, last, done, end = response.text.split("\n\n")
        assert len(chunks) == 3 and (done, end) == ("data: [DONE]", "")
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "rank 1 failed: out of memory"
        assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 9}).status_code == 500


def test_one_failed_choice_ends_the_others() -> None:
    def fail_second(request: GenerateRequest, position: int) -> int:
        if request.request_id.endswith("-1"):
            raise RuntimeError("bug in the fake")
        return 50

    with live_server(FakeClient(next_token=fail_second, token_seconds=0.005)) as live, live.http() as http:
        assert http.post("/v1/completions", json={**LONG, "n": 2}).status_code == 500
        eventually(lambda: not live.client.running)


def test_stream_bytes_are_what_strict_parsers_expect() -> None:
    with live_server(FakeClient(token_seconds=0.001)) as live, live.http() as http:
        body = {"messages": [{"role": "user", "content": "a b"}], "stream": True, "max_tokens": 4, "ignore_eos": True}
        response = http.post("/v1/chat/completions", json=body)
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all(event.startswith("data: {") and "\n" not in event for event in events[:-2])
        assert all(len(json.loads(event[6:])["choices"]) == 1 for event in events[:-2])


def test_keepalive_comments_only_on_demand() -> None:
    slow = FakeClient(prefill_seconds=0.35)
    with live_server(slow, "--sse-keepalive-interval", "0.1") as live, live.http() as http:
        text = http.post("/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 2}).text
        assert text.startswith(": keep-alive\n\n: keep-alive\n\n") and text.endswith("data: [DONE]\n\n")
        live.client.refusal = QueueFull("full")
        assert http.post("/v1/completions", json={"prompt": "x", "stream": True}).status_code == 429


def test_abort_by_operator() -> None:
    async def run(live: Live) -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=20) as http:
            body = {**LONG, "rid": "mine"}
            request = asyncio.create_task(http.post("/v1/completions", json=body))
            while not live.client.running:
                await asyncio.sleep(0.01)
            duplicate = await http.post("/v1/completions", json=body)
            assert duplicate.status_code == 400 and "Duplicate request ID" in duplicate.text
            assert (await http.post("/abort_request", json={"rid": "other"})).json() == {"aborted": 0}
            assert (await http.post("/abort_request", json={"rid": "mine"})).json() == {"aborted": 1}
            assert (await request).json()["choices"][0]["finish_reason"] == "abort"
            again = asyncio.create_task(http.post("/v1/completions", json={**body, "n": 2}))
            while not live.client.running:
                await asyncio.sleep(0.01)
            assert (await http.post("/abort_request", json={"abort_all": True})).json() == {"aborted": 2}
            assert [choice["finish_reason"] for choice in (await again).json()["choices"]] == ["abort", "abort"]
            assert (await http.post("/abort_request", json={})).status_code == 400

    with live_server(FakeClient(token_seconds=0.01)) as live:
        asyncio.run(run(live))


def test_a_bug_in_mid_stream_is_an_event_too() -> None:
    def break_at_three(request: GenerateRequest, position: int) -> int:
        if position == 3:
            raise RuntimeError("secret detail")
        return 50

    with live_server(FakeClient(next_token=break_at_three)) as live, live.http() as http:
        text = http.post("/v1/completions", json={**LONG, "stream": True}).text
        *_, last, done, _ = text.split("\n\n")
        assert json.loads(last[6:])["error"]["message"].startswith("Internal server error")
        assert done == "data: [DONE]" and "secret detail" not in text
        assert http.post("/v1/completions", json=LONG).json()["error"]["type"] == "server_error"
