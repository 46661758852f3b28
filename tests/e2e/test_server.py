"""The real server, as a user starts it: HTTP, controller, worker processes, and every way in which it may end."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from benchmarks.launched import LaunchedServer
from tests.checkpoints import make_checkpoint, oracle_greedy

PROMPT = [7 * i % 500 for i in range(1, 90)]
FLAGS = ("--sp-size", "2", "--page-size", "16", "--max-total-tokens", "8192", "--dtype", "float32")
SLOW = ("--load-format", "dummy", "--sp-size", "2", "--max-total-tokens", "128K", "--chunked-prefill-size", "1024")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama3")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LaunchedServer]:
    with LaunchedServer("--model-path", str(model), "--sp-threshold", "32", *FLAGS) as launched:
        yield launched


@pytest.fixture(scope="module")
def client(server: LaunchedServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def metric(server: LaunchedServer, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=10).text
    found = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.split("{")[0] == name]
    assert found, f"there is no {name}"
    return sum(found)


def wait_until(condition: object, seconds: float) -> float:
    """Seconds it took; fails if it takes longer."""
    assert callable(condition)
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it took too long"
        time.sleep(0.02)
    return time.monotonic() - began


def test_completion_equals_transformers(model: Path, client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="default", prompt=[PROMPT], max_tokens=12, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
    )
    again = client.completions.create(model="", prompt=PROMPT, max_tokens=12, temperature=0, seed=1)
    assert answer.usage is not None and again.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 12)
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == (len(PROMPT) - 1) // 16 * 16
    decoded = httpx.post(
        f"{str(client.base_url).removesuffix('/v1/')}/detokenize",
        json={"tokens": oracle_greedy(model, PROMPT, 12), "skip_special_tokens": True},
        timeout=10,
    ).json()
    assert answer.choices[0].text == decoded.get("text", decoded.get("prompt"))


def test_streamed_chat_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "The keys and values travel around a ring. " * 8}],
            max_completion_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 9


def test_many_at_once_each_get_their_own_answer(model: Path, client: openai.OpenAI) -> None:
    prompts = [PROMPT[: 5 * i + 1] for i in range(12)]
    texts: dict[int, str] = {}

    def complete(i: int) -> None:
        made = client.completions.create(
            model="default", prompt=prompts[i], max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
        )
        texts[i] = made.choices[0].text

    threads = [threading.Thread(target=complete, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    together = client.completions.create(
        model="default", prompt=prompts, max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
    )
    assert [texts[i] for i in range(len(prompts))] == [choice.text for choice in together.choices]


def test_structured_output_while_others_run_freely(model: Path, client: openai.OpenAI) -> None:
    """The longer prompt is shared: the rank that draws changes with every page of 16 tokens."""
    digits = {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 20, "maxItems": 20}
    wanted: dict[str, Any] = {"structured_outputs": {"json": digits}}
    with ThreadPoolExecutor(1) as pool:
        free = pool.submit(test_completion_equals_transformers, model, client)
        for prompt in (PROMPT, PROMPT[:10]):
            answer = client.completions.create(
                model="default", prompt=prompt, max_tokens=700, n=2, temperature=1, seed=3, extra_body=wanted
            )
            for choice in answer.choices:
                assert choice.finish_reason == "stop"
                values = json.loads(choice.text)
                assert len(values) == 20 and set(values) <= {1, 22, 333}
        free.result(60)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [1, 509]}, 400, "prompt"),
        ({"prompt": [1] * 9000}, 400, "prompt"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature"),
        ({"prompt": "x", "max_tokens": "many"}, 400, "max_tokens"),
        ({"max_tokens": 3}, 400, "prompt"),
        ({"prompt": "x", "model": "gpt-9"}, 404, "model"),
    ],
)
def test_bad_requests_are_refused_and_nothing_else_is_disturbed(
    server: LaunchedServer, client: openai.OpenAI, body: dict[str, object], status: int, param: str
) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param
    assert client.completions.create(model="default", prompt=PROMPT, max_tokens=1).choices


def test_sharding_is_real(server: LaunchedServer) -> None:
    """Counted by the ranks themselves while one long request runs."""
    httpx.post(
        f"{server.url}/v1/completions", json={"prompt": [3] * 4000, "max_tokens": 1}, timeout=60
    ).raise_for_status()
    text = httpx.get(f"{server.url}/metrics", timeout=10).text
    pairs = [
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("sp:rank_query_key_pairs_total")
    ]
    assert len(pairs) == 2 and min(pairs) >= 0.45 * sum(pairs)


def test_a_client_that_leaves_during_prefill_frees_its_pages() -> None:
    with LaunchedServer(*SLOW) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={"prompt": [5] * 60000}, timeout=httpx.Timeout(2.0))
        wait_until(lambda: metric(server, "sp:num_aborted_requests_total") == 1, 10)
        wait_until(lambda: metric(server, "sp:pages_used") == 0, 10)
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "def f", "max_tokens": 2}, timeout=30)
        assert answer.status_code == 200
        assert metric(server, "sp:num_running_reqs") == 0


def test_a_dead_worker_fails_every_request_and_ends_the_server() -> None:
    with LaunchedServer(*SLOW) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        seen: list[httpx.Response] = []

        def ask() -> None:
            seen.append(httpx.post(f"{server.url}/v1/completions", json={"prompt": [5] * 60000}, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: metric(server, "sp:pages_used") > 0, 20)
        worker = next(child for child in children if "sp_backend.worker" in " ".join(child.cmdline()))
        began = time.monotonic()
        worker.kill()
        assert server.process.wait(10) not in (0, None)
        assert time.monotonic() - began < 10
        asking.join(10)
        assert seen[0].status_code >= 500 and "worker" in seen[0].json()["error"]["message"]
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_leave_no_process(model: Path, number: signal.Signals) -> None:
    with LaunchedServer("--model-path", str(model), *FLAGS) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert len(children) >= 2
        chunks: list[str] = []

        def stream() -> None:
            body = {"prompt": PROMPT, "max_tokens": 150, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
                chunks.extend(line for line in response.iter_lines() if line)

        streaming = threading.Thread(target=stream)
        streaming.start()
        wait_until(lambda: metric(server, "sp:num_running_reqs") > 0, 20)
        ended = server.stop(number)
        streaming.join(20)
        if number is signal.SIGTERM:  # what runs is finished first
            assert chunks[-1] == "data: [DONE]" and '"length"' in chunks[-2]
        assert ended == 0
        psutil.wait_procs(children, timeout=5)
        assert not [child for child in children if child.is_running()]


def test_bad_launches_are_one_line(model: Path, tmp_path: Path, server: LaunchedServer) -> None:
    def refused(*args: str) -> str:
        with pytest.raises(RuntimeError) as caught, LaunchedServer(*args):
            pass
        text = str(caught.value).split("\n", 1)[1]
        assert "Traceback" not in text
        return text

    weights = (model / "model.safetensors").read_bytes()
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors" in refused("--model-path", str(tmp_path), *FLAGS)
    assert "--sp-size" in refused("--model-path", str(model), "--sp-size", "64")
    assert "--sp-layout" in refused("--model-path", str(model), "--sp-layout", "heads", "--sp-strategy", "token_ring")
    assert "port" in refused("--model-path", str(model), "--port", str(server.port)).lower()
