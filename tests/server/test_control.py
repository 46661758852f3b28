"""Probes, metrics and the routes of operators and load tools."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import httpx
import pytest

from server.service import Phase
from server.version import VERSION
from tests.server.fake_client import FakeClient
from tests.server.live import Live, live_server


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx.Client]:
    with live.http() as client:
        yield client


@pytest.mark.parametrize("path", ["/health", "/health/", "/ready", "/ping", "/live", "/health_generate"])
def test_probes(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 200


def test_probes_tell_why_not() -> None:
    with live_server() as live, live.http() as http:
        for phase in (Phase.STARTING, Phase.DRAINING, Phase.FAILED):
            live.service.phase = phase
            for path in ("/health", "/ready", "/ping", "/health_generate"):
                response = http.get(path)
                assert (response.status_code, response.json()) == (503, {"status": phase.value})
            assert http.get("/live").status_code == 200
        for phase in (Phase.DRAINING, Phase.FAILED):
            live.service.phase = phase
            response = http.post("/v1/completions", json={"prompt": "x"})
            assert response.status_code == 503 and response.headers["retry-after"]
        live.service.phase = Phase.READY
        live.client.unhealthy = "rank 1 was killed by signal 9"
        assert http.get("/health").json() == {"status": "rank 1 was killed by signal 9"}


def test_health_does_not_wait_for_a_prefill() -> None:
    with live_server(FakeClient(prefill_seconds=60)) as live, live.http() as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json={"prompt": "x"}, timeout=0.2)
        assert http.get("/health", timeout=1).status_code == 200


def samples(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^(sp:\S+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}


def test_metrics() -> None:
    with live_server(FakeClient(token_seconds=0.002)) as live, live.http() as http:
        http.post("/v1/completions", json={"prompt": "a b c", "max_tokens": 5})
        assert http.head("/metrics").status_code == 200
        response = http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        found = samples(response.text)
        label = 'model_name="default"'
        assert found[f"sp:time_to_first_token_seconds_count{{{label}}}"] == 1
        assert found[f"sp:inter_token_latency_seconds_count{{{label}}}"] == 4
        assert found[f"sp:inter_token_latency_seconds_sum{{{label}}}"] >= 0.008
        assert found[f"sp:e2e_request_latency_seconds_count{{{label}}}"] == 1
        assert f'sp:time_to_first_token_seconds_bucket{{le="1800.0",{label}}}' in found
        assert found[f'sp:num_requests_total{{finish_reason="length",{label}}}'] == 1
        assert found[f"sp:num_aborted_requests_total{{{label}}}"] == 0
        for name in "num_running_reqs num_queue_reqs prompt_tokens_total generation_tokens_total".split():
            assert f"sp:{name}{{{label}}}" in found
        for name in "cached_tokens_total num_retractions_total pages_used max_request_tokens".split():
            assert f"sp:{name}{{{label}}}" in found
        assert found[f"sp:token_usage{{{label}}}"] == pytest.approx(7 / 200)
        rank = f'{label},rank="1",sp_rank="1",tp_rank="0"'
        assert found[f"sp:rank_pages_used{{{rank}}}"] == 4
        assert found[f"sp:rank_pages_cached{{{rank}}}"] == 1
        assert found[f"sp:rank_pages_total{{{rank}}}"] == 100
        assert found[f"sp:rank_num_steps_total{{{rank}}}"] == 7
        assert found[f"sp:rank_query_key_pairs_total{{{rank}}}"] == 1000
        assert found[f"sp:rank_bytes_sent_total{{{rank}}}"] == 64
        assert found[f"sp:rank_wait_seconds_total{{{rank}}}"] == 0.25
        assert found[f"sp:rank_busy_seconds_total{{{rank}}}"] == 1.5
        assert found[f"sp:rank_idle_seconds_total{{{rank}}}"] == 0.125
        plan = f'{label},plan="ring_pass_q"'
        assert found[f"sp:plan_num_steps_total{{{plan}}}"] == 2
        assert found[f"sp:plan_predicted_seconds_total{{{plan}}}"] == 1.0
        assert found[f"sp:plan_measured_seconds_total{{{plan}}}"] == 1.25
        assert found[f"sp:last_choice_predicted_seconds{{{plan}}}"] == 0.5
        assert found[f"sp:last_choice_measured_seconds{{{plan}}}"] == 0.625
        path = 'path="/v1/completions",status="200"'
        assert found[f"sp:http_responses_total{{{label},{path}}}"] == 1
        http.get("/no/such/path/1")
        assert "/no/such/path" not in http.get("/metrics").text


def test_latency_of_tokens_that_come_together() -> None:
    with live_server(FakeClient(token_seconds=0.05, tokens_per_output=5)) as live, live.http() as http:
        http.post("/v1/completions", json={"prompt": "a", "max_tokens": 15})
        found = samples(http.get("/metrics").text)
        assert found['sp:inter_token_latency_seconds_count{model_name="default"}'] == 10
        whole = found['sp:e2e_request_latency_seconds_sum{model_name="default"}']
        assert 0.1 <= found['sp:inter_token_latency_seconds_sum{model_name="default"}'] < whole


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info(http: httpx.Client, path: str) -> None:
    info = http.get(path).json()
    assert info["sp_size"] == 1 and info["stats"]["per_rank"][1]["sp_rank"] == 1 and info["status"] == "ready"
    assert "api_key" not in info


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(http: httpx.Client, path: str) -> None:
    info = http.get(path).json()
    assert info["is_generation"] is True and info["vocab_size"] == 4032
    assert info["model_path"] == info["tokenizer_path"]


def test_version(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": VERSION}


def test_tokenize_and_back(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "def caf\u00e9"}).json()
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 131072
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json()["text"] == "def caf\u00e9"
    many = http.post("/v1/tokenize", json={"prompt": ["a", "b c"]}).json()
    assert many["count"] == [len(ids) for ids in many["tokens"]] and len(many["tokens"]) == 2
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    text = http.post("/detokenize", json={"tokens": chat["tokens"], "skip_special_tokens": False}).json()["text"]
    assert text == "<|user|>\nhi<|end|>\n<|assistant|>\n"
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [5000]}).json()["error"]["param"] == "tokens"


def test_what_a_remote_tokenizer_asks_for(http: httpx.Client) -> None:
    """lm-evaluation-harness uses a server's tokenizer if it tells its end-of-sequence token."""
    info = http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<|endoftext|>", "<|end|>", "<|pad|>")
    assert info["chat_template"].startswith("{%- for message in messages %}")
    ids = http.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": ids, "skip_special_tokens": False}).json()["prompt"] == "<|end|>"


@pytest.mark.parametrize("path", ["/flush_cache", "/reset_prefix_cache"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_flush_cache(live: Live, http: httpx.Client, path: str, method: str) -> None:
    before = live.client.flushed
    assert http.request(method, path).status_code == 200
    assert live.client.flushed == before + 1


def test_request_ids(http: httpx.Client) -> None:
    assert http.get("/live", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert len(http.get("/live").headers["x-request-id"]) == 32
    response = http.get("/live", headers={"X-Request-Id": "a\tb" + "c" * 300})
    assert len(response.headers["x-request-id"]) == 32


def test_a_request_writes_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.access")
    with live_server(FakeClient(), "--log-requests") as live, live.http() as http:
        http.get("/live%0AINFO forged")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "server.access"]
    assert line.startswith("GET /live%0AINFO%20forged 404 ") and "\n" not in line


def test_cross_origin_requests() -> None:
    with live_server(FakeClient(), "--api-key", "secret") as live, live.http() as http:
        preflight = {"origin": "http://x", "access-control-request-method": "POST"}
        preflight["access-control-request-headers"] = "authorization,content-type"
        response = http.options("/v1/completions", headers=preflight)
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "*"
        assert http.options("/v1/completions").status_code == 401  # not a preflight
        refused = http.post("/v1/completions", json={"prompt": "x"}, headers={"origin": "http://x"})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "*"


def test_what_needs_the_key() -> None:
    with live_server(FakeClient(), "--api-key", "secret") as live, live.http() as http:
        for path in ("/health", "/health/", "/ready", "/ping", "/live", "/metrics"):
            assert http.get(path).status_code == 200, path
        for path in "/v1/models /server_info /model_info /docs /openapi.json /healthy /metrics/x /v1/health".split():
            assert http.get(path).status_code == 401, path
        for key in ("Bearer wrong", "Bearer", "secret", "Bearer secret\xe9"):
            response = http.get("/v1/models", headers={"Authorization": key.encode("latin-1")})
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_openapi_describes_the_bodies(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    schema = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
    assert {"prompt", "max_tokens", "stop", "stream"} <= set(fields)
    assert "ChatRequest" in document["components"]["schemas"] and "Message" in document["components"]["schemas"]
    assert http.get("/docs").status_code == 200


def test_body_size_limit(live: Live, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.requests.MAX_BODY", 1000)
    assert http.post("/v1/completions", json={"prompt": "x" * 2000}).status_code == 413
