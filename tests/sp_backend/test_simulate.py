"""The simulator: fair sharing, waits and order by hand-made cases, and agreement with cost on everything else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sp_backend.cost import PlanCost
from sp_backend.geometry import Geometry
from sp_backend.layout import KV, Block
from sp_backend.placement import lay_out
from sp_backend.plan import Plan, Round, Transfer
from sp_backend.planner import OFF
from sp_backend.presets import preset
from sp_backend.shape import ModelShape
from sp_backend.simulate import Simulation, perturbed, simulate
from sp_backend.strategies import Variant, plan_for, variants
from sp_backend.topology import Link, Machine, Topology
from tests.sp_backend.machines import BANDWIDTH, IDEAL, LLAMA_70B, MHA, SMALL, mesh, one, plan_of, switch

MACHINES = ["nvlink4-4", "pcie4-4", "nic200-3", "loopback-2", "2xpcie5-2/nic200", "2xnvlink4-3/nic400-shared"]


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("batch", [[(300, 0)], [(8192, 0)], [(700, 60000), (5000, 100)]], ids=str)
def test_cost_estimates_what_the_simulator_finds(name: str, batch: list[tuple[int, int]]) -> None:
    machine = preset(name)
    shape = SMALL if name.startswith("loopback") else LLAMA_70B
    for variant in (OFF, *variants(machine.num_ranks, shape.num_heads)):
        plan = plan_of(variant, machine.num_ranks, shape)
        geometry = lay_out(plan.layout, batch, page_size=16)
        estimate = PlanCost(plan, machine, shape).cost(geometry)
        assert simulate(plan, machine, shape, geometry).seconds == pytest.approx(estimate.seconds, rel=0.2), str(
            variant
        )
        step = simulate(plan, machine, shape, geometry, dense=True).step_seconds
        assert step == pytest.approx(estimate.step_seconds, rel=0.08), str(variant)


def transfers_only(machine: Machine, sizes: dict[tuple[int, int], int], shape: ModelShape = MHA) -> Simulation:
    """One round in which ranks send their chunk, of the sizes given by its rows, and compute nothing."""
    plan = plan_of(Variant("all_gather_kv"), machine.num_ranks, shape)
    layout = replace(plan.layout, kind="contiguous", history="none")
    owned = {layout.owner(b.chunk): b for b, r in layout.start() if b.operand == "KV"}
    round_ = Round(tuple(Transfer(owned[src], src, dst) for src, dst in sizes), ())
    rows = [[0] * machine.num_ranks]
    for (src, _), n in sizes.items():
        rows[0][src] = n
    return simulate(Plan("wires", layout, (round_,)), machine, shape, Geometry(rows))


def ends(simulation: Simulation) -> dict[tuple[int, str], float]:
    return {(e.rank, e.name): e.end for e in simulation.timeline if e.kind == "send"}


ROW = 2 * MHA.num_kv_heads * MHA.head_dim * MHA.itemsize / BANDWIDTH  # seconds of one row on a wire of its own


def test_a_message_takes_its_latency_and_its_bytes() -> None:
    assert transfers_only(mesh(2, latency=1.0), {(0, 1): 100}).seconds == pytest.approx(1 + 100 * ROW)


def test_messages_on_one_port_share_it_until_the_shorter_is_through() -> None:
    found = ends(transfers_only(switch(3), {(0, 2): 100, (1, 2): 300}))
    assert sorted(found.values()) == pytest.approx([200 * ROW, 400 * ROW])


def test_a_link_carries_its_messages_in_the_order_of_their_posting() -> None:
    plan = plan_of(Variant("all_gather_kv"), 2, MHA)
    layout = replace(plan.layout, kind="contiguous", history="none")
    halves = [Block(KV, 0, layout.all_heads, (i, 2)) for i in range(2)]
    rounds = tuple(Round((Transfer(half, 0, 1),), ()) for half in halves)
    found = ends(simulate(Plan("halves", layout, rounds), mesh(2), MHA, Geometry([[300, 0]])))
    assert sorted(found.values()) == pytest.approx([150 * ROW, 300 * ROW])


def test_rates_are_max_min_fair() -> None:
    """A slow port frees what it cannot use for others: of port `a`, one message gets a tenth, the other the rest."""
    links = (Link(0, 1, 0.0, ("a", "slow")), Link(2, 1, 0.0, ("a",)))
    others = [(0, 2), (1, 0), (1, 2), (2, 0)]
    wires = tuple(Link(a, b, 0.0, (f"{a}>{b}",)) for a, b in others)
    resources = {"a": BANDWIDTH, "slow": BANDWIDTH / 10} | {f"{a}>{b}": BANDWIDTH for a, b in others}
    machine = Machine("uneven", Topology(3, resources, links + wires), IDEAL)
    found = ends(transfers_only(machine, {(0, 1): 100, (2, 1): 900}))
    assert sorted(found.values()) == pytest.approx([1000 * ROW, 1000 * ROW])


def test_each_rank_does_one_thing_at_a_time_in_order() -> None:
    plan = plan_of("token_ring", 4, LLAMA_70B)
    found = simulate(plan, preset("pcie4-4"), LLAMA_70B, one(plan, 4096, 5000))
    for rank in range(4):
        mine = [e for e in found.timeline if e.rank == rank and e.kind != "send"]
        assert all(a.end <= b.start + 1e-12 for a, b in zip(mine, mine[1:], strict=False))
    assert max(e.end for e in found.timeline) == pytest.approx(found.seconds)
    assert {e.kind for e in found.timeline} >= {"overhead", "pack", "attend", "merge", "send", "wait"}


def test_the_timeline_adds_up() -> None:
    plan = plan_of("ring_pass_kv_up", 4, MHA)
    found = simulate(plan, switch(4), MHA, one(plan, 1024))
    for rank in range(4):
        last = max(e.end for e in found.timeline if e.rank == rank and e.kind != "send")
        assert found.spent(rank, "attend") + found.spent(rank, "wait") == pytest.approx(last, rel=0.02)


def test_contiguous_chunks_leave_the_first_ranks_waiting() -> None:
    """The last rank attends nearly all the time, the first nearly never: what zigzag is for."""
    plan = plan_for("ring_pass_kv_up", num_ranks=4, num_heads=32, num_kv_heads=32, kind="contiguous")
    found = simulate(plan, switch(4), MHA, one(plan, 65536))
    assert found.spent(3, "attend") == pytest.approx(found.seconds, rel=0.05)
    assert found.spent(0, "attend") == pytest.approx(found.seconds / 7, rel=0.05)


def test_overlap_off_stops_compute_while_messages_are_in_flight() -> None:
    plan = plan_of("ring_pass_kv_up", 2, MHA)
    slow = simulate(plan, switch(2, replace(IDEAL, overlap=0.0)), MHA, one(plan, 8192))
    fast = simulate(plan, switch(2), MHA, one(plan, 8192))
    transfer = 4096 * ROW
    assert slow.seconds == pytest.approx(fast.seconds + transfer, rel=0.01)


def test_jitter_is_drawn_from_the_seed() -> None:
    plan = plan_of("ring_pass_kv", 4, MHA)
    runs = [simulate(plan, switch(4), MHA, one(plan, 4096), jitter=0.1, seed=s).seconds for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_perturbed_machine_is_within_its_spread_and_the_same_for_a_seed() -> None:
    machine = preset("2xnvlink4-2/nic400")
    other = perturbed(machine, 0.3, seed=3)
    assert other == perturbed(machine, 0.3, seed=3) != perturbed(machine, 0.3, seed=4)
    for name, capacity in machine.topology.resources.items():
        assert 0.7 <= other.topology.resources[name] / capacity <= 1.3
    assert 0.7 <= other.rates.kernel.causal[-1] / machine.rates.kernel.causal[-1] <= 1.3
    assert other.rates.overlap == machine.rates.overlap


def test_a_machine_of_another_size_is_refused() -> None:
    plan = plan_of("ring_pass_kv", 4, MHA)
    with pytest.raises(ValueError, match="a plan of 4 ranks on a machine of 8"):
        simulate(plan, switch(8), MHA, one(plan, 64))
