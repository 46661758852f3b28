"""What the comparisons with other libraries rest on: whose rows are whose, and that a wrong result is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.attention_peers import NUM_RANKS, WRONG, error, positions
from benchmarks.attention_ranks import Shape
from benchmarks.command import without_folders
from benchmarks.prefill_peers import Peer, check_same_model

SHAPE = Shape(4, 2, 16)
TOKENS = 128


@pytest.mark.parametrize("name", ["ring_pass_kv", "yunchang Ulysses"])
def test_every_row_has_one_rank(name: str) -> None:
    rows = torch.cat([positions(name, rank, TOKENS) for rank in range(NUM_RANKS)])
    assert rows.sort().values.tolist() == list(range(TOKENS))


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_a_wrong_output_is_seen(rank: int) -> None:
    torch.manual_seed(0)
    q, kv = SHAPE.tensors(TOKENS, TOKENS)
    where = positions("ring_pass_kv", rank, TOKENS)
    keys, values = kv.float().repeat_interleave(2, dim=2).transpose(0, 2).unbind(1)
    right = torch.nn.functional.scaled_dot_product_attention(q.float().transpose(0, 1), keys, values, is_causal=True)
    out = right.transpose(0, 1)[where].bfloat16()
    assert error(SHAPE, out, where, q, kv) < 0.005
    assert error(SHAPE, out.roll(1, 0), where, q, kv) > WRONG
    assert error(SHAPE, out * 1.1, where, q, kv) > WRONG


def test_results_name_no_folder_of_the_machine_that_they_were_taken_on(tmp_path: Path) -> None:
    words = [f"{tmp_path}/bin/python", "-m", "benchmarks.memory", "--json", f"{tmp_path}/memory.json", "--quick"]
    (tmp_path / "bin").mkdir()
    words += [f"--model-path={tmp_path}/my-model", "http://127.0.0.1:30000/v1", "2xnvlink4-4/nic400"]
    shown = "python -m benchmarks.memory --json memory.json --quick --model-path=my-model".split()
    assert [without_folders(word) for word in words] == [*shown, "http://127.0.0.1:30000/v1", "2xnvlink4-4/nic400"]


def test_peers_that_compute_different_models_are_refused() -> None:
    peers = [Peer(name, Path()) for name in ("one", "same", "other")]
    logits = np.random.default_rng(0).standard_normal((2, 100))
    peers[0].logits, peers[1].logits, peers[2].logits = logits[0], 1.01 * logits[0], logits[1]
    check_same_model(peers[:2])
    with pytest.raises(RuntimeError, match="other computes another model than one"):
        check_same_model(peers)
