"""Machines that nobody has to describe: boxes and clusters by name, or a file's. Pure: no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sp_backend.topology import KernelRates, Link, Machine, Rates, Topology


def load_machine(name: str | Path, num_ranks: int | None = None) -> Machine:
    """A preset by its name, or the machine that a JSON file describes; its first num_ranks ranks (None: all).

    Raises ValueError if there is neither, or if it has fewer ranks.
    """
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        machine = Machine.from_json(path.read_bytes(), str(path))
    else:
        machine = preset(str(name))
    return machine if num_ranks is None else machine.first(num_ranks)


# Presets


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of box. port: bytes/s of a rank, each way. flops: of attention on large blocks."""

    port: float
    latency: float
    flops: float
    dense_flops: float
    memory_bytes: float
    per_switch: int | None = None  # ranks below one PCIe switch, whose way to the root they share; None: all equal


# Ports and attention rates are those of effective use: NVLink 4/5 350 and 700 GB/s with FlashAttention at 550 and
# 1200 TFLOP/s (H100, B200), PCIe 5 50 GB/s and 300 TFLOP/s, PCIe 4 22 GB/s and 90 TFLOP/s (A10), 400 and 200 Gb/s
# NICs 45 and 22 GB/s. Two GPUs a PCIe switch (PIX) whose one link to the root the pairs share (PXB). Dense rates and
# memory are 0.8 of the vendors' dense bf16 and HBM peaks where known, latencies those of NCCL's send and receive.
_KINDS: Final = {
    "nvlink4": _Kind(350e9, 8e-6, 550e12, 700e12, 2.7e12),
    "nvlink5": _Kind(700e9, 8e-6, 1200e12, 1700e12, 6.4e12),
    "pcie5": _Kind(50e9, 12e-6, 300e12, 350e12, 1.6e12, per_switch=2),
    "pcie4": _Kind(22e9, 12e-6, 90e12, 100e12, 0.48e12, per_switch=2),
    "nic400": _Kind(45e9, 15e-6, 550e12, 700e12, 2.7e12),
    "nic200": _Kind(22e9, 15e-6, 550e12, 700e12, 2.7e12),
}
KINDS: Final = (*_KINDS, "loopback")  # of which a preset's name can speak
_NICS: Final = {"nic400": 45e9, "nic200": 22e9}
_NIC_LATENCY: Final = 15e-6
_MOST_RANKS: Final = 1024  # a link for each pair: a million
_LOOPBACK: Final = 2.5e9  # gloo over one host's TCP, each way; both ways together little more
_BLOCKS: Final = (1, 4, 16, 64, 256, 1024, 4096, 16384)
_HALF: Final = (96, 128)  # queries and keys at which a GPU's kernel runs at half its rate: tiles and their start-up

GRAMMAR: Final = (
    "[NODESx]KIND-RANKS[/NIC[-shared]], with KIND of nvlink4, nvlink5, pcie4, pcie5, nic200, nic400, loopback and "
    "NIC of nic200, nic400: nvlink4-8, pcie4-4, nic400-16 (one rank a node), 2xnvlink4-8/nic400 (a NIC for each rank), "
    "4xpcie5-8/nic200-shared (one for the node)"
)
_NAME: Final = re.compile(r"(?:(\d+)x)?([a-z]+\d*)-(\d+)(?:/(nic\d+)(-shared)?)?")


def preset(name: str) -> Machine:
    """The machine of a name such as nvlink4-8 or 2xnvlink4-8/nic400. Raises ValueError that gives the grammar."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"unknown topology {name!r}; a JSON file or {GRAMMAR}")
    nodes, kind, ranks, nic, shared = match.groups()
    num_nodes, per_node = int(nodes or 1), int(ranks)
    if kind not in KINDS or per_node < 1 or num_nodes < 1 or (nic and nic not in _NICS):
        raise ValueError(f"unknown topology {name!r}; a JSON file or {GRAMMAR}")
    if num_nodes * per_node > _MOST_RANKS:
        raise ValueError(f"topology {name!r} has {num_nodes * per_node} ranks; a preset has at most {_MOST_RANKS}")
    if (num_nodes > 1) != (nic is not None):
        raise ValueError(f"topology {name!r}: several nodes need a NIC, and one node none; {GRAMMAR}")
    if kind == "loopback":
        if nic:
            raise ValueError(f"topology {name!r}: loopback is one host")
        return Machine(name, _loopback(per_node), _CPU)
    box = _KINDS[kind]
    parts = _Parts()
    for node in range(num_nodes):
        parts.add_box(box, range(node * per_node, (node + 1) * per_node))
    if nic:
        parts.join(num_nodes, per_node, _NICS[nic], bool(shared))
    topology = Topology(num_nodes * per_node, parts.resources, tuple(parts.links))
    return Machine(name, topology, _gpu_rates(box))


class _Parts:
    """Resources and links of a topology under construction."""

    def __init__(self) -> None:
        self.resources: dict[str, float] = {}
        self.links: list[Link] = []

    def add_box(self, box: _Kind, ranks: range) -> None:
        for r in ranks:
            self._port(f"rank{r}", box.port)
        switch = {r: f"switch{r // box.per_switch}" for r in ranks} if box.per_switch else {}
        for name in sorted(set(switch.values())):
            self._port(name, box.port)
        for a, b in _pairs(ranks):
            root = (f"{switch[a]}.out", f"{switch[b]}.in") if switch and switch[a] != switch[b] else ()
            self.links.append(Link(a, b, box.latency, (f"rank{a}.out", *root, f"rank{b}.in")))

    def join(self, num_nodes: int, per_node: int, capacity: float, shared: bool) -> None:
        """Nodes by NICs that no box's own links touch."""
        nic: Callable[[int], str] = lambda rank: f"nic{rank // per_node}" if shared else f"nic{rank}"  # noqa: E731
        ranks = range(num_nodes * per_node)
        for name in sorted({nic(r) for r in ranks}):
            self._port(name, capacity)
        for a, b in _pairs(ranks):
            if a // per_node != b // per_node:
                self.links.append(Link(a, b, _NIC_LATENCY, (f"{nic(a)}.out", f"{nic(b)}.in")))

    def _port(self, name: str, capacity: float) -> None:
        self.resources |= {f"{name}.out": capacity, f"{name}.in": capacity}


def _pairs(ranks: Iterable[int]) -> list[tuple[int, int]]:
    return [(a, b) for a in ranks for b in ranks if a != b]


def _gpu_rates(box: _Kind) -> Rates:
    def share(n: int, half: int) -> float:
        return n / (n + half)

    q_half, k_half = _HALF
    full = tuple(tuple(box.flops * share(q, q_half) * share(k, k_half) for k in _BLOCKS) for q in _BLOCKS)
    causal = tuple(box.flops * share(q, q_half) * share(q, 2 * k_half) for q in _BLOCKS)  # half of a row is seen
    return Rates(
        kernel=KernelRates(_BLOCKS, _BLOCKS, full, causal),
        dense_flops=box.dense_flops,
        memory_bytes=box.memory_bytes,
        merge_bytes=box.memory_bytes / 3,  # read twice, written once
        copy_bytes=box.memory_bytes / 2,
        call_seconds=8e-6,
        fold_seconds=4e-6,
        round_seconds=10e-6,
        message_seconds=3e-6,
        step_seconds=1e-3,
        overlap=1.0,
    )


def _loopback(num_ranks: int) -> Topology:
    resources = {f"rank{r}.{way}": _LOOPBACK for r in range(num_ranks) for way in ("out", "in")} | {
        "host": 1.25 * _LOOPBACK * max(1, num_ranks - 1)
    }
    links = tuple(Link(a, b, 1e-4, (f"rank{a}.out", f"rank{b}.in", "host")) for a, b in _pairs(range(num_ranks)))
    return Topology(num_ranks, resources, links)


# One CPU core with torch's flash attention in fp32, as measured on Zen 4
_CPU: Final = Rates(
    kernel=KernelRates(
        queries=(1, 16, 128, 1024),
        keys=(1, 128, 1024),
        full=((1e8, 4e9, 6e9), (1e9, 20e9, 25e9), (2e9, 50e9, 70e9), (2e9, 60e9, 80e9)),
        causal=(1e8, 1e9, 30e9, 72e9),
    ),
    dense_flops=90e9,
    memory_bytes=28e9,
    merge_bytes=6e9,
    copy_bytes=12e9,
    call_seconds=2e-5,
    fold_seconds=7e-5,
    round_seconds=4e-5,
    message_seconds=4e-5,
    step_seconds=1e-3,
    overlap=0.5,
)
