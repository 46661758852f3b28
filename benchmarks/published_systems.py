"""What others measured, as cases of the cost model: one system a function, whose arguments are what was assumed.

A system's constants (peak rate, bandwidth, fixed time of a pass) are fitted on the rows that say so: one node, a plain
ring or a message on a link. Every other row is predicted. What is not fitted comes from the preset named in the case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Literal

from sp_backend.cost import Cost, PlanCost
from sp_backend.geometry import Geometry
from sp_backend.layout import Kind
from sp_backend.placement import lay_out
from sp_backend.plan import Plan
from sp_backend.presets import preset
from sp_backend.shape import ModelShape
from sp_backend.simulate import simulate
from sp_backend.strategies import Options, Variant, plan_for
from sp_backend.topology import Machine, Topology

Constant = Literal["slowness", "byte_seconds", "pass_seconds"]
RING: Final = Variant("ring_pass_kv_up")  # every ring read upwards; none drops halves
PASS_Q: Final = Variant("ring_pass_q")
TOKEN_RING: Final = Variant("token_ring")
FOUR_RINGS: Final = Variant("hamilton", Options(num_rings=4))


@dataclass(frozen=True, slots=True)
class Constants:
    """What is fitted, as times, in which a baseline's own time is close to linear."""

    slowness: float = 1.0  # of all computing, relative to the preset
    byte_seconds: float = 0.0  # of what the case's `limit` says; 0: as the preset has it
    pass_seconds: float = 1e-3  # of a forward pass, whatever its size


Limit = Callable[[Topology, float], Topology]


def connections(topology: Topology, capacity: float) -> Topology:
    """Each ordered pair's connection carries at most `capacity` bytes/s, beside what it shares with others."""
    own = {link: f"connection{link.src}>{link.dst}" for link in topology.links}
    links = tuple(replace(link, resources=(*link.resources, name)) for link, name in own.items())
    return Topology(topology.num_ranks, {**topology.resources, **dict.fromkeys(own.values(), capacity)}, links)


def ports(topology: Topology, capacity: float) -> Topology:
    """Whatever connections share carries `capacity` bytes/s."""
    return replace(topology, resources=dict.fromkeys(topology.resources, capacity))


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    published: float
    unit: str
    predict: Callable[[Constants], float]
    fits: Constant | None = None  # the constant solved so that this row is exact


@dataclass(frozen=True, slots=True)
class Winner:
    """The faster one of two, by published and predicted times: indices into the system's rows."""

    what: str
    faster: int
    slower: int


@dataclass(frozen=True, slots=True)
class System:
    name: str
    hardware: str
    source: str
    assumed: str
    rows: tuple[Row, ...]
    winners: tuple[Winner, ...]
    missed: Mapping[str, str] = field(default_factory=dict)  # row -> why its prediction is off, with the evidence


@dataclass(frozen=True, slots=True)
class Case:
    """One batch of one prompt under one strategy on a preset of as many ranks."""

    preset: str
    shape: ModelShape
    variant: Variant
    new: int
    cached: int = 0
    causal: bool = True
    kind: Kind = "zigzag"
    limit: Limit = connections  # what a fitted bandwidth is that of

    def machine(self, constants: Constants) -> Machine:
        machine = preset(self.preset)
        rates = replace(machine.rates.scaled(1 / constants.slowness), step_seconds=constants.pass_seconds)
        topology = machine.topology
        if constants.byte_seconds:
            topology = self.limit(topology, 1 / constants.byte_seconds)
        return replace(machine, topology=topology, rates=rates)

    def plan(self) -> Plan:
        num_ranks = preset(self.preset).num_ranks
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        sizes = {"num_ranks": num_ranks, "num_heads": heads, "num_kv_heads": kv_heads}
        return plan_for(self.variant, causal=self.causal, kind=self.kind, **sizes)

    def cost(self, constants: Constants) -> Cost:
        plan = self.plan()
        return PlanCost(plan, self.machine(constants), self.shape).cost(self.geometry(plan))

    def geometry(self, plan: Plan) -> Geometry:
        return lay_out(plan.layout, [(self.new, self.cached)])

    def attention_ms(self, constants: Constants) -> float:
        return 1e3 * self.cost(constants).seconds

    def transfer_ms(self, constants: Constants, index: int) -> float:
        """Of one round, on the rank where it is longest."""
        return 1e3 * self.cost(constants).rounds[index].transfer

    def pass_seconds(self, constants: Constants) -> float:
        return self.cost(constants).step_seconds

    def computing_share(self, constants: Constants, rank: int) -> float:
        """Percent of the layer's attention, until the last rank is done, in which a rank's kernel runs."""
        plan = self.plan()
        run = simulate(plan, self.machine(constants), self.shape, self.geometry(plan))
        return 100 * run.spent(rank, "attend") / run.seconds


def token_ring(limit: Limit = connections) -> System:
    case = partial(Case, "pcie4-4", ModelShape(32, 32, 128), new=24_000, limit=limit)
    ring, rotate = case(RING), case(TOKEN_RING)
    return System(
        "TokenRing",
        "4 x A10, PCIe 4",
        "TokenRing's profile of its causal test, S = 24,000, H = 32, D = 128",
        "The steps are bound by communication, so a row is a round's longest transfer. One connection of NCCL (fitted "
        "on the ring: 59 % of what a port carries) and the ports and switches of the preset limit it.",
        (
            Row("ring, a step", 7.6, "ms", partial(ring.transfer_ms, index=0), "byte_seconds"),
            Row("TokenRing, a step that sends Q", 3.5, "ms", partial(rotate.transfer_ms, index=0)),
            Row("TokenRing, a step that sends Q and returns states", 4.6, "ms", partial(rotate.transfer_ms, index=2)),
        ),
        (Winner("TokenRing over ring", 2, 0),),
    )


def mindspeed(fitted_on: int = 37_000) -> System:
    case = partial(Case, "nvlink4-8", ModelShape(40, 40, 128), causal=False)
    rows = []
    for tokens, ring_comm, rings_comm, ring, rings in ((18_000, 3.6, 1.2, 33.5, 16.0), (37_000, 8.6, 3.8, 65.6, 45.3)):
        fitted, name = tokens == fitted_on, f"{tokens // 1000}K"
        one, four = case(variant=RING, new=tokens), case(variant=FOUR_RINGS, new=tokens)
        rows += [
            Row(
                f"{name} ring, communication of a step",
                ring_comm,
                "ms",
                partial(one.transfer_ms, index=0),
                "byte_seconds" if fitted else None,
            ),
            Row(f"{name} 4 rings, communication of a step", rings_comm, "ms", partial(four.transfer_ms, index=0)),
            Row(f"{name} ring, attention", ring, "ms", one.attention_ms, "slowness" if fitted else None),
            Row(f"{name} 4 rings, attention", rings, "ms", four.attention_ms),
        ]
    return System(
        "Hamilton in MindSpeed",
        "8 NPUs on a full mesh (not named)",
        "MindSpeed's pull request, WAN2.2, forward, full mask",
        "8 ranks (the mapping in its test; on 16 the ring's communication alone would outlast its attention), lengths "
        "over all ranks, 40 heads of 128 (WAN2.2 A14B; others change nothing, since bandwidth and rate are fitted). "
        "Fitted on the longer ring, where fixed times weigh least; what its communication leaves, 8 % of it, decides "
        "the peak rate.",
        tuple(rows),
        (Winner("18K: 4 rings over one", 3, 2), Winner("37K: 4 rings over one", 7, 6)),
        {
            "18K ring, communication of a step": "18K moved 12.8 GB/s and 37K 11.0: slower for the longer message, "
            "which no bandwidth and latency give together.",
            "18K 4 rings, attention": "At 18K nothing was hidden: beside communication one ring and four leave about "
            "the same (33.5 - 7 x 3.6 = 8.3 and 16.0 - 7 x 1.2 = 7.6 ms). The model hides what it can, as 37K must "
            "have done: four times the work of those 8 ms, and 5.4 ms beside communication.",
            "37K 4 rings, communication of a step": "A rank's four links together carried 38 GB/s at 18K and 25 GB/s "
            "at 37K; four of the fitted rate are 44 for both.",
        },
    )


def pith_train(box: str = "nvlink5-4") -> System:
    case = partial(Case, box, ModelShape(32, 4, 128), RING, new=32_768)
    naive, zigzag = case(kind="contiguous"), case()
    return System(
        "Pith-Train",
        "4 GPUs (not named)",
        "Pith-Train's pull request, Qwen3-30B-A3B, one layer of 32K, forward",
        "NVLink 5. The share of the earlier ranks is read as rank 0's. The published 4.14 and 2.47 ms are read as "
        "naive and zigzag ring.",
        (
            Row("naive ring", 4.14, "ms", naive.attention_ms, "slowness"),
            Row("naive ring, first rank waits", 83.1, "%", lambda c: 100 - naive.computing_share(c, 0)),
            Row("naive ring, last rank computes", 95.2, "%", lambda c: naive.computing_share(c, 3)),
            Row("zigzag ring", 2.47, "ms", zigzag.attention_ms),
        ),
        (Winner("zigzag over contiguous", 3, 0),),
    )


LLAMA_405B: Final = ModelShape(16, 1, 128, num_layers=126, dense_flops=2 * 405e9 / 8)  # one GPU's share of TP 8


def meta(limit: Limit = ports, nominal: bool = False) -> System:
    def prefill(nodes: int, tokens: int = 128_000) -> Case:
        return Case(f"nic400-{nodes}", LLAMA_405B, RING, tokens, limit=limit)

    def partly(variant: Variant, miss: float) -> Case:
        new = round(128_000 * miss)
        return Case("nic400-4", LLAMA_405B, variant, new, 128_000 - new, limit=limit)

    def tipping(constants: Constants) -> float:
        """Percent of new tokens from which on pass-KV is the faster one."""
        low, high = 0.001, 0.5
        while high - low > 0.0005:
            mid = (low + high) / 2
            q, kv = (partly(v, mid).pass_seconds(constants) for v in (PASS_Q, RING))
            low, high = (low, mid) if kv < q else (mid, high)
        return 50 * (low + high)

    scaling = [
        Row(f"128K on {n} nodes", s, "s", prefill(n).pass_seconds)
        for n, s in ((2, 21.04), (4, 10.95), (8, 5.85), (16, 3.8))
    ]
    return System(
        "Meta",
        "nodes of 8 x H100, 400 Gb/s RDMA a GPU",
        "arXiv 2411.01783, Llama 3 405B",
        "A rank is a node, of which one GPU is modelled: heads and weights over TP 8, a NIC of its own, whose rate is "
        "that of the message published (a link's own time, taken in a run of pass-Q); the all-reduces of TP are part "
        "of the fitted peak rate. Weights are read as bf16, though the FFN is FP8. 128K is 128,000. Meta's pass-Q "
        "computes nothing beside its all-to-all, ours half of a rank's own queries: without them 1 % and 10 % new take "
        "0.888 and 2.42 s (-1 and +10 %) and the tie is at 2.4 %.",
        (
            Row("128K on 1 node", 42.01, "s", prefill(1).pass_seconds, "slowness"),
            Row(
                "2.5 % new, one message of Q",
                0.166,
                "ms",
                partial(partly(PASS_Q, 0.025).transfer_ms, index=0),
                None if nominal else "byte_seconds",
            ),
            Row("2.5 % new, pass-Q's all-to-all", 0.424, "ms", partial(partly(PASS_Q, 0.025).transfer_ms, index=4)),
            Row("1 % new, pass-KV", 1.023, "s", partly(RING, 0.01).pass_seconds, "pass_seconds"),
            Row("1 % new, pass-Q", 0.899, "s", partly(PASS_Q, 0.01).pass_seconds),
            Row("10 % new, pass-KV", 2.081, "s", partly(RING, 0.1).pass_seconds),
            Row("10 % new, pass-Q", 2.205, "s", partly(PASS_Q, 0.1).pass_seconds),
            Row("pass-KV faster from", 5.0, "% new", tipping),
            *scaling,
            Row("1M on 16 nodes", 77.0, "s", prefill(16, 1_000_000).pass_seconds),
        ),
        (Winner("1 % new: pass-Q over pass-KV", 4, 3), Winner("10 % new: pass-KV over pass-Q", 5, 6)),
        {
            "pass-KV faster from": "The model hides a message of KV behind a step's attention from about 2.4 % on. A "
            "tie at 5 % needs that message (16.4 MB) to outlast 1.06 ms there, which is 15 GB/s; that of Q went at 20, "
            "the all-to-all at 24.",
        },
    )


SYSTEMS: Final = (token_ring, mindspeed, pith_train, meta)
OTHERWISE: Final[dict[str, Callable[[], System]]] = {  # other assumptions -> the system under them
    "TokenRing: ports and switches at the ring's rate, not connections": partial(token_ring, limit=ports),
    "MindSpeed: fitted on 18K": partial(mindspeed, fitted_on=18_000),
    "Pith-Train: NVLink 4": partial(pith_train, box="nvlink4-4"),
    "Meta: each connection has the message's rate, the NIC 45 GB/s": partial(meta, limit=connections),
    "Meta: the NIC has 45 GB/s, the message is predicted": partial(meta, nominal=True),
}
