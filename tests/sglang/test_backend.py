"""The installed plugin against SGLang's own torch_native attention, on real pools and gloo ranks."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.sglang.pools import LAYERS, Prompt, compare
from tests.sglang.reports import ROUNDS

NAMES = ["sp_ring_pass_kv", "sp_token_ring", "sp_ring_pass_q", "sp_auto"]
BATCHES = {
    "ragged": [Prompt(37), Prompt(8), Prompt(130)],
    "cached": [Prompt(37, 64), Prompt(9, 3), Prompt(64), Prompt(8, 129)],
    "short": [Prompt(3, 70), Prompt(90)],  # not sharded: a prompt has fewer tokens than there are blocks
}


@pytest.mark.parametrize(("size", "page_size"), [(2, 1), (3, 64)])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decoding_equal_torch_native_on_every_rank(
    name: str, batch: str, page_size: int, size: int
) -> None:
    prompts = BATCHES[batch]
    kept = 0.0
    answers = run_on_ranks(size, compare, name, prompts, page_size, torch.float32, timeout=280)
    for rank, (differences, reports) in enumerate(answers):
        assert max(differences.values()) <= 1e-5
        if batch == "short":
            assert not reports
            continue
        [report] = reports  # of the prefill; decoding sends nothing
        assert (report.name, report.rank, report.layers) == (name, rank, LAYERS)
        assert (report.new, report.cached) == (sum(p.new for p in prompts), sum(p.cached for p in prompts))
        assert report.rounds == ROUNDS[report.plan](size)
        assert report.kept < report.sent
        kept += report.kept
    assert (kept > 0) == (batch != "short")


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_near_as_its_outputs_are_rounded(name: str) -> None:
    """Outputs reach about 4, where bfloat16 rounds by at most 1/128; states that travel are rounded once more."""
    for differences, _ in run_on_ranks(2, compare, name, BATCHES["cached"], 1, torch.bfloat16, timeout=280):
        assert max(differences["extend"], differences["decode"]) <= 2 / 128 and differences["pool"] == 0
