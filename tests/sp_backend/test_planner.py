"""What the planner chooses, how near that is to the best, and what it says about it."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import cache
from random import Random

import pytest

from sp_backend.layout import Layout
from sp_backend.placement import Batch, lay_out
from sp_backend.planner import OFF, Planner
from sp_backend.presets import load_machine
from sp_backend.shape import ModelShape
from sp_backend.simulate import perturbed, simulate
from sp_backend.strategies import Variant, plan_for
from sp_backend.topology import Machine
from tests.sp_backend.machines import LLAMA_70B, MHA, SMALL, switch

SHAPES = {"llama": LLAMA_70B, "mha": MHA, "small": SMALL}


@cache
def planner(machine: str, shape: str = "llama") -> Planner:
    found = load_machine(machine)
    return Planner(found, SHAPES[shape], found.num_ranks)


# Regret


def cases(number: int) -> list[tuple[str, str, Batch]]:
    random, found = Random(7), []
    machines = ["nvlink4-4", "pcie4-4", "nic200-4", "pcie4-2", "2xpcie5-2/nic200", "loopback-2"]
    for i in range(number):
        machine = machines[i % len(machines)]
        shape = "small" if machine.startswith("loopback") else random.choice(("llama", "mha"))
        new = round(2 ** random.uniform(7, 17))
        cached = random.choice((0, round(2 ** random.uniform(8, 18)), 9 * new, 99 * new))
        found.append((machine, shape, [(new, min(cached, 1 << 20))]))
    return found


def regret(chooser: Planner, shape: ModelShape, machine: Machine, batch: Batch) -> float:
    """chosen / best - 1, as the simulator finds it on a machine; what is far from the best need not be simulated."""
    choice = chooser.choose(batch)
    seconds = {
        c.variant: simulate(c.plan, machine, shape, c.geometry, dense=True).step_seconds
        for c in chooser.rank_candidates(batch)
        if c.cost.step_seconds < 1.8 * choice.seconds
    }
    return seconds[choice.variant] / min(seconds.values()) - 1


def test_a_choice_is_near_the_best_as_the_simulator_finds_it() -> None:
    found = [regret(planner(m, s), SHAPES[s], planner(m, s).machine, batch) for m, s, batch in cases(36)]
    assert statistics.median(found) <= 0.01 and max(found) <= 0.10


def test_a_choice_is_near_the_best_on_machines_that_are_not_quite_as_described() -> None:
    """Links and rates off by up to 30 %. One in twenty may be a near tie that went the other way; the whole grid is in
    benchmarks.planner.
    """
    machines = [perturbed(planner(m, s).machine, 0.3, seed) for seed, (m, s, _) in enumerate(cases(42))]
    found = [
        regret(planner(m, s), SHAPES[s], there, batch) for (m, s, batch), there in zip(cases(42), machines, strict=True)
    ]
    assert statistics.median(found) <= 0.03
    assert sum(r > 0.10 for r in found) <= len(found) / 20


@pytest.mark.parametrize("machine", ["nvlink4-4", "2xpcie5-2/nic200"])
def test_what_is_looked_up_for_one_prompt_is_the_cost_of_the_very_batch(machine: str) -> None:
    """Few pages are cut unevenly: a page more or less is seen."""
    found = load_machine(machine)
    random, chooser = Random(1), Planner(found, MHA, found.num_ranks, page_size=64)
    for _ in range(30):
        batch = [(round(2 ** random.uniform(4, 14)), random.choice((0, round(2 ** random.uniform(6, 19)))))]
        choice = chooser.choose(batch)
        exact = {c.variant: c.cost.step_seconds for c in chooser.rank_candidates(batch)}
        assert choice.seconds == pytest.approx(exact[choice.variant], rel=0.04)
        assert exact[choice.variant] <= 1.04 * min(exact.values()) or choice.variant == OFF
        assert choice.off_seconds == pytest.approx(exact[OFF], rel=0.01)


@pytest.mark.parametrize("machine", ["nvlink4-4", "2xpcie5-2/nic200"])
def test_unlike_prompts_that_share_a_step_are_put_together(machine: str) -> None:
    """One computes while the messages of another travel; all read the weights once."""
    random, chooser, errors = Random(1), planner(machine), []
    for _ in range(20):
        batch = [
            (round(2 ** random.uniform(6, 15)), random.choice((0, round(2 ** random.uniform(8, 18)))))
            for _ in range(random.choice((2, 3, 4)))
        ]
        choice = chooser.choose(batch)
        exact = {c.variant: c.cost.step_seconds for c in chooser.rank_candidates(batch)}
        errors.append(abs(choice.seconds / exact[choice.variant] - 1))
        assert exact[choice.variant] <= 1.1 * min(exact.values())
        assert choice.off_seconds == pytest.approx(exact[OFF], rel=0.01)
    assert statistics.median(errors) <= 0.01 and max(errors) <= 0.12


# Choices


def test_few_tokens_stay_on_one_rank_and_many_are_spread_over_all() -> None:
    chooser = planner("nvlink4-4")
    assert chooser.choose([(16, 0)]).variant == OFF and chooser.degree_for(16, 0) == 1
    assert chooser.degree_for(100_000, 0) == 4
    degrees = [chooser.degree_for(2**k, 0) for k in range(4, 18)]
    assert degrees == sorted(degrees)


@pytest.mark.parametrize(("machine", "shape"), [("nvlink4-4", "llama"), ("loopback-2", "small")])
def test_the_degree_of_a_prompt_is_that_of_its_pages(machine: str, shape: str) -> None:
    """Asked again it is known, but not on a machine at other rates."""
    random = Random(5)
    for delay in (0.0, 4e-3):
        chooser = Planner(load_machine(machine), SHAPES[shape], planner(machine).num_ranks, page_size=64, delay=delay)
        prompts = [(int(2 ** random.uniform(0, 17)), int(2 ** random.uniform(-1, 17))) for _ in range(200)]
        whole = [(-(-new // 64) * 64, -(-cached // 64) * 64) for new, cached in prompts]
        other = chooser.on(replace(chooser.machine, error=0.9))  # sharing has to pay more there
        for asked in (chooser, chooser, other):
            found = [asked.degree_for(*prompt) for prompt in prompts]
            assert found == [asked.choose([prompt]).degree for prompt in whole]
            assert len(set(found)) > 1 or asked is other


def test_off_wins_unless_sharing_gains_more_than_its_margin() -> None:
    """A link so slow that nothing is worth sending, and one so slow that only long prompts are."""
    for bandwidth, long in ((1e5, 1), (1e9, 4)):
        chooser = Planner(switch(4, bandwidth=bandwidth), MHA, 4)
        assert chooser.degree_for(256, 0) == 1
        assert chooser.degree_for(1 << 17, 0) == long
        for new in (256, 4096, 1 << 17):
            choice = chooser.choose([(new, 0)])
            assert choice.off_seconds is not None and choice.seconds <= choice.off_seconds


def test_a_long_cached_prefix_makes_queries_travel() -> None:
    slow = planner("nic200-4")
    assert slow.choose([(512, 400_000)]).variant.strategy in ("token_ring", "ring_pass_q")
    assert slow.choose([(65536, 0)]).variant.strategy in ("ring_pass_kv", "ring_pass_kv_up", "all_gather_kv")


def test_prompts_that_fill_the_ranks_need_not_be_shared() -> None:
    chooser = planner("nic200-4")
    assert chooser.choose([(2048, 0)]).variant != OFF
    assert chooser.choose([(2048, 0)] * 4).variant == OFF


def test_a_degree_that_is_given_is_kept() -> None:
    chooser = planner("nvlink4-4")
    for degree in chooser.degrees:
        choice = chooser.choose([(5000, 0), (100, 7000)], degree)
        assert choice.degree == degree and (choice.variant == OFF) == (degree == 1)
    with pytest.raises(ValueError, match=r"degree is 3; this planner has 1, "):
        chooser.choose([(5000, 0)], 3)


def test_workers_need_only_the_winners() -> None:
    chooser, random = planner("2xpcie5-2/nic200"), Random(2)
    assert chooser.winners[0] == OFF and len(chooser.winners) < len(chooser.candidates) / 2
    for _ in range(200):
        batch = [(round(2 ** random.uniform(0, 20)), round(2 ** random.uniform(0, 20))) for _ in range(3)]
        for degree in (None, *chooser.degrees):
            assert chooser.choose(batch, degree).variant in chooser.winners


def test_a_forced_strategy_leaves_it_and_off() -> None:
    forced = Planner(load_machine("nvlink4-4"), LLAMA_70B, 4, candidates=[Variant("token_ring")])
    assert forced.winners == [OFF, Variant("token_ring")]
    assert forced.choose([(100_000, 0)]).variant == Variant("token_ring")


def test_layout_heads_has_no_off() -> None:
    heads = Planner(load_machine("nvlink4-4"), LLAMA_70B, 4, layout="heads")
    assert heads.winners == [Variant("sharded_q")] and heads.choose([(16, 0)]).off_seconds is None


def test_redundant_kv_costs_its_projections_on_every_rank() -> None:
    shape = replace(LLAMA_70B, kv_flops=LLAMA_70B.dense_flops / 10)
    exchanged, redundant = (
        Planner(load_machine("nvlink4-4"), shape, 4, layout="heads", redundant_kv=redundant).choose([(8192, 0)])
        for redundant in (False, True)
    )
    dense = 8192 * shape.dense_flops / load_machine("nvlink4-4").rates.dense_flops
    assert redundant.seconds - exchanged.seconds == pytest.approx(dense / 10 * 3 / 4, rel=0.3)
    assert redundant.reason.startswith("sharded_q: ") and redundant.off_seconds is None


def test_one_rank_is_off() -> None:
    assert Planner(load_machine("nvlink4-8"), LLAMA_70B, 1).choose([(100_000, 5)]).variant == OFF


def test_a_machine_with_too_few_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="a topology of 4 ranks has no 8"):
        Planner(load_machine("nvlink4-4"), LLAMA_70B, 8)


def test_a_reason_says_what_moves_and_what_is_gained() -> None:
    choice, off = planner("nvlink4-4").choose([(100_000, 0)]), planner("nvlink4-4").choose([(16, 0)]).reason
    spread = choice.reason
    assert spread.startswith(f"{choice.variant}: ") and "KV 410 MB a layer; communication hidden; " in spread
    assert spread.endswith("x over off")
    assert off.startswith("off: ") and off.endswith("sharing one gains less than 8%")


def test_sharing_has_to_gain_more_than_ranks_are_held_up() -> None:
    """A delay moves the border to where the gain is larger than it; what is predicted stays the same."""
    calm, busy = planner("loopback-2", "small"), Planner(load_machine("loopback-2"), SMALL, 2, delay=0.01)
    lengths = range(16, 2048, 16)
    for plan in (calm, busy):
        assert {plan.degree_for(16, 0), plan.degree_for(2032, 0)} == {1, 2}
    border = next(n for n in lengths if busy.degree_for(n, 0) == 2)
    shared, off = calm.choose([(border, 0)]), busy.choose([(border - 16, 0)])
    assert shared.degree == 2 and shared.off_seconds is not None and shared.off_seconds - shared.seconds > 0.01
    assert off.reason.endswith("sharing one gains less than 8% and 10 ms")
    assert busy.choose([(border, 0)]).seconds == shared.seconds


def test_candidates_are_ranked_for_the_very_batch() -> None:
    ranked = planner("nvlink4-4").rank_candidates([(4096, 100)])
    seconds = [c.cost.step_seconds for c in ranked]
    assert seconds == sorted(seconds) and {c.variant for c in ranked} == set(planner("nvlink4-4").candidates)
    assert all(c.degree == 1 and c.cost.total_bytes == 0 for c in ranked if c.variant == OFF)


# Placing prompts


def test_prompts_are_laid_out_whole_the_largest_first_on_the_group_with_least_work() -> None:
    layout: Layout = plan_for(Variant("ring_pass_kv", degree=2), num_ranks=4, num_heads=4, num_kv_heads=4).layout
    rows = lay_out(layout, [(100, 50), (1000, 0), (7, 3000)], page_size=10).rows
    groups = [(range(0, 4), range(8, 10)), (range(4, 8), range(10, 12))]
    held = [[(sum(row[c] for c in new), sum(row[c] for c in old)) for new, old in groups] for row in rows]
    assert held == [[(0, 0), (100, 50)], [(1000, 0), (0, 0)], [(0, 0), (7, 3000)]]
    assert all(n % 10 == 0 for n in rows[1][:3])


def test_off_puts_prompts_on_ranks_of_their_own() -> None:
    layout = plan_for(OFF, num_ranks=2, num_heads=4, num_kv_heads=4).layout
    assert lay_out(layout, [(10, 4), (20, 0)]).rows == [[0, 10, 0, 4], [20, 0, 0, 0]]


def test_no_dense_work_is_a_shape_too() -> None:
    """The library's function knows only attention."""
    shape = ModelShape(num_heads=8, num_kv_heads=8, head_dim=64)
    assert Planner(load_machine("loopback-2"), shape, 2).choose([(8192, 0)]).degree == 2
