"""Every family x layout x strategy x number of ranks gives the logits and the greedy tokens of transformers.

The whole path below HTTP is real: controller, page tables, plans, gloo, kernels, decoder. Prompts are longer and
shorter than the threshold, cut into several chunks, and share a prefix.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from scheduler.config import SchedulerConfig
from sp_backend.config import BackendConfig
from tests.checkpoints import FAMILIES, make_checkpoint, oracle_greedy, oracle_logits
from tests.e2e.rank_workers import Engine, Logits, sabotage
from tests.ranks import run_on_ranks

PAGE, CHUNK, THRESHOLD, NEW_TOKENS = 8, 64, 24, 6
VARIANTS = [  # layout, strategy, redundant KV
    ("tokens", "ring_pass_kv", False),
    ("tokens", "ring_pass_kv_up", False),
    ("tokens", "token_ring", False),
    ("heads", "sharded_q", False),
    ("heads", "sharded_q", True),
]
WORLDS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2)]  # tp, sp
CASES = [
    pytest.param(tp, sp, layout, strategy, redundant, id=f"tp{tp}-sp{sp}-{strategy}{'-redundant' * redundant}")
    for tp, sp in WORLDS
    for layout, strategy, redundant in VARIANTS
]

random = np.random.default_rng(0)
LONG = [int(t) for t in random.integers(0, 500, 101)]
SHORT = [int(t) for t in random.integers(0, 500, 5)]
FOLLOW_UP = LONG[:77] + [int(t) for t in random.integers(0, 500, 10)]  # nine pages of LONG's, then a short rest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@lru_cache
def checkpoint(folder: Path, family: str, num_heads: int = 12, num_kv_heads: int = 4) -> Path:
    return make_checkpoint(folder / f"{family}-{num_heads}", family, num_heads=num_heads, num_kv_heads=num_kv_heads)


@lru_cache
def expected_tokens(model: Path, prompt: tuple[int, ...]) -> list[int]:
    return oracle_greedy(model, list(prompt), NEW_TOKENS)


@lru_cache
def expected_logits(model: Path) -> Logits:
    tokens = LONG + expected_tokens(model, tuple(LONG))[:-1]
    return dict(enumerate(oracle_logits(model, tokens).numpy()))


def engine(model: Path, tp: int, sp: int, layout: str, strategy: str, redundant: bool) -> Engine:
    config = BackendConfig(
        model_path=str(model),
        dtype="float32",
        tp_size=tp,
        sp_size=sp,
        layout=layout,
        strategy=strategy,
        redundant_kv=redundant,
        page_size=PAGE,
        num_pages=48,
        context_length=1024,
    )
    return Engine(config, SchedulerConfig(chunked_prefill_size=CHUNK, sp_threshold=THRESHOLD))


def worst_error(it: Engine, model: Path) -> float:
    """Over the logits at every position of LONG and of what follows it; the tokens must be right too, if they are."""
    it.workers.logits = {}
    tokens = it.complete([LONG], NEW_TOKENS)
    want, got = expected_logits(model), it.workers.logits
    it.workers.logits = None
    assert sorted(got) == sorted(want)
    worst = max(float(np.abs(got[position] - want[position]).max()) for position in want)
    assert worst > 1e-4 or tokens == [expected_tokens(model, tuple(LONG))]
    return worst


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tp", "sp", "layout", "strategy", "redundant"), CASES)
def test_logits_and_tokens(
    folder: Path, family: str, tp: int, sp: int, layout: str, strategy: str, redundant: bool
) -> None:
    model = checkpoint(folder, family)
    it = engine(model, tp, sp, layout, strategy, redundant)

    assert worst_error(it, model) <= 1e-4

    prompts = [SHORT, FOLLOW_UP, LONG]
    assert it.complete(prompts, NEW_TOKENS) == [list(expected_tokens(model, tuple(p))) for p in prompts]
    assert it.cached_tokens(2) == 77 // PAGE * PAGE


@pytest.mark.parametrize("sp", [2, 4])
@pytest.mark.parametrize(("layout", "strategy", "redundant"), VARIANTS)
def test_one_kv_head_for_all_queries(folder: Path, sp: int, layout: str, strategy: str, redundant: bool) -> None:
    model = checkpoint(folder, "llama3", 8, 1)
    assert worst_error(engine(model, 1, sp, layout, strategy, redundant), model) <= 1e-4


@pytest.mark.parametrize("how", ["wrong RoPE factor", "dropped KV block", "base-2 LSE"])
@pytest.mark.parametrize(
    ("layout", "strategy"), [("tokens", "ring_pass_kv"), ("tokens", "token_ring"), ("heads", "sharded_q")]
)
def test_the_comparison_notices(folder: Path, how: str, layout: str, strategy: str) -> None:
    model = checkpoint(folder, "qwen3")
    it = engine(model, 1, 2, layout, strategy, False)
    run_on_ranks(2, sabotage, it.backend, how)
    assert worst_error(it, model) > 1e-2
