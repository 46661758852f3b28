"""What each strategy promises: which layouts and sizes it takes, what it sends, how its work is spread."""

import time
from collections import Counter

import pytest

from sp_backend.check import check
from sp_backend.geometry import Geometry, predicted_bytes, query_key_pairs, visible_pairs
from sp_backend.layout import KV, STATE, Kind, Layout, Q
from sp_backend.plan import Plan, PlanError, Round
from sp_backend.strategies import STRATEGIES, plan_for, prove

CASES: list[tuple[str, Kind, bool]] = [
    (name, kind, redundant)
    for name, strategy in STRATEGIES.items()
    for kind in strategy.kinds
    for redundant in ((False, True) if kind == "heads" else (False,))
]
NAMES = [f"{n}-{k}{'-redundant' * r}" for n, k, r in CASES]


@pytest.mark.parametrize(("name", "kind", "redundant"), CASES, ids=NAMES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_every_plan_is_proven(name: str, kind: Kind, redundant: bool, num_ranks: int, causal: bool) -> None:
    plan = plan_for(
        name,
        num_ranks=num_ranks,
        num_heads=2 * num_ranks,
        num_kv_heads=num_ranks,
        causal=causal,
        kind=kind,
        redundant_kv=redundant,
    )
    assert not check(plan).errors


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "num_ranks"), [(12, 4, 2), (12, 4, 3), (8, 1, 2), (8, 1, 4)])
def test_head_groups_may_cut_kv_groups(num_heads: int, num_kv_heads: int, num_ranks: int) -> None:
    plan = plan_for("sharded_q", num_ranks=num_ranks, num_heads=num_heads, num_kv_heads=num_kv_heads)
    for r in plan.rounds:
        for t in r.transfers:
            assert t.block.heads == plan.layout.heads_of(t.dst)  # only what the receiver reads


def spread(plan: Plan, tokens_per_chunk: int = 2) -> Geometry:
    lay = plan.layout
    return Geometry([[tokens_per_chunk] * lay.num_new + [0] * (lay.num_chunks - lay.num_new)])


def sent(plan: Plan, operand: str) -> int:
    return sum(t.block.operand == operand for r in plan.rounds for t in r.transfers)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_a_downward_ring_sends_three_quarters_of_the_new_tokens(num_ranks: int) -> None:
    sizes = {"num_ranks": num_ranks, "num_heads": 4, "num_kv_heads": 2}
    down, up = plan_for("ring_pass_kv", **sizes), plan_for("ring_pass_kv_up", **sizes)
    down_bytes, up_bytes = (
        sum(sum(links.values()) for links in predicted_bytes(p, spread(p), head_dim=8, itemsize=2)) for p in (down, up)
    )
    chunk = 2 * 2 * 2 * 8 * 2  # rows x (key, value) x KV heads x head_dim x itemsize
    everything = num_ranks * (num_ranks - 1) * 2 * chunk
    assert down_bytes == everything * 3 // 4
    assert up_bytes == everything - everything // (2 * num_ranks)  # only rank 0's late chunk is dropped


@pytest.mark.parametrize("name", ["ring_pass_kv", "ring_pass_kv_up", "token_ring"])
@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_zigzag_spreads_causal_work_evenly(name: str, num_ranks: int) -> None:
    plan = plan_for(name, num_ranks=num_ranks, num_heads=4, num_kv_heads=2)
    pairs = [query_key_pairs(plan, spread(plan, 5), r) for r in range(num_ranks)]
    assert len(set(pairs)) == 1
    assert sum(pairs) == visible_pairs(10 * num_ranks, 10 * num_ranks, causal=True)


def test_sharded_q_spreads_work_evenly_by_heads() -> None:
    plan = plan_for("sharded_q", num_ranks=4, num_heads=8, num_kv_heads=2)
    assert [query_key_pairs(plan, spread(plan, 5), r) for r in range(4)] == [visible_pairs(20, 20, True) / 4] * 4


def test_token_ring_keeps_kv_and_sends_each_state_one_round_after_it_is_computed() -> None:
    plan = plan_for("token_ring", num_ranks=4, num_heads=4, num_kv_heads=4)
    assert sent(plan, KV) == 0
    for before, r in zip(plan.rounds, plan.rounds[1:], strict=False):
        computed = {(a.rank, a.q.chunk) for a in before.attends}
        assert all((t.src, t.block.chunk) in computed for t in r.transfers if t.block.operand == STATE)
    assert not [t for t in plan.rounds[0].transfers if t.block.operand == STATE]


def test_decode_is_two_exchanges_and_no_kv_moves() -> None:
    for kind in STRATEGIES["decode"].kinds:
        plan = plan_for("decode", num_ranks=4, num_heads=8, num_kv_heads=2, kind=kind)
        exchanges = [Counter(t.block.operand for t in r.transfers) for r in plan.rounds if r.transfers]
        assert [set(e) for e in exchanges] == [{Q}, {STATE}]


def test_local_sends_nothing() -> None:
    plan = plan_for("local", num_ranks=4, num_heads=8, num_kv_heads=2)
    assert not any(r.transfers for r in plan.rounds)


def test_redundant_kv_moves_history_only() -> None:
    plan = plan_for("sharded_q", num_ranks=4, num_heads=8, num_kv_heads=2, redundant_kv=True)
    assert {t.block.chunk for r in plan.rounds for t in r.transfers} == set(range(4, 8))


def test_a_ring_holds_at_most_the_block_it_reads_and_the_one_to_come() -> None:
    report = check(plan_for("ring_pass_kv", num_ranks=8, num_heads=4, num_kv_heads=2))
    assert max(report.peak_kv_blocks) == 2 * 3  # of two chunks and history


def test_plans_are_built_and_proven_once_and_quickly() -> None:
    sizes = {"num_ranks": 8, "num_heads": 32, "num_kv_heads": 8, "causal": True}
    plan_for.cache_clear()
    began = time.perf_counter()
    plans = [plan_for(n, kind=k, redundant_kv=r, **sizes) for n, k, r in CASES]
    assert time.perf_counter() - began < 2.0
    assert plan_for(CASES[0][0], kind=CASES[0][1], redundant_kv=CASES[0][2], **sizes) is plans[0]


def test_what_does_not_fit_is_refused() -> None:
    sizes = {"num_ranks": 2, "num_heads": 4, "num_kv_heads": 2}
    with pytest.raises(ValueError, match="unknown strategy 'ring'; known: ring_pass_kv"):
        plan_for("ring", **sizes)
    with pytest.raises(ValueError, match="works on layouts heads, not zigzag"):
        plan_for("sharded_q", kind="zigzag", **sizes)
    with pytest.raises(ValueError, match="sizes that fit: 1, 2, 4"):
        plan_for("sharded_q", num_ranks=3, num_heads=4, num_kv_heads=2)


def test_an_unproven_plan_is_refused_with_the_reasons() -> None:
    empty = Plan("nothing", Layout(2, "zigzag", 4, 2), (Round(),))
    with pytest.raises(PlanError, match="kv0, slice 0/1, missing"):
        prove(empty)
