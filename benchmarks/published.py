"""`python -m benchmarks.published`: the cost model against what others measured, one row for each published number.

A system's constants (peak rate, bandwidth of a connection, fixed time of a pass: what its rows say they fit) are solved
from baselines: one node, or a plain ring. Everything else is a prediction, and no row is fitted on what it predicts.
All that is not fitted comes from the preset named. --measure: shares of computing and waiting on ranks of this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from sp_backend.cost import Cost, ModelShape, PlanCost
from sp_backend.layout import Kind
from sp_backend.planner import lay_out
from sp_backend.simulate import simulate
from sp_backend.strategies import Options, Variant, plan_for
from sp_backend.topology import Machine, Topology, preset

Constant = Literal["slowness", "byte_seconds", "pass_seconds"]
RING: Final = Variant("ring_pass_kv_up")  # every ring read upwards; none drops halves
PASS_Q: Final = Variant("ring_pass_q")
TOKEN_RING: Final = Variant("token_ring")
FOUR_RINGS: Final = Variant("hamilton", Options(num_rings=4))


@dataclass(frozen=True, slots=True)
class Constants:
    """What is fitted, as times, in which a baseline's own time is close to linear."""

    slowness: float = 1.0  # of all computing, relative to the preset
    byte_seconds: float = 0.0  # of one connection between two ranks; 0: the ports of the preset alone limit it
    pass_seconds: float = 1e-3  # of a forward pass, whatever its size

    def of(self, name: str) -> Machine:
        """The preset with these."""
        machine = preset(name)
        rates = replace(machine.rates.scaled(1 / self.slowness), step_seconds=self.pass_seconds)
        topology = connected(machine.topology, 1 / self.byte_seconds) if self.byte_seconds else machine.topology
        return replace(machine, topology=topology, rates=rates)


def connected(topology: Topology, capacity: float) -> Topology:
    """Each ordered pair's connection carries at most `capacity` bytes/s, beside what it shares with others."""
    own = {link: f"connection{link.src}>{link.dst}" for link in topology.links}
    links = tuple(replace(link, resources=(*link.resources, name)) for link, name in own.items())
    return Topology(topology.num_ranks, {**topology.resources, **dict.fromkeys(own.values(), capacity)}, links)


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    published: float
    unit: str
    predict: Callable[[Constants], float]
    fits: Constant | None = None  # the constant solved so that this row is exact
    note: str = ""


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


@dataclass(frozen=True, slots=True)
class Result:
    system: str
    what: str
    unit: str
    published: float
    predicted: float
    fits: str | None
    note: str

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


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

    def cost(self, constants: Constants) -> Cost:
        machine = constants.of(self.preset)
        plan = plan_for(
            self.variant,
            num_ranks=machine.num_ranks,
            num_heads=self.shape.num_heads,
            num_kv_heads=self.shape.num_kv_heads,
            causal=self.causal,
            kind=self.kind,
        )
        return PlanCost(plan, machine, self.shape).cost(lay_out(plan.layout, [(self.new, self.cached)]))

    def attention_ms(self, constants: Constants) -> float:
        return 1e3 * self.cost(constants).seconds

    def transfer_ms(self, constants: Constants, index: int) -> float:
        """Of one round, on the rank where it is longest."""
        return 1e3 * self.cost(constants).rounds[index].transfer

    def pass_seconds(self, constants: Constants) -> float:
        return self.cost(constants).step_seconds

    def computing_share(self, constants: Constants, rank: int) -> float:
        """Percent of the layer's attention, until the last rank is done, in which a rank's kernel runs."""
        machine = constants.of(self.preset)
        plan = plan_for(
            self.variant,
            num_ranks=machine.num_ranks,
            num_heads=self.shape.num_heads,
            num_kv_heads=self.shape.num_kv_heads,
            kind=self.kind,
        )
        run = simulate(plan, machine, self.shape, lay_out(plan.layout, [(self.new, self.cached)]))
        return 100 * run.spent(rank, "attend") / run.seconds


def token_ring() -> System:
    case = partial(Case, "pcie4-4", ModelShape(32, 32, 128), new=24_000)
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


def mindspeed() -> System:
    case = partial(Case, "nvlink4-8", ModelShape(40, 40, 128), causal=False)
    rows = []
    for tokens, ring_comm, rings_comm, ring, rings in ((18_000, 3.6, 1.2, 33.5, 16.0), (37_000, 8.6, 3.8, 65.6, 45.3)):
        fitted, name = tokens == 37_000, f"{tokens // 1000}K"
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
        "8 ranks (the mapping in its test), 40 heads of 128 (WAN2.2 A14B), bf16, lengths over all ranks. Fitted on the "
        "longer ring, where fixed times weigh least; only connections limit the links.",
        tuple(rows),
        (Winner("18K: 4 rings over one", 3, 2), Winner("37K: 4 rings over one", 7, 6)),
    )


def pith_train() -> System:
    case = partial(Case, "nvlink5-4", ModelShape(32, 4, 128), RING, new=32_768)
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


def meta() -> System:
    def prefill(nodes: int, tokens: int = 128_000) -> Case:
        return Case(f"nic400-{nodes}", LLAMA_405B, RING, tokens)

    def partly(variant: Variant, miss: float) -> Case:
        new = round(128_000 * miss)
        return Case("nic400-4", LLAMA_405B, variant, new, 128_000 - new)

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
        "A rank is a node, of which one GPU is modelled: heads and weights over TP 8, its own NIC (45 of 50 GB/s); "
        "the all-reduces of TP are part of the fitted rate. Weights are read as bf16, though the FFN is FP8. 128K is "
        "128,000.",
        (
            Row("128K on 1 node", 42.01, "s", Case("nic400-1", LLAMA_405B, RING, 128_000).pass_seconds, "slowness"),
            Row("1 % new, pass-KV", 1.023, "s", partly(RING, 0.01).pass_seconds, "pass_seconds"),
            Row("1 % new, pass-Q", 0.899, "s", partly(PASS_Q, 0.01).pass_seconds),
            Row("10 % new, pass-KV", 2.081, "s", partly(RING, 0.1).pass_seconds),
            Row("10 % new, pass-Q", 2.205, "s", partly(PASS_Q, 0.1).pass_seconds),
            Row("pass-KV faster from", 5.0, "% new", tipping),
            *scaling,
            Row("1M on 16 nodes", 77.0, "s", prefill(16, 1_000_000).pass_seconds),
        ),
        (Winner("1 % new: pass-Q over pass-KV", 2, 1), Winner("10 % new: pass-KV over pass-Q", 3, 4)),
    )


SYSTEMS: Final = (token_ring, mindspeed, pith_train, meta)


def calibrate(system: System) -> Constants:
    """The constants that make the fitted rows exact, one secant search after the other until all of them are."""
    constants = Constants()
    fitted = [(row, row.fits) for row in system.rows if row.fits]
    for _ in range(20):
        for row, name in fitted:
            constants = replace(constants, **{name: _solve(row, name, constants)})
        if all(abs(row.predict(constants) / row.published - 1) < 1e-4 for row, _ in fitted):
            return constants
    raise RuntimeError(f"{system.name}: no constants make its fitted rows exact")


def _solve(row: Row, name: Constant, constants: Constants) -> float:
    def off(value: float) -> float:
        return row.predict(replace(constants, **{name: value})) / row.published - 1

    a = getattr(constants, name) or 1e-10
    b = 1.1 * a
    off_a, off_b = off(a), off(b)
    while abs(off_b) > 1e-5 and off_b != off_a:
        a, b, off_a = b, max(b - off_b * (b - a) / (off_b - off_a), b / 100), off_b
        off_b = off(b)
    return float(b)


def compare() -> tuple[list[Result], list[dict[str, Any]], dict[str, Constants]]:
    """Every row, every winner, and each system's constants."""
    results: list[Result] = []
    winners: list[dict[str, Any]] = []
    constants: dict[str, Constants] = {}
    for describe in SYSTEMS:
        system = describe()
        fitted = constants[system.name] = calibrate(system)
        rows = [
            Result(system.name, r.what, r.unit, r.published, r.predict(fitted), r.fits, r.note) for r in system.rows
        ]
        for w in system.winners:
            faster, slower = rows[w.faster], rows[w.slower]
            assert faster.published < slower.published, f"{w.what}: not what was published"
            winners.append({"what": w.what, "right": faster.predicted < slower.predicted})
        results += rows
    return results, winners, constants


def predicted(results: Sequence[Result]) -> list[Result]:
    return [r for r in results if r.fits is None]


def median_error(results: Sequence[Result]) -> float:
    return statistics.median(abs(r.error) for r in predicted(results))


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    lines = ["| system | row | published | predicted | error |", "|---|---|---:|---:|---:|"]
    for r in results:
        error = "fitted" if r.fits else f"{r.error:+.0%}"
        lines.append(f"| {r.system} | {r.what} | {r.published:g} {r.unit} | {r.predicted:.3g} {r.unit} | {error} |")
    return "\n".join(lines)


def summary(results: Sequence[Result], winners: Sequence[dict[str, Any]]) -> str:
    fitted = len(results) - len(predicted(results))
    right = sum(w["right"] for w in winners)
    wrong = [w["what"] for w in winners if not w["right"]]
    told = (
        f"{len(predicted(results))} rows predicted with {fitted} constants fitted: median error "
        f"{median_error(results):.1%}; the right winner in {right} of {len(winners)}"
    )
    return told + (f" (wrong: {'; '.join(wrong)})" if wrong else "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    results, winners, constants = compare()
    print(table(results))
    print(summary(results, winners))
    if args.json:
        found = {
            "systems": [
                {k: getattr(s, k) for k in ("name", "hardware", "source", "assumed")}
                | {"constants": asdict(constants[s.name])}
                for s in (describe() for describe in SYSTEMS)
            ],
            "rows": [asdict(r) for r in results],
            "winners": winners,
            "median_error": median_error(results),
        }
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
