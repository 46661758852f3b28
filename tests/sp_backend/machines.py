"""Machines and batches for the tests of cost, simulation and planner."""

from __future__ import annotations

from dataclasses import replace

from sp_backend.geometry import Geometry
from sp_backend.placement import lay_out
from sp_backend.plan import Plan
from sp_backend.shape import ModelShape
from sp_backend.strategies import Variant, plan_for
from sp_backend.topology import KernelRates, Link, Machine, Rates, Topology

FLOPS, BANDWIDTH = 100e12, 50e9
LLAMA_70B = ModelShape(num_heads=64, num_kv_heads=8, head_dim=128, num_layers=80, dense_flops=140e9)
MHA = ModelShape(num_heads=32, num_kv_heads=32, head_dim=128, num_layers=32, dense_flops=14e9)
SMALL = ModelShape(num_heads=12, num_kv_heads=4, head_dim=32, num_layers=4, dense_flops=6e6)
# attention at one rate, all else free: what the rules of thumb assume
IDEAL = Rates(
    kernel=KernelRates((1,), (1,), ((FLOPS,),), (FLOPS,)),
    dense_flops=FLOPS,
    memory_bytes=1e30,
    merge_bytes=1e30,
    copy_bytes=1e30,
    call_seconds=0.0,
    fold_seconds=0.0,
    round_seconds=0.0,
    message_seconds=0.0,
    step_seconds=0.0,
    overlap=1.0,
)


def mesh(num_ranks: int, rates: Rates = IDEAL, bandwidth: float = BANDWIDTH, latency: float = 0.0) -> Machine:
    """A wire of its own for every ordered pair."""
    pairs = [(a, b) for a in range(num_ranks) for b in range(num_ranks) if a != b]
    wires = tuple(Link(a, b, latency, (f"{a}>{b}",)) for a, b in pairs)
    return Machine("mesh", Topology(num_ranks, {f"{a}>{b}": bandwidth for a, b in pairs}, wires), rates)


def switch(num_ranks: int, rates: Rates = IDEAL, bandwidth: float = BANDWIDTH, latency: float = 0.0) -> Machine:
    """A port out and a port in for every rank."""
    ports = {f"{way}{r}": bandwidth for r in range(num_ranks) for way in ("out", "in")}
    wires = mesh(num_ranks, latency=latency).topology.links
    links = tuple(replace(x, resources=(f"out{x.src}", f"in{x.dst}")) for x in wires)
    return Machine("switch", Topology(num_ranks, ports, links), rates)


def plan_of(variant: Variant | str, num_ranks: int, shape: ModelShape) -> Plan:
    return plan_for(variant, num_ranks=num_ranks, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads)


def one(plan: Plan, new: int, cached: int = 0) -> Geometry:
    return lay_out(plan.layout, [(new, cached)])
