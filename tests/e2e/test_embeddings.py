"""Embeddings equal those of transformers: each mask, pooling, strategy, family and number of ranks.

The whole path below HTTP is real, as in test_against_transformers.py. For the full mask the oracle gets an explicit
mask of zeros. Inputs are ragged, several share a step, and some are shorter than the threshold.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
import torch

from benchmarks.launched import LaunchedServer
from scheduler.config import SchedulerConfig
from sp_backend.catalog import planner_for
from sp_backend.commands import Pooling
from sp_backend.config import BackendConfig
from sp_backend.models.config import ModelConfig
from sp_backend.presets import load_machine
from sp_backend.strategies import STRATEGIES
from tests.checkpoints import make_checkpoint, oracle_states
from tests.e2e.rank_workers import Engine
from tests.e2e.test_against_transformers import Restless

PAGE, CHUNK, THRESHOLD = 8, 64, 24
STRATEGIES_OF_TOKENS = [name for name, row in STRATEGIES.items() if row.layout == "tokens"]
# That every plan is right under both masks on 2 to 4 ranks is for test_functional.py and test_execute.py to show: here
# each runs on 4, where all differ, and one of each layout on fewer.
SHARED = [(name, 4) for name in (*STRATEGIES_OF_TOKENS, "sharded_q")]
SHARED += [(name, sp) for name in ("ring_pass_kv", "sharded_q") for sp in (2, 3)]

random = np.random.default_rng(0)
LENGTHS = [101, 3, 57, 24, 200, 1, 64]
INPUTS = [[int(t) for t in random.integers(0, 500, n)] for n in LENGTHS]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@lru_cache
def checkpoint(folder: Path, family: str, head: bool = False) -> Path:
    fields = {"sliding_window": None} if family == "mistral" else {}
    return make_checkpoint(folder / f"{family}-{head}", family, head=head, **fields)


@lru_cache
def expected(model: Path, causal: bool) -> dict[Pooling, list[np.ndarray]]:
    states = [oracle_states(model, tokens, causal) for tokens in INPUTS]
    return {"last": [s[-1].numpy() for s in states], "mean": [s.mean(0).numpy() for s in states]}


def engine_config(model: Path, causal: bool, sp: int, strategy: str, tp: int = 1) -> BackendConfig:
    return BackendConfig(
        model_path=str(model),
        dtype="float32",
        page_size=PAGE,
        num_pages=80,
        context_length=1024,
        causal=causal,
        tp_size=tp,
        sp_size=sp,
        layout="heads" if strategy == "sharded_q" else "tokens",
        strategy=strategy,
    )


def engine(model: Path, causal: bool, sp: int, strategy: str, tp: int = 1) -> Engine:
    config = engine_config(model, causal, sp, strategy, tp)
    return Engine(config, SchedulerConfig(chunked_prefill_size=CHUNK, sp_threshold=THRESHOLD))


def check(it: Engine, model: Path, causal: bool, pooling: Pooling) -> None:
    for output, want in zip(it.embed(INPUTS, pooling), expected(model, causal)[pooling], strict=True):
        got = output.embedding
        assert got is not None and got.shape == want.shape
        assert np.abs(got - want).max() <= 1e-4
        cosine = got @ want / np.linalg.norm(got) / np.linalg.norm(want)
        assert cosine >= 1 - 1e-6


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("strategy", "sp"), SHARED)
def test_every_strategy(folder: Path, strategy: str, sp: int, causal: bool) -> None:
    model = checkpoint(folder, "qwen3")
    it = engine(model, causal, sp, strategy)
    for pooling in ("mean", "last"):
        check(it, model, causal, pooling)
    assert it.controller.stats().plans.keys() >= {strategy}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("family", ["llama3", "qwen2", "mistral"])
@pytest.mark.parametrize(("tp", "sp", "strategy"), [(1, 1, "ring_pass_kv"), (2, 2, "token_ring"), (2, 2, "sharded_q")])
def test_every_family(folder: Path, family: str, tp: int, sp: int, strategy: str, causal: bool) -> None:
    model = checkpoint(folder, family)
    it = engine(model, causal, sp, strategy, tp)
    for pooling in ("mean", "last"):
        check(it, model, causal, pooling)


def test_a_model_with_its_head_embeds_beside_generation(folder: Path) -> None:
    """The same hidden states; a prefix that generation cached serves the last token and not the mean."""
    model = checkpoint(folder, "qwen3", head=True)
    it = engine(model, True, 2, "ring_pass_kv")
    it.complete(INPUTS, 3)
    check(it, model, True, "last")
    check(it, model, True, "mean")
    assert [o.cached_tokens for o in it.embed(INPUTS[:1], "last")] == [96]
    assert [o.cached_tokens for o in it.embed(INPUTS[:1], "mean")] == [0]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_plans_of_groups_of_ranks(folder: Path, causal: bool) -> None:
    """Another plan, over another number of ranks, in each step."""
    model = checkpoint(folder, "qwen3")
    config = msgspec.structs.replace(engine_config(model, causal, 4, "ring_pass_kv"), strategy="auto")
    machine = load_machine("nic200-4")
    planner = planner_for(config, ModelConfig.load(model), machine)
    assert planner is not None and {2, 4} <= set(planner.degrees)
    restless = Restless(planner)
    it = Engine(config, SchedulerConfig(chunked_prefill_size=CHUNK), machine, restless)
    for _ in range(3):
        for pooling in ("mean", "last"):
            check(it, model, causal, pooling)
    assert len(restless.chosen) >= 4 and any("@2" in plan for plan in restless.chosen)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_in_bfloat16(folder: Path, causal: bool) -> None:
    model = checkpoint(folder, "qwen3")
    config = msgspec.structs.replace(engine_config(model, causal, 2, "ring_pass_kv"), dtype="bfloat16")
    it = Engine(config, SchedulerConfig(chunked_prefill_size=CHUNK, sp_threshold=THRESHOLD))
    for pooling, wanted in expected(model, causal).items():
        for output, want in zip(it.embed(INPUTS, pooling), wanted, strict=True):
            got = output.embedding
            assert got is not None and got @ want / np.linalg.norm(got) / np.linalg.norm(want) >= 0.999


def test_masks_differ(folder: Path) -> None:
    """So that the comparison above could fail."""
    model = checkpoint(folder, "qwen3")
    full, causal = expected(model, False), expected(model, True)
    assert all(
        np.abs(a - b).max() > 0.1 for a, b, n in zip(full["mean"], causal["mean"], LENGTHS, strict=True) if n > 1
    )


def test_the_oracle_agrees_with_is_causal_of_a_config(folder: Path) -> None:
    model = make_checkpoint(folder / "bidirectional", "qwen3", head=False, is_causal=False)
    assert torch.allclose(oracle_states(model, INPUTS[0], causal=True), oracle_states(model, INPUTS[0], causal=False))
    config = ModelConfig.load(model)
    assert (config.architecture, config.causal, config.has_head) == ("Qwen3Model", False, False)


def test_the_real_server_under_a_full_mask(folder: Path) -> None:
    """With plans chosen by prediction for the links of this machine: HTTP, steps told, metrics."""
    model = checkpoint(folder, "qwen3")
    want = [states.mean(0).numpy() for states in (oracle_states(model, tokens, causal=False) for tokens in INPUTS)]
    flags = ("--sp-size", "2", "--page-size", "8", "--max-total-tokens", "4096", "--sp-threshold", "24")
    with LaunchedServer("--model-path", str(model), "--sp-mask", "full", "--pooling", "mean", *flags) as server:
        answer = httpx.post(
            f"{server.url}/v1/embeddings", json={"input": INPUTS}, headers={"X-SP-Explain": "1"}, timeout=60
        ).json()
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=60)
        metrics = httpx.get(f"{server.url}/metrics", timeout=10).text
    for entry, states in zip(answer["data"], want, strict=True):
        assert np.abs(np.array(entry["embedding"]) - states / np.linalg.norm(states)).max() <= 1e-5
    steps = [part["steps"] for part in answer["sp_explain"]]
    assert all(len(own) == 1 and own[0]["num_new"] == n for own, n in zip(steps, LENGTHS, strict=True))
    assert {own[0]["plan"] for own, n in zip(steps, LENGTHS, strict=True) if n < THRESHOLD} == {"local"}
    spread = {own[0]["plan"] for own, n in zip(steps, LENGTHS, strict=True) if n >= THRESHOLD}
    assert "local" not in spread
    assert all(re.search(rf'^sp:plan_num_tokens_total{{.*plan=".*{re.escape(plan)}', metrics, re.M) for plan in spread)
    assert refused.status_code == 400 and "no language model head" in refused.json()["error"]["message"]
