"""The part of the SGLang plugin that needs no SGLang: a CP group's plans and what they send. See tests/sglang too."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace

import pytest
import torch

from sp_backend.config import AUTO
from sp_backend.geometry import Geometry, predicted_bytes
from sp_backend.layout import KV, Block
from sp_backend.sglang_plugin import plans as group_plans
from sp_backend.sglang_plugin.plans import CANDIDATES, GroupPlans, without_copies
from sp_backend.sglang_plugin.rows import CPRows
from sp_backend.shape import ModelShape
from sp_backend.strategies import plan_for
from sp_backend.transport.lockstep import LockstepNetwork
from tests.sp_backend.machines import mesh

SHAPE = ModelShape(num_heads=4, num_kv_heads=2, head_dim=8, itemsize=4)
KEY = 2 * SHAPE.num_kv_heads * SHAPE.head_dim * SHAPE.itemsize  # bytes of a token's keys and values


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CANDIDATES)
def test_keys_that_are_only_kept_are_told_from_those_attended(name: str, ranks: int) -> None:
    network, tokens = LockstepNetwork(ranks), 4
    geometry = Geometry([[tokens] * (2 * ranks) + [20] * ranks])
    plans = [GroupPlans(name, network.rank(r), SHAPE, torch.float32, 1.0).prepare(geometry) for r in range(ranks)]
    kept = sum(plan.copy_bytes for plan in plans) / (tokens * KEY)  # blocks
    everywhere = 2 * ranks * (ranks - 1)
    if name in ("token_ring", "ring_pass_q"):
        assert kept == everywhere
    elif name == "all_gather_kv":
        assert kept == everywhere - needed_blocks(ranks)
    else:
        assert 0 < kept < everywhere


def needed_blocks(ranks: int) -> int:
    """(rank, chunk) pairs where a rank attends a chunk of another: those before its own back chunk."""
    layout = plan_for("all_gather_kv", num_ranks=ranks, num_heads=4, num_kv_heads=2, kind="zigzag").layout
    return sum(
        layout.owner(chunk) != rank and chunk < 2 * ranks - 1 - rank
        for rank in range(ranks)
        for chunk in range(2 * ranks)
    )


def test_without_copies_a_plan_is_what_it_is_for_a_sharded_cache() -> None:
    """With no cached tokens anywhere, as their keys never travel inside SGLang."""
    for name in CANDIDATES:
        copying, sharded = (
            plan_for(name, num_ranks=3, num_heads=4, num_kv_heads=2, kind="zigzag", copies=copies)
            for copies in (True, False)
        )
        needed = {t for r in without_copies(copying).rounds for t in r.transfers if t.block.operand == KV}
        assert needed == {t for r in sharded.rounds for t in r.transfers if t.block.operand == KV and t.block.chunk < 6}


def test_auto_costs_the_keys_that_are_only_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Over links so slow that nothing else counts, no candidate is predicted to take less than all that it sends."""
    bandwidth, tokens = 1e6, 400  # bytes/s
    monkeypatch.setattr(group_plans, "machine_of", lambda *_: mesh(2, bandwidth=bandwidth))
    monkeypatch.setattr(group_plans, "gather_bytes", lambda _, data: [data])
    geometry = Geometry([[tokens] * 4 + [0] * 2])
    auto = GroupPlans(AUTO, LockstepNetwork(2).rank(0), SHAPE, torch.float32, 1.0)
    with caplog.at_level(logging.INFO):
        auto.prepare(geometry)
    predicted = {name: float(ms) / 1e3 for name, ms in re.findall(r"(\w+) ([\d.e+]+) ms", caplog.text)}
    assert set(predicted) == set(CANDIDATES)
    for name, seconds in predicted.items():
        plan = plan_for(name, num_ranks=2, num_heads=4, num_kv_heads=2, kind="zigzag", copies=True)
        rounds = predicted_bytes(plan, geometry, SHAPE.head_dim, SHAPE.itemsize)
        assert seconds > 0.99 * sum(links.get((0, 1), 0) for links in rounds) / bandwidth


def test_rows_of_a_ragged_batch() -> None:
    batch = SimpleNamespace(
        attn_cp_metadata=SimpleNamespace(bs=2, split_list=[3, 3, 2, 2, 2, 1, 1, 1]),
        extend_prefix_lens_cpu=[2, 0],
        req_pool_indices=torch.tensor([1, 0]),
        out_cache_loc=torch.arange(100, 115),
    )
    table = torch.arange(40).view(2, 20)
    rows = CPRows.of(batch, table, num_ranks=2, rank=1)
    assert rows.q_rows == {1: slice(0, 4), 2: slice(4, 7)} and rows.num_rows == 7
    assert rows.history.tolist() == [20, 21]
    assert (rows.num_new, rows.num_cached) == (15, 2)
    assert rows.slots(Block(KV, 3, (0, 4))).tolist() == [108, 109, 114]
    assert rows.slots(Block(KV, 0, (0, 4), (1, 2))).tolist() == [101, 102, 111]
