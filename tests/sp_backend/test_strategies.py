"""What each strategy promises: which layouts and sizes it takes, what it sends, how its work is spread."""

from collections import Counter

import pytest

from sp_backend.check import check
from sp_backend.geometry import Geometry, predicted_bytes, query_key_pairs, visible_pairs
from sp_backend.layout import KV, STATE, Kind, Layout, Q
from sp_backend.plan import Plan, PlanError, Round
from sp_backend.strategies import STRATEGIES, Options, Variant, least_of, plan_for, prove, variants

CASES: list[tuple[str, Kind, bool]] = [
    (name, kind, redundant)
    for name, strategy in STRATEGIES.items()
    for kind in strategy.kinds
    for redundant in ((False, True) if kind == "heads" else (False,))
]
NAMES = [f"{n}-{k}{'-redundant' * r}" for n, k, r in CASES]


@pytest.mark.parametrize(("name", "kind", "redundant"), CASES, ids=NAMES)
@pytest.mark.parametrize("num_ranks", range(1, 17))
def test_every_plan_is_proven(name: str, kind: Kind, redundant: bool, num_ranks: int) -> None:
    """Up to 8 ranks without a causal mask too. plan_for raises PlanError if check finds anything."""
    for causal, num_kv_heads in ((True, num_ranks), (False, 1))[: 2 if num_ranks <= 8 else 1]:
        plan_for(
            name,
            num_ranks=num_ranks,
            num_heads=2 * num_ranks,
            num_kv_heads=num_kv_heads,
            causal=causal,
            kind=kind,
            redundant_kv=redundant,
        )


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 6, 8])
def test_every_variant_is_proven(num_ranks: int) -> None:
    of_tokens, of_heads = (variants(num_ranks, 24, layout) for layout in ("tokens", "heads"))
    for i, variant in enumerate(of_tokens):
        kind = "contiguous" if i % 2 else "zigzag"
        plan_for(variant, num_ranks=num_ranks, num_heads=24, num_kv_heads=8, kind=kind, causal=i % 3 > 0)
    names = [str(v) for v in of_tokens]
    assert len(set(names)) == len(names)
    assert {v.strategy for v in of_tokens} | {"hamilton", "hybrid", "double_ring"} == {
        name for name, strategy in STRATEGIES.items() if strategy.layout == "tokens"
    }
    assert {v.degree for v in of_tokens} == {None} | {d for d in range(2, num_ranks) if num_ranks % d == 0}
    assert of_heads == [Variant("sharded_q")] and variants(num_ranks, num_ranks + 1, "heads") == []


def test_a_variant_s_name_is_short_unique_and_that_of_its_plan() -> None:
    cycles = ((0, 1, 2), (0, 2, 1))
    named = {
        "ring_pass_kv": Variant("ring_pass_kv"),
        "ring_pass_kv@3": Variant("ring_pass_kv", degree=3),
        "hybrid(ulysses_degree=3,ring_inside)": Variant("hybrid", Options(ulysses_degree=3, ring_inside=True)),
        "hamilton(num_rings=2)@3": Variant("hamilton", Options(num_rings=2), degree=3),
        "hamilton(cycles=2:c72d5cd4)@3": Variant("hamilton", Options(cycles=cycles), degree=3),
    }
    for name, variant in named.items():
        assert str(variant) == name
        assert plan_for(variant, num_ranks=6, num_heads=4, num_kv_heads=2).name == name


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "num_ranks"), [(12, 4, 2), (12, 4, 3), (8, 1, 2), (8, 1, 4)])
def test_head_groups_may_cut_kv_groups(num_heads: int, num_kv_heads: int, num_ranks: int) -> None:
    plan = plan_for("sharded_q", num_ranks=num_ranks, num_heads=num_heads, num_kv_heads=num_kv_heads)
    for r in plan.rounds:
        for t in r.transfers:
            assert t.block.heads == plan.layout.heads_of(t.dst)  # only what the receiver reads


def spread(plan: Plan, tokens_per_chunk: int = 2) -> Geometry:
    lay = plan.layout
    return Geometry([[tokens_per_chunk] * lay.num_new + [0] * (lay.num_chunks - lay.num_new)])


def rings(num_rings: int) -> Variant:
    return Variant("hamilton", Options(num_rings=num_rings))


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


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_zigzag_spreads_causal_work_evenly(num_ranks: int) -> None:
    for variant in variants(num_ranks, 8):
        if variant.degree is None:
            plan = plan_for(variant, num_ranks=num_ranks, num_heads=8, num_kv_heads=2)
            rows = 7 * 4  # that pieces of 2, 4 and 7 divide
            pairs = [query_key_pairs(plan, spread(plan, rows), r) for r in range(num_ranks)]
            total = visible_pairs(2 * rows * num_ranks, 2 * rows * num_ranks, causal=True)
            assert sum(pairs) == pytest.approx(total)
            if 8 % num_ranks == 0 or variant.strategy not in {"ulysses", "hybrid"}:  # heads are divided evenly
                assert max(pairs) == pytest.approx(min(pairs)), plan.name


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


def test_ring_pass_q_keeps_kv_and_sends_all_states_home_at_the_end() -> None:
    plan = plan_for("ring_pass_q", num_ranks=4, num_heads=4, num_kv_heads=4)
    assert sent(plan, KV) == 0
    assert {t.block.operand for r in plan.rounds[:-1] for t in r.transfers} == {Q}
    assert {t.block.operand for t in plan.rounds[-1].transfers} == {STATE}


@pytest.mark.parametrize("name", ["ring_pass_q", "token_ring"])
def test_where_q_moves_a_rank_s_own_second_half_hides_the_last_states_way_home(name: str) -> None:
    plan = plan_for(name, num_ranks=4, num_heads=4, num_kv_heads=4)
    own = {(a.rank, a.q.chunk) for a in plan.rounds[-1].attends}
    assert own == {(r, plan.layout.q_of(r)[1]) for r in range(4)}
    assert {(a.rank, a.q.chunk) for a in plan.rounds[0].attends} == {(r, plan.layout.q_of(r)[0]) for r in range(4)}


def busiest_link(plan: Plan) -> int:
    """Bytes of the link that carries most, over all rounds."""
    rounds = predicted_bytes(plan, spread(plan, 420), head_dim=8, itemsize=2)
    return max(sum((Counter(r) for r in rounds), Counter()).values())


def test_a_ring_both_ways_halves_the_load_of_a_link() -> None:
    sizes = {"num_ranks": 8, "num_heads": 4, "num_kv_heads": 2, "causal": False}
    assert busiest_link(plan_for("ring_pass_kv_both", **sizes)) == busiest_link(plan_for("ring_pass_kv", **sizes)) / 2


@pytest.mark.parametrize(("num_ranks", "num_rings"), [(4, 1), (4, 2), (4, 3), (5, 4), (6, 4), (6, 5), (8, 3), (8, 7)])
def test_hamilton_spreads_a_ring_s_bytes_evenly_over_its_links(num_ranks: int, num_rings: int) -> None:
    """Also where 4 ranks have not 3 cycles, nor 6 ranks 5: then it is a direct exchange."""
    sizes = {"num_ranks": num_ranks, "num_heads": 4, "num_kv_heads": 2, "causal": False}
    ring, plan = plan_for("ring_pass_kv", **sizes), plan_for(rings(num_rings), **sizes)
    assert busiest_link(plan) == busiest_link(ring) / num_rings
    for r in plan.rounds[:-1]:
        assert len({(t.src, t.dst) for t in r.transfers}) == num_ranks * num_rings  # all at once


def test_hamilton_by_nodes_uses_each_rank_s_link_between_nodes_once_a_round() -> None:
    variant = Variant("hamilton", Options(ranks_per_node=4))
    plan = plan_for(variant, num_ranks=8, num_heads=4, num_kv_heads=2, causal=False)
    for load in check(plan).loads[:-1]:
        between = [(src, dst) for src, dst in load if src // 4 != dst // 4]
        assert sorted(src for src, _ in between) == sorted(dst for _, dst in between) == list(range(8))


def test_hamilton_takes_cycles_of_the_user() -> None:
    cycles = ((0, 2, 1, 3), (0, 3, 1, 2))
    plan = plan_for(Variant("hamilton", Options(cycles=cycles)), num_ranks=4, num_heads=4, num_kv_heads=2)
    assert set(check(plan).loads[0]) == {(0, 2), (2, 1), (1, 3), (3, 0), (0, 3), (3, 1), (1, 2), (2, 0)}


def test_all_gather_sends_everything_at_once() -> None:
    plan = plan_for("all_gather_kv", num_ranks=4, num_heads=4, num_kv_heads=2)
    assert [bool(r.transfers) for r in plan.rounds] == [True, False]
    assert len(check(plan).loads[0]) == 4 * 3


def test_ulysses_repeats_kv_heads_only_for_the_ranks_that_read_them() -> None:
    """12:4 heads on 6 ranks: two query heads each, of one KV head or of two neighbours; on 5 ranks: 2 or 3."""
    plan = plan_for("ulysses", num_ranks=6, num_heads=12, num_kv_heads=4)
    kv = {t.block.heads for r in plan.rounds for t in r.transfers if t.block.operand == KV}
    assert [plan.layout.kv_heads(heads) for heads in sorted(kv)] == [(0, 1), (0, 2), (1, 2), (2, 3), (2, 4), (3, 4)]
    uneven = plan_for("ulysses", num_ranks=5, num_heads=12, num_kv_heads=4)
    assert {a.q.heads for r in uneven.rounds for a in r.attends} == {(0, 2), (2, 4), (4, 7), (7, 9), (9, 12)}


@pytest.mark.parametrize(("ring_inside", "traders", "ring"), [(False, {1}, {2}), (True, {2}, {1})])
def test_hybrid_trades_heads_with_neighbours_and_rings_across_or_the_other_way(
    ring_inside: bool, traders: set[int], ring: set[int]
) -> None:
    variant = Variant("hybrid", Options(ulysses_degree=2, ring_inside=ring_inside))
    plan = plan_for(variant, num_ranks=4, num_heads=4, num_kv_heads=2)
    distances = [{min((src - dst) % 4, (dst - src) % 4) for src, dst in load} for load in check(plan).loads]
    assert distances == [traders, ring, set(), traders]


def test_double_ring_leaves_a_window_once_in_its_rounds() -> None:
    variant = Variant("double_ring", Options(window_size=4))
    plan = plan_for(variant, num_ranks=8, num_heads=4, num_kv_heads=2, causal=False)
    loads = check(plan).loads
    between = [sum(src // 4 != dst // 4 for src, dst in load) for load in loads]
    within = [sum(src // 4 == dst // 4 for src, dst in load) for load in loads]
    assert between == [8, 0, 0, 0, 0, 0, 0, 0] and within == [8, 8, 8, 0, 8, 8, 8, 0]


def test_groups_of_a_degree_do_not_talk_to_each_other() -> None:
    plan = plan_for(Variant("token_ring", degree=4), num_ranks=8, num_heads=4, num_kv_heads=2)
    assert {src // 4 == dst // 4 for load in check(plan).loads for src, dst in load} == {True}
    alone = plan_for("token_ring", num_ranks=4, num_heads=4, num_kv_heads=2)
    assert [r.total() for r in check(plan).loads] == [2 * r.total() for r in check(alone).loads]


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


def test_plans_are_built_and_proven_once() -> None:
    sizes = {"num_ranks": 8, "num_heads": 32, "num_kv_heads": 8}
    assert plan_for("ring_pass_kv", **sizes) is plan_for(Variant("ring_pass_kv"), **sizes)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (Variant("ring"), "unknown strategy 'ring'; known: ring_pass_kv"),
        (Variant("ring_pass_kv", degree=4), "degree: 6 ranks cannot be divided into groups of 4; .*fit: 1, 2, 3, 6"),
        (Variant("local", degree=2), "strategy local takes no degree"),
        (Variant("ulysses"), "6 ranks cannot share 4 query heads: each needs one; sizes that fit: 1, 2, 3"),
        (
            Variant("ring_pass_kv", Options(window_size=2)),
            r"window_size \(--sp-window-size\) is not an option of strategy ring_pass_kv; it is one of: double_ring",
        ),
        (Variant("double_ring", Options(num_rings=2)), r"num_rings \(--sp-num-rings\) is not .*one of: hamilton"),
        (Variant("double_ring", Options(window_size=4)), r"--sp-window-size.*windows of 4; .*fit: 1, 2, 3, 6"),
        (Variant("hybrid", Options(ulysses_degree=4)), r"--sp-ulysses-degree.*teams of 4; .*fit: 1, 2, 3, 6"),
        (rings(6), r"num_rings \(--sp-num-rings\): 1 to 5 rings share no link here, not 6"),
        (rings(0), "1 to 5 rings share no link here, not 0"),
        (Variant("hamilton", Options(ranks_per_node=4)), "ranks_per_node: 6 ranks .*nodes of 4; .*fit: 1, 2, 3"),
        (Variant("hamilton", Options(cycles=((0, 1),))), r"cycles\[0\] .*misses rank 2, 3, 4, 5"),
        (Variant("hamilton", Options(cycles=((0, 1),), ranks_per_node=2)), "leave out ranks_per_node"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(variant: Variant, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_for(variant, num_ranks=6, num_heads=4, num_kv_heads=2)


def test_layouts_that_do_not_fit_are_refused() -> None:
    sizes = {"num_heads": 4, "num_kv_heads": 2}
    with pytest.raises(ValueError, match="works on layouts heads, not zigzag"):
        plan_for("sharded_q", num_ranks=2, kind="zigzag", **sizes)
    with pytest.raises(ValueError, match="sizes that fit: 1, 2, 4"):
        plan_for("sharded_q", num_ranks=3, **sizes)
    with pytest.raises(ValueError, match="layout heads spreads every sequence over all ranks"):
        plan_for(Variant("sharded_q", degree=2), num_ranks=4, **sizes)


def test_an_unproven_plan_is_refused_with_the_reasons() -> None:
    empty = Plan("nothing", Layout(2, "zigzag", 4, 2), (Round(),))
    with pytest.raises(PlanError, match="kv0, slice 0/1, missing"):
        prove(empty)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("causal", [True, False])
def test_every_rank_takes_part_in_the_rounds_that_bounds_on_its_time_count(num_ranks: int, causal: bool) -> None:
    for variant in [Variant("local"), *variants(num_ranks, 24), *variants(num_ranks, 24, "heads")]:
        plan = plan_for(variant, num_ranks=num_ranks, num_heads=24, num_kv_heads=8, causal=causal, proven=False)
        degree = 1 if variant.strategy == "local" else variant.degree or num_ranks
        for rank in range(num_ranks):
            busy = sum(any(part) for part in plan.for_rank(rank))
            assert busy >= least_of(variant, degree).rounds, f"{variant} on rank {rank}"


def test_where_rings_are_too_few_hamilton_takes_as_few_rounds_as_pieces() -> None:
    plan = plan_for("hamilton", num_ranks=30, num_heads=24, num_kv_heads=8, proven=False)
    assert len(plan.rounds) == least_of(Variant("hamilton"), 30).rounds == 16
