"""Every layout x strategy x number of ranks, and every family, gives the logits and the greedy tokens of transformers.

The whole path below HTTP is real: controller, page tables, plans, gloo, kernels, decoder. Prompts are longer and
shorter than the threshold, cut into several chunks, and share a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest

from scheduler.config import SchedulerConfig
from sp_backend.catalog import planner_for
from sp_backend.config import BackendConfig
from sp_backend.models.config import ModelConfig
from sp_backend.native import choose_kernel
from sp_backend.planner import OFF, Choice, Planner
from sp_backend.presets import load_machine
from sp_backend.strategies import STRATEGIES
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
SETUPS = [
    (tp, sp, *variant)
    for tp, sp in WORLDS
    for variant in VARIANTS
    if sp > 1 or variant in (VARIANTS[0], VARIANTS[3])  # one rank: strategies have nothing to do
]
# A family is what a rank does with its own rows, and how its weights are split (test_decoder.py splits those of each):
# every setup runs one whose attention sees all keys and one with windows, the others run one setup of each kind.
FEW = [
    (1, 1, *VARIANTS[0]),
    (1, 3, *VARIANTS[0]),
    (2, 2, *VARIANTS[2]),
    (2, 1, *VARIANTS[3]),
    (2, 2, *VARIANTS[3]),
    (1, 4, *VARIANTS[4]),
]


def case(tp: int, sp: int, layout: str, strategy: str, redundant: bool, *family: str) -> Any:
    name = "-".join((*family, f"tp{tp}", f"sp{sp}", strategy)) + "-redundant" * redundant
    return pytest.param(*family, tp, sp, layout, strategy, redundant, id=name)


CASES = [case(*setup) for setup in SETUPS]
FAMILY_CASES = [case(*s, family) for family in FAMILIES for s in (SETUPS if family in ("qwen3", "mistral") else FEW)]

OTHERS = [
    (sp, strategy)
    for sp in (2, 3, 4)
    for strategy, row in STRATEGIES.items()
    if row.layout == "tokens" and strategy not in {v[1] for v in VARIANTS}
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


def backend(model: Path, **changes: Any) -> BackendConfig:
    return BackendConfig(
        model_path=str(model),
        dtype="float32",
        page_size=PAGE,
        num_pages=48,
        context_length=1024,
        kernel=choose_kernel()[0],
        **changes,
    )


def engine(model: Path, tp: int, sp: int, layout: str, strategy: str, redundant: bool) -> Engine:
    config = backend(model, tp_size=tp, sp_size=sp, layout=layout, strategy=strategy, redundant_kv=redundant)
    return Engine(config, SchedulerConfig(chunked_prefill_size=CHUNK, sp_threshold=THRESHOLD))


def worst_error(it: Engine, model: Path) -> float:
    """Over the logits at every position of LONG and of what follows it; the tokens must be right too, if they are.

    As a step computes them that wants the last rows alone, and as one that scores all.
    """
    it.workers.logits = ends = {}
    tokens = it.complete([LONG], NEW_TOKENS)
    it.workers.logits = everywhere = {}
    it.score([LONG], 0)
    it.workers.logits = None
    want = expected_logits(model)
    assert sorted(ends)[1:] == list(range(len(LONG) - 1, len(want)))  # after the end of the first chunk
    assert sorted(ends | everywhere) == sorted(want)
    compared = [*ends.items(), *((at, row) for at, row in everywhere.items() if at < len(LONG))]
    worst = max(float(np.abs(row - want[position]).max()) for position, row in compared)
    assert worst > 1e-4 or tokens == [expected_tokens(model, tuple(LONG))]
    return worst


@pytest.mark.parametrize(("family", "tp", "sp", "layout", "strategy", "redundant"), FAMILY_CASES)
def test_logits_and_tokens(
    folder: Path, family: str, tp: int, sp: int, layout: str, strategy: str, redundant: bool
) -> None:
    model = checkpoint(folder, family)
    it = engine(model, tp, sp, layout, strategy, redundant)

    assert worst_error(it, model) <= 1e-4

    prompts = [SHORT, FOLLOW_UP, LONG]
    assert it.complete(prompts, NEW_TOKENS) == [list(expected_tokens(model, tuple(p))) for p in prompts]
    assert it.cached_tokens(3) == 77 // PAGE * PAGE


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
@pytest.mark.parametrize(("sp", "strategy"), OTHERS)
def test_every_other_strategy(folder: Path, family: str, sp: int, strategy: str) -> None:
    model = checkpoint(folder, family)
    it = engine(model, 1, sp, "tokens", strategy, False)
    assert worst_error(it, model) <= 1e-4
    assert it.complete([SHORT, FOLLOW_UP], NEW_TOKENS) == [expected_tokens(model, tuple(p)) for p in (SHORT, FOLLOW_UP)]


@pytest.mark.parametrize(("tp", "sp", "layout", "strategy", "redundant"), CASES)
def test_logprobs_of_prompts(folder: Path, tp: int, sp: int, layout: str, strategy: str, redundant: bool) -> None:
    """Of every token, also of those whose pages are cached, at the ends of chunks, and next to other requests."""
    model = checkpoint(folder, "qwen3")
    it = engine(model, tp, sp, layout, strategy, redundant)
    it.complete([LONG], 1)
    answers = it.score([LONG, SHORT, FOLLOW_UP], 2)
    for prompt, answer in zip([LONG, SHORT, FOLLOW_UP], answers, strict=True):
        expected = oracle_logits(model, prompt).log_softmax(-1)[:-1]
        assert [token.token for token in answer] == prompt[1:]
        assert [token.logprob for token in answer] == pytest.approx(expected[range(len(answer)), prompt[1:]], abs=1e-4)
        best = expected.topk(2)
        for token, ids, values in zip(answer, best.indices.tolist(), best.values.tolist(), strict=True):
            assert [top.logprob for top in token.top] == pytest.approx(values, abs=1e-4)
            assert [top.token for top in token.top] == ids or abs(values[0] - values[1]) < 2e-4


class Restless:
    """A planner that runs another plan in every step, and spreads every prompt over another number of ranks."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._random = Random(0)
        self.chosen: set[str] = set()

    def degree_for(self, num_new: int, num_cached: int) -> int:
        return self._random.choice(self._planner.degrees)

    def choose(self, batch: Sequence[tuple[int, int]], degree: int) -> Choice:
        choice = self._planner.choose(batch, degree)
        if degree == 1:
            return choice
        fitting = [v for v in self._planner.winners if (v.degree or self._planner.num_ranks) == degree and v != OFF]
        choice = msgspec.structs.replace(choice, variant=self._random.choice(fitting))
        self.chosen.add(str(choice.variant))
        return choice


def test_any_plan_in_any_step(folder: Path) -> None:
    """What is cached does not depend on the plan that computed it."""
    model = checkpoint(folder, "qwen3")
    config = backend(model, sp_size=4, strategy="auto")
    machine = load_machine("nic200-4")
    planner = planner_for(config, ModelConfig.load(model), machine)
    assert planner is not None and {2, 4} <= set(planner.degrees)
    restless = Restless(planner)
    it = Engine(config, SchedulerConfig(chunked_prefill_size=CHUNK), machine, restless)
    prompts = [LONG[: 101 - 3 * i] + SHORT for i in range(12)]
    for i in range(0, len(prompts), 3):
        batch = prompts[i : i + 3]
        assert it.complete(batch, NEW_TOKENS) == [expected_tokens(model, tuple(p)) for p in batch]
    assert len(restless.chosen) >= 5 and any("@2" in plan for plan in restless.chosen)


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
