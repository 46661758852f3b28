"""POST /v1/embeddings, and what a server that can only embed says to everybody else."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.arguments import UsageError
from server.config import load
from server.embeddings import appended_eos
from server.tokenizer import Tokenizer
from tests.checkpoints import make_checkpoint
from tests.server.fake_client import FakeClient
from tests.server.live import Live, live_server

SIZE = 256


@pytest.fixture(scope="module")
def full() -> Iterator[Live]:
    with live_server(FakeClient(), "--sp-mask", "full") as server:
        yield server


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=20)


def post(live: Live, path: str = "/v1/embeddings", **fields: Any) -> httpx.Response:
    return httpx.post(live.url + path, json=fields, timeout=20)


def unit(tokens: list[int], size: int = SIZE) -> np.ndarray:
    vector = np.resize(np.array(tokens, np.float64) + 1, SIZE)[:size]
    return vector / np.linalg.norm(vector)


def test_the_official_client(live: Live, client: openai.OpenAI) -> None:
    """It asks for base64 and decodes it."""
    answer = client.embeddings.create(model="default", input=[[3, 1, 4], [1, 5]])
    assert [entry.index for entry in answer.data] == [0, 1]
    for entry, tokens in zip(answer.data, ([3, 1, 4], [1, 5]), strict=True):
        assert np.allclose(entry.embedding, unit(tokens), atol=1e-6)
    assert (answer.object, answer.data[0].object, answer.model) == ("list", "embedding", "default")
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (5, 5)
    assert [(r.max_tokens, r.pooling) for r in live.client.requests[-2:]] == [(0, "last")] * 2


def test_every_kind_of_input(live: Live) -> None:
    text = "def add(a, b):"
    ids = live.service.tokenizer.encode(text)
    for given, count in ((text, 1), ([text, text], 2), (ids, 1), ([ids, ids], 2)):
        data = post(live, input=given).json()["data"]
        assert len(data) == count
        for entry in data:
            assert np.allclose(entry["embedding"], unit(ids), atol=1e-6)


def test_both_encodings_are_the_same_float32(live: Live) -> None:
    plain = post(live, input=[7, 8, 9], encoding_format="float").json()["data"][0]["embedding"]
    coded = post(live, input=[7, 8, 9], encoding_format="base64").json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(coded), "<f4"), np.array(plain, np.float32))


@pytest.mark.parametrize("dimensions", [1, 32, SIZE])
def test_dimensions_are_the_first_ones_brought_to_length_1(live: Live, dimensions: int) -> None:
    vector = post(live, input=[7, 8, 9], dimensions=dimensions).json()["data"][0]["embedding"]
    assert np.allclose(vector, unit([7, 8, 9], dimensions), atol=1e-6)


def test_usage_tells_what_the_prefix_cache_saved(live: Live) -> None:
    usage = post(live, input=[[1] * 9, [2] * 8]).json()["usage"]
    assert usage == {"prompt_tokens": 17, "total_tokens": 17, "prompt_tokens_details": {"cached_tokens": 4}}


def test_the_steps_on_request(live: Live) -> None:
    answer = httpx.post(
        f"{live.url}/v1/embeddings", json={"input": [[1, 2], [3]]}, headers={"X-SP-Explain": "1"}, timeout=20
    ).json()
    assert [(part["index"], part["steps"][0]["plan"]) for part in answer["sp_explain"]] == [
        (0, "ring_pass_q"),
        (1, "ring_pass_q"),
    ]
    assert "sp_explain" not in post(live, input="x").json()


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "input", "missing"),
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "empty"),
        ({"input": [[]]}, "input", "empty"),
        ({"input": ["x", ""]}, "input", "empty"),
        ({"input": None}, "input", "input: "),
        ({"input": 5}, "input", "input: "),
        ({"input": {"text": "x"}}, "input", "input: "),
        ({"input": [1, "x"]}, "input", "input: "),
        ({"input": [-1]}, "input", "out of vocabulary"),
        ({"input": [4032]}, "input", "out of vocabulary (its size is 4032)"),
        ({"input": [[1]] * 2049}, "input", "at most 2048"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format", "hex"),
        ({"input": "x", "dimensions": 0}, "dimensions", ">= 1"),
        ({"input": "x", "dimensions": 257}, "dimensions", "have 256, not 257"),
        ({"input": "x", "dimensions": "8"}, "dimensions", "int"),
    ],
)
def test_a_wrong_field_is_named(live: Live, fields: dict[str, Any], param: str, message: str) -> None:
    answer = post(live, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and message in error["message"]


def test_unknown_fields_are_ignored_and_unknown_models_refused(live: Live) -> None:
    assert post(live, input="x", input_type="query", user="me").status_code == 200
    answer = post(live, input="x", model="gpt-9")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


def test_an_input_that_does_not_fit() -> None:
    with live_server(FakeClient(capacity_tokens=100), "--sp-mask", "full") as full:
        assert post(full, input=[1] * 100).status_code == 200  # no room for an output is needed
        error = post(full, input=[[1], [1] * 101]).json()["error"]
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    assert "one step" in error["message"] and "--max-total-tokens" in error["message"]


def test_a_failed_worker_and_an_overflow_are_errors_of_the_server() -> None:
    with live_server(FakeClient(fail_after=0)) as live:
        answer = post(live, input=[[1], [2]])
        assert answer.status_code == 500 and "out of memory" in answer.json()["error"]["message"]
    with live_server(FakeClient(embedding_scale=float("inf"))) as live:
        answer = post(live, input="x")
        assert answer.status_code == 500 and "--dtype" in answer.json()["error"]["message"]


def test_a_client_that_leaves_aborts_all_inputs() -> None:
    with live_server(FakeClient(prefill_seconds=30)) as live:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.url}/v1/embeddings", json={"input": ["a", "b", "c"]}, timeout=0.3)
        deadline = time.monotonic() + 5
        while len(live.client.aborted) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_abort_by_name() -> None:
    with live_server(FakeClient(prefill_seconds=30)) as live:
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(post(live, input=["a", "b"], rid="mine")))
        asking.start()
        while len(live.client.running) < 2:
            time.sleep(0.01)
        assert post(live, input="x", rid="mine").status_code == 400
        assert httpx.post(f"{live.url}/abort_request", json={"rid": "mine"}, timeout=20).json() == {"aborted": 2}
        asking.join(10)
        assert answers[0].status_code == 499 and answers[0].json()["error"]["code"] == "aborted"
        lines = httpx.get(f"{live.url}/metrics", timeout=20).text.splitlines()
        ended = [line for line in lines if line.startswith("sp:num_requests_total{")]
        assert ended == ['sp:num_requests_total{finish_reason="abort",model_name="default"} 2.0'], "counted once each"


def test_metrics_count_embeddings(live: Live) -> None:
    def finished() -> float:
        families = text_string_to_metric_families(httpx.get(f"{live.url}/metrics", timeout=20).text)
        samples = [sample for family in families for sample in family.samples]
        return sum(
            s.value for s in samples if s.name == "sp:num_requests_total" and s.labels["finish_reason"] == "stop"
        )

    before = finished()
    post(live, input=["a", "b"])
    assert finished() == before + 2


# Servers that only embed


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_generation_under_a_full_mask_is_refused(full: Live, path: str, fields: dict[str, Any]) -> None:
    answer = post(full, path, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "model", "generation_not_supported")
    assert "no next token" in error["message"]
    assert "/v1/embeddings" in error["message"] and "--sp-mask causal" in error["message"]


def test_what_else_a_server_under_a_full_mask_says(full: Live) -> None:
    assert post(full, input="x").status_code == 200
    assert httpx.get(f"{full.url}/model_info", timeout=20).json()["is_generation"] is False
    assert httpx.get(f"{full.url}/health_generate", timeout=20).status_code == 200
    assert full.client.requests[-1].pooling is not None
    info = httpx.get(f"{full.url}/server_info", timeout=20).json()
    assert info["causal"] is False and info["pooling"] == "last"


def embedding_folder(folder: Path, **fields: Any) -> Path:
    return make_checkpoint(folder, "qwen3", num_layers=1, head=False, **fields)


def write_pooling(
    folder: Path, pooling: dict[str, Any], *more: str, package: str = "sentence_transformers.models"
) -> Path:
    """As sentence-transformers saves a model."""
    kinds = ["Transformer", "Pooling", *more, "Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"{package}.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 192, **pooling}))
    return folder


def configured(folder: Path, *flags: str) -> Any:
    return load(["--model-path", str(folder), *flags])


def test_a_checkpoint_without_its_head(tmp_path: Path) -> None:
    config = configured(embedding_folder(tmp_path))
    assert config.backend.causal and "Qwen3Model without lm_head.weight" in config.why_no_generation


def test_a_head_that_is_named_but_not_there(tmp_path: Path) -> None:
    """Embedding checkpoints often keep the architecture of the model that they were made from."""
    folder = embedding_folder(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"architectures": ["Qwen3ForCausalLM"]}))
    assert "no language model head" in configured(folder).why_no_generation
    (folder / "config.json").write_text(
        json.dumps(values | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True})
    )
    assert configured(folder).why_no_generation is None


@pytest.mark.parametrize(
    ("fields", "flags", "causal"),
    [
        ({}, "", True),
        ({"is_causal": False}, "", False),
        ({"use_bidirectional_attention": True}, "", False),
        ({"is_causal": True}, "", True),
        ({"is_causal": False}, "--sp-mask causal", True),
        ({}, "--sp-mask full", False),
    ],
)
def test_the_mask_is_what_config_json_says_unless_told(
    tmp_path: Path, fields: dict[str, Any], flags: str, causal: bool
) -> None:
    assert configured(embedding_folder(tmp_path, **fields), *flags.split()).backend.causal is causal


def test_a_full_mask_over_a_sliding_window_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mistral", num_layers=1)
    with pytest.raises(UsageError, match=r"--sp-mask full: 1 of the model's layers have .*sliding_window: 24"):
        configured(folder, "--sp-mask", "full")


@pytest.mark.parametrize(
    ("pooling", "flags", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, "", "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True, "include_prompt": True}, "", "last"),
        ({"pooling_mode": "mean"}, "", "mean"),
        ({"pooling_mode_mean_tokens": True}, "--pooling last", "last"),
        ({"pooling_mode_cls_token": True}, "--pooling mean", "mean"),
    ],
)
def test_pooling_is_what_the_folder_says_unless_told(
    tmp_path: Path, pooling: dict[str, Any], flags: str, expected: str
) -> None:
    folder = write_pooling(embedding_folder(tmp_path), pooling)
    assert configured(folder, *flags.split()).pooling == expected


def test_a_folder_of_sentence_transformers_6(tmp_path: Path) -> None:
    package = "sentence_transformers.sentence_transformer.modules.pooling"
    pooling = {"embedding_dimension": 192, "pooling_mode": "mean", "include_prompt": True}
    assert configured(write_pooling(embedding_folder(tmp_path), pooling, package=package)).pooling == "mean"


def test_pooling_of_a_folder_that_says_nothing(tmp_path: Path) -> None:
    assert configured(embedding_folder(tmp_path)).pooling == "last"


def test_pooling_that_is_not_supported(tmp_path: Path) -> None:
    folder = write_pooling(embedding_folder(tmp_path), {"pooling_mode_cls_token": True})
    with pytest.raises(UsageError, match=r"1_Pooling/config.json: field \"pooling_mode\" is \['cls'\].*--pooling"):
        configured(folder)


def test_a_module_that_is_not_supported(tmp_path: Path) -> None:
    folder = write_pooling(embedding_folder(tmp_path), {"pooling_mode_mean_tokens": True}, "Dense")
    with pytest.raises(UsageError, match=r"modules.json: module 'Dense' is not supported"):
        configured(folder)


def test_an_end_of_sequence_token_is_appended_where_transformers_does(tmp_path: Path) -> None:
    folder = embedding_folder(tmp_path)
    tokenizer = Tokenizer(folder)
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text())
    assert appended_eos(folder, tokenizer) is None
    file.write_text(json.dumps(values | {"add_eos_token": True}))
    assert appended_eos(folder, tokenizer) == tokenizer.id_of("<|end|>")
