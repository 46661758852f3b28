"""Predicted times: when communication is hidden, who shares what, and what a step is made of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sp_backend.cost import Cost, PlanCost
from sp_backend.geometry import predicted_bytes
from sp_backend.least import least_seconds
from sp_backend.placement import lay_out
from sp_backend.planner import OFF
from sp_backend.presets import preset
from sp_backend.shape import ModelShape, Sizes
from sp_backend.strategies import Options, Variant, least_of, plan_for, variants
from sp_backend.topology import Machine
from tests.sp_backend.machines import BANDWIDTH, FLOPS, IDEAL, LLAMA_70B, MHA, mesh, one, plan_of, switch

GQA16 = replace(LLAMA_70B, num_heads=128)


def cost(variant: Variant | str, machine: Machine, shape: ModelShape, new: int, cached: int = 0) -> Cost:
    plan = plan_of(variant, machine.num_ranks, shape)
    return PlanCost(plan, machine, shape).cost(one(plan, new, cached))


def new_tokens(effective: float, cached: int) -> int:
    """The T whose T (C + T/2) / (C + T) is `effective`."""
    low, high = 0.0, 4 * effective
    while high - low > 0.5:
        mid = (low + high) / 2
        low, high = (mid, high) if mid * (cached + mid / 2) / (cached + mid) < effective else (low, mid)
    return round(high)


# When is a ring's communication hidden? One step computes 4 H D (T C + T^2/2) / P^2 / F and sends
# 2 Hkv D e (T + C) / P / (R BW), for R rings on links of their own.


@pytest.mark.parametrize("num_ranks", [4, 8])
@pytest.mark.parametrize("shape", [LLAMA_70B, GQA16, MHA], ids=["8:1", "16:1", "MHA"])
@pytest.mark.parametrize("cached", [0, 1 << 20])
@pytest.mark.parametrize("name", ["ring_pass_kv", "ring_pass_kv_up"])
def test_pass_kv_is_hidden_from_the_effective_length_on(
    name: str, cached: int, shape: ModelShape, num_ranks: int
) -> None:
    """Both ways round: dropping halves saves bytes and not the critical path."""
    threshold = num_ranks * FLOPS * shape.itemsize * shape.num_kv_heads / (2 * shape.num_heads * BANDWIDTH)
    below, above = (new_tokens(threshold * factor, cached) for factor in (0.9, 1.1))
    machine = switch(num_ranks)
    assert cost(name, machine, shape, above, cached).exposed == pytest.approx(0, abs=1e-9)
    assert cost(name, machine, shape, below, cached).exposed > 0


@pytest.mark.parametrize("num_rings", [2, 7])
def test_rings_on_links_of_their_own_divide_the_threshold(num_rings: int) -> None:
    variant = Variant("hamilton", Options(num_rings=num_rings))
    threshold = 8 * FLOPS * MHA.itemsize / (2 * BANDWIDTH) / num_rings
    assert cost(variant, mesh(8), MHA, new_tokens(1.1 * threshold, 0)).exposed == pytest.approx(0, abs=1e-9)
    assert cost(variant, mesh(8), MHA, new_tokens(0.9 * threshold, 0)).exposed > 0
    assert cost("ring_pass_kv", mesh(8), MHA, new_tokens(1.1 * threshold, 0)).exposed > 0


def test_rings_on_one_port_gain_nothing() -> None:
    """Through a switch all of a rank's rings leave by one port."""
    rings = Variant("hamilton", Options(num_rings=7))
    one_ring, many = cost("ring_pass_kv_up", switch(8), MHA, 4096), cost(rings, switch(8), MHA, 4096)
    assert many.seconds >= 0.99 * one_ring.seconds


@pytest.mark.parametrize("cached", [0, 1 << 17])
def test_queries_that_move_are_hidden_from_a_context_on_that_new_tokens_do_not_change(cached: int) -> None:
    """(C + T/2) >= P F e / (4 BW) in one direction. What remains: the first Q beyond a rank's work on the first half of
    its own, and the last state's way home beyond that on the second half.
    """
    machine = mesh(4)
    threshold = 4 * FLOPS * MHA.itemsize / (4 * BANDWIDTH)
    new = max(512, round(2.2 * (threshold - cached)))
    chunk, pair = new / 8, 4 * MHA.num_heads * MHA.head_dim / FLOPS
    q = 2 * chunk * MHA.num_heads * MHA.head_dim * MHA.itemsize / BANDWIDTH
    state = q + 2 * chunk * MHA.num_heads * 4 / BANDWIDTH
    first, second = (pair * chunk * (seen * chunk + cached / 4) for seen in (0.5, 1.5))
    remains = max(0.0, q - first) + max(0.0, state - second)
    assert cost("token_ring", machine, MHA, new, cached).exposed == pytest.approx(remains, rel=0.02, abs=1e-9)
    assert (remains == 0) == bool(cached)
    if not cached:
        hidden_not = cost("token_ring", machine, MHA, round(1.6 * threshold), 0)
        assert hidden_not.exposed > 1.5 * state * 1.6 / 2.2


def test_bytes_are_those_that_the_executor_sends_and_pass_each_resource_of_their_link() -> None:
    machine, plan = preset("pcie4-4"), plan_of("token_ring", 4, LLAMA_70B)
    geometry = lay_out(plan.layout, [(4096, 1000), (77, 0)])
    found = PlanCost(plan, machine, LLAMA_70B).cost(geometry)
    rounds = predicted_bytes(plan, geometry, LLAMA_70B.head_dim, LLAMA_70B.itemsize)
    assert found.total_bytes == sum(sum(links.values()) for links in rounds)
    assert found.resource_bytes["rank0.out"] == sum(n for (src, _), n in found.link_bytes.items() if src == 0)
    crossing = sum(n for (src, dst), n in found.link_bytes.items() if src < 2 <= dst)
    assert found.resource_bytes["switch0.out"] == found.resource_bytes["switch1.in"] == crossing


def test_transfers_that_share_a_resource_share_its_bytes() -> None:
    """Two ranks behind one port to the root: both of their messages take twice as long."""
    alone, together = mesh(4), preset("pcie4-4")
    together = replace(together, rates=IDEAL, topology=together.topology.scaled(latency=0.0))
    alone = replace(alone, topology=alone.topology.scaled(22e9 / BANDWIDTH))
    exchange = Variant("all_gather_kv")
    kv = 2 * MHA.num_kv_heads * MHA.head_dim * MHA.itemsize * 64 / 4
    assert cost(exchange, alone, MHA, 64).seconds == pytest.approx(kv / 22e9, rel=0.01)
    # each switch's port to the root carries 2 x 2 of the 3 blocks that each of its ranks sends
    assert cost(exchange, together, MHA, 64).seconds == pytest.approx(4 * kv / 22e9, rel=0.01)


@pytest.mark.parametrize(("overlap", "factor"), [(1.0, 1.0), (0.5, 1.5), (0.0, 2.0)])
def test_a_rank_that_carries_its_own_transfers_computes_less_meanwhile(overlap: float, factor: float) -> None:
    """At the threshold a round's transfer takes as long as its compute; the last round has none."""
    threshold = 2 * FLOPS * MHA.itemsize / (2 * BANDWIDTH)
    machine = switch(2, replace(IDEAL, overlap=overlap))
    found = cost("ring_pass_kv_up", machine, MHA, new_tokens(threshold, 0))
    compute = cost("ring_pass_kv_up", switch(2, bandwidth=1e30), MHA, new_tokens(threshold, 0)).seconds
    assert found.seconds == pytest.approx(compute * (1 + factor) / 2, rel=0.01)


def test_fixed_costs_are_counted_once_for_each_round_message_and_call() -> None:
    rates = replace(IDEAL, round_seconds=1.0, message_seconds=10.0, call_seconds=100.0)
    found = cost("ring_pass_kv_up", switch(2, rates, bandwidth=1e30), MHA, 64)
    # two rounds; a message out and one in; a call over a rank's own keys, then one over the peer's
    assert found.seconds == pytest.approx(2 * 1 + 2 * 10 + 2 * 100, rel=0.01)


def test_a_step_is_all_layers_and_the_dense_work_of_the_busiest_rank() -> None:
    spread, off = (cost(v, switch(4), LLAMA_70B, 4096) for v in ("ring_pass_kv", OFF))
    dense = LLAMA_70B.dense_flops * 4096 / FLOPS
    assert off.step_seconds == pytest.approx(LLAMA_70B.num_layers * off.seconds + dense)
    assert spread.step_seconds == pytest.approx(LLAMA_70B.num_layers * spread.seconds + dense / 4)
    assert off.total_bytes == 0 and off.exposed == 0


def test_few_tokens_cost_the_reading_of_the_weights() -> None:
    machine = switch(2, replace(IDEAL, memory_bytes=1e12))
    weights = LLAMA_70B.dense_flops / 2 * LLAMA_70B.itemsize
    for variant in ("ring_pass_kv", OFF):
        assert cost(variant, machine, LLAMA_70B, 2).step_seconds == pytest.approx(weights / 1e12, rel=0.01)


def test_prompts_at_home_on_different_ranks_run_beside_each_other() -> None:
    plan = plan_of(OFF, 4, LLAMA_70B)
    one_prompt, four, five = (
        PlanCost(plan, switch(4), LLAMA_70B).cost(lay_out(plan.layout, [(4096, 0)] * n)).step_seconds for n in (1, 4, 5)
    )
    assert four == pytest.approx(one_prompt) and five == pytest.approx(2 * one_prompt)


def test_rounds_say_where_the_time_goes() -> None:
    found = cost("ring_pass_kv_up", switch(4), MHA, 1024)
    assert len(found.rounds) == 5 and found.rounds[-1].compute == 0
    assert found.seconds == pytest.approx(sum(r.compute + r.wait for r in found.rounds), rel=0.05)
    assert found.rounds[0].transfer == pytest.approx(1024 / 4 * 2 * 32 * 128 * 2 / BANDWIDTH)


def test_a_machine_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="a plan of 4 ranks on a machine of 8"):
        cost_of = plan_of("ring_pass_kv", 4, MHA)
        PlanCost(cost_of, switch(8), MHA)


@pytest.mark.parametrize("topology", ["nvlink4-4", "pcie4-3", "2xnvlink4-4/nic400", "nic200-16"])
@pytest.mark.parametrize("batch", [[(4096, 0)], [(100, 20000)], [(7, 3)], [(300, 5), (7000, 0), (64, 9000)]])
@pytest.mark.parametrize(("causal", "page_size"), [(True, 64), (True, 1), (False, 16)])
def test_no_plan_takes_less_than_the_least(
    topology: str, batch: list[tuple[int, int]], causal: bool, page_size: int
) -> None:
    machine, shape = preset(topology), LLAMA_70B
    ranks, heads = machine.num_ranks, shape.num_heads
    for variant in [OFF, *variants(ranks, heads), *variants(ranks, heads, "heads")]:
        plan = plan_for(variant, num_ranks=ranks, num_heads=heads, num_kv_heads=8, causal=causal, proven=False)
        geometry, cost_of = lay_out(plan.layout, batch, page_size), PlanCost(plan, machine, shape)
        found = cost_of.cost(geometry)
        of = least_of(variant, 1 if variant == OFF else variant.degree or ranks)
        attention, step = least_seconds(machine, shape, batch, of, causal=causal, page_size=page_size)
        busy, busy_step = cost_of.least_seconds(Sizes.of(geometry))
        assert attention <= busy <= found.seconds * (1 + 1e-9) and step <= busy_step <= found.step_seconds * (1 + 1e-9)
