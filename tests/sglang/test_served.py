"""Real SGLang servers on CPU ranks: greedy tokens equal those of transformers, and the plans did run."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig

from benchmarks.launched import ROOT
from tests.checkpoints import Family, make_checkpoint, oracle_greedy
from tests.sglang.reports import ROUNDS, read_reports
from tests.sglang.served import SGLangServer

LAYERS, VOCAB, OUTPUT = 2, 500, 12
MOE = Family(
    Qwen3MoeConfig,
    {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    head_dim=32,
)
CHUNK = 256  # tokens of a step, so that longer prompts come in chunks
SERVING = ("--max-total-tokens", "8192", "--context-length", "2048", "--chunked-prefill-size", str(CHUNK))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sizes = {"num_heads": 8, "num_kv_heads": 4, "num_layers": LAYERS, "intermediate_size": 256}
    folder = tmp_path_factory.mktemp("models")
    return {
        "qwen3": make_checkpoint(folder / "qwen3", "qwen3", **sizes),
        "qwen3_moe": make_checkpoint(folder / "qwen3_moe", MOE, **sizes),
        "llama": make_checkpoint(folder / "llama", "llama3", **sizes),
        "llama_2_kv_heads": make_checkpoint(folder / "llama_2_kv_heads", "llama3", **(sizes | {"num_kv_heads": 2})),
    }


def prompt(length: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist())


SINGLE = [prompt(n) for n in (5, 17, 100)]
LONG = prompt(777)
BATCH = [prompt(n) for n in (37, 301, 64, 9, 150)]


@lru_cache
def expected(model: Path, tokens: tuple[int, ...]) -> list[int]:
    return oracle_greedy(model, list(tokens), OUTPUT)


def answers(server: SGLangServer, *prompts: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [answer["output_ids"] for answer in server.generate(prompts, OUTPUT)]


def check_server(server: SGLangServer, model: Path, backend: str, cp_size: int, attn_tp_size: int) -> None:
    for one in [*SINGLE, LONG]:
        assert answers(server, one) == [expected(model, one)]
    [again] = server.generate([LONG], OUTPUT)
    assert again["output_ids"] == expected(model, LONG) and again["meta_info"]["cached_tokens"] > 0
    longer = (*LONG, *prompt(90))  # new tokens, enough to be sharded, after cached ones
    assert answers(server, longer) == [expected(model, longer)]
    assert answers(server, *BATCH) == [expected(model, tokens) for tokens in BATCH]
    check_rounds(server, backend, cp_size, attn_tp_size)


def check_rounds(server: SGLangServer, backend: str, cp_size: int, attn_tp_size: int) -> None:
    """Every rank ran every sharded batch, in as many rounds as its plan has."""
    reports = read_reports(server.log())
    assert all(r.name == backend and r.layers == LAYERS for r in reports)
    assert all(r.rounds == ROUNDS[r.plan](cp_size) for r in reports)
    batches = Counter((r.rank, r.new, r.cached, r.prompts, r.plan) for r in reports)
    first = {batch[1:]: n for batch, n in batches.items() if batch[0] == 0}
    for rank in range(cp_size):
        assert {batch[1:]: n for batch, n in batches.items() if batch[0] == rank} == first
    assert all(n % attn_tp_size == 0 for n in first.values())
    assert any(r.prompts > 1 for r in reports), "no batch of several prompts was sharded"
    assert any(r.cached % CHUNK == 0 and r.cached for r in reports), "no later chunk was sharded"
    assert any(90 <= r.new < 90 + 64 and r.cached > 700 for r in reports), "no cached prefix was used"
    assert sum(r.kept for r in reports) > 0


def test_the_documented_command_is_what_is_served_here() -> None:
    [documented] = [line for line in (ROOT / "docs" / "sglang.md").read_text().splitlines() if "launch_server" in line]
    assert documented.startswith("python -m sglang.launch_server ")
    assert set(documented.split()[3:]) <= set(SGLangServer(Path("FOLDER"), "sp_ring_pass_kv").arguments)


@pytest.mark.parametrize(("backend", "page_size"), [("sp_ring_pass_kv", 1), ("sp_token_ring", 64)])
def test_two_ranks(models: dict[str, Path], backend: str, page_size: int) -> None:
    with SGLangServer(models["qwen3"], backend, *SERVING, "--page-size", str(page_size), imported=False) as server:
        check_server(server, models["qwen3"], backend, 2, 1)


@pytest.mark.matrix
@pytest.mark.parametrize(("cp_size", "tp_size"), [(2, 2), (4, 4), (2, 4)], ids=["cp2", "cp4", "cp2-tp4"])
@pytest.mark.parametrize("backend", ["sp_ring_pass_kv", "sp_token_ring", "sp_ring_pass_q", "sp_auto"])
@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_every_model_strategy_and_world(
    models: dict[str, Path], model: str, backend: str, cp_size: int, tp_size: int
) -> None:
    page_size = "64" if tp_size > cp_size else "1"
    with SGLangServer(
        models[model],
        backend,
        *SERVING,
        "--page-size",
        page_size,
        cp_size=cp_size,
        tp_size=tp_size,
        startup_seconds=800,
    ) as server:
        check_server(server, models[model], backend, cp_size, tp_size // cp_size)


@pytest.mark.matrix
def test_a_broken_merge_changes_tokens(models: dict[str, Path]) -> None:
    """So the comparison above is able to fail."""
    with SGLangServer(models["qwen3"], "sp_ring_pass_kv", *SERVING, env={"SGLANG_CPU_FAULT": "merge"}) as server:
        assert answers(server, prompt(100)) != [expected(models["qwen3"], prompt(100))]


@pytest.mark.matrix
def test_llama_is_refused_because_sglang_shards_it_wrongly(models: dict[str, Path]) -> None:
    """SGLang's own all-gather does not get through the warm-up request: keys do not fit into its cache."""
    with pytest.raises(RuntimeError, match="LlamaForCausalLM divides attention heads by --tp-size"):
        SGLangServer(models["llama"], "sp_ring_pass_kv", *SERVING, startup_seconds=800).__enter__()
    with pytest.raises(RuntimeError, match="shape mismatch: value tensor of shape"):
        SGLangServer(models["llama"], "all_gather_for_tests", *SERVING, startup_seconds=800).__enter__()


@pytest.mark.matrix
def test_llama_is_wrong_without_an_error_in_sglang_itself(models: dict[str, Path]) -> None:
    """With one KV head a rank, keys fit: into every head of a cache that is made for more."""
    model = models["llama_2_kv_heads"]
    with SGLangServer(model, "all_gather_for_tests", *SERVING, startup_seconds=400) as server:
        for tokens in SINGLE[1:]:
            assert answers(server, tokens) != [expected(model, tokens)]
    without = ("--attn-cp-size", "1")
    with SGLangServer(model, "torch_native", *SERVING, *without, startup_seconds=400) as server:
        for tokens in SINGLE[1:]:
            assert answers(server, tokens) == [expected(model, tokens)]


@pytest.mark.matrix
def test_sglangs_own_all_gather_is_right_with_the_same_kernel(models: dict[str, Path]) -> None:
    """So what the benchmark compares with is a working server."""
    with SGLangServer(models["qwen3"], "all_gather_for_tests", *SERVING) as server:
        for tokens in (prompt(100), LONG):
            assert answers(server, tokens) == [expected(models["qwen3"], tokens)]
