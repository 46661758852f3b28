"""Machines: the links between ranks, and what computing on a rank costs. Pure: no torch.

Links are paths over *resources with a capacity*, so that contention is data: two transfers that use one resource
share it. A rank's port out and in, the two ways through a switch's root, a node's NIC are resources; a link that is
slower when both its directions are busy has a third resource that both use. A machine is measured at start
(measure.py), read from a JSON file, or one of presets.py, whose numbers are what applications reach, not peaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def _require(holds: bool, field: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{field} is {value}; it must be {wanted}")


@dataclass(frozen=True, slots=True)
class Link:
    """How bytes get from one rank to another: `latency` seconds, then through all `resources` at once."""

    src: int
    dst: int
    latency: float
    resources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wires:
    """A topology as arrays; resources are numbered in their order."""

    capacity: Floats  # [resources] bytes/s
    latency: Floats  # [src, dst] seconds
    uses: NDArray[np.intp]  # [src, dst, most]: resources of a link, then -1


@dataclass(frozen=True)
class Topology:
    """Every ordered pair of ranks has a link. resources: name -> bytes/s."""

    num_ranks: int
    resources: Mapping[str, float]
    links: tuple[Link, ...]

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ValueError(f"topology.num_ranks must be at least 1, not {self.num_ranks}")
        for name, capacity in self.resources.items():
            _require(capacity > 0, f"topology.resources[{name!r}]", capacity, "a number of bytes/s above 0")
        seen: set[tuple[int, int]] = set()
        for i, link in enumerate(self.links):
            where, pair = f"topology.links[{i}] ({link.src} -> {link.dst})", (link.src, link.dst)
            for end, rank in (("src", link.src), ("dst", link.dst)):
                _require(0 <= rank < self.num_ranks, f"{where}: {end}", rank, f"a rank below {self.num_ranks}")
            _require(link.src != link.dst, f"{where}: dst", link.dst, "another rank than src")
            _require(link.latency >= 0, f"{where}: latency", link.latency, "seconds, at least 0")
            names = link.resources
            _require(bool(names), f"{where}: resources", "empty", "what the link's bytes go through")
            _require(len({*names}) == len(names), f"{where}: resources", list(names), "each only once")
            for name in names:
                _require(name in self.resources, f"{where}: resource", name, "a key of topology.resources")
            _require(pair not in seen, where, "a second one", "only one link for each pair")
            seen.add(pair)
        ranks = range(self.num_ranks)
        missing = (f"{a} -> {b}" for a in ranks for b in ranks if a != b and (a, b) not in seen)
        if first := list(islice(missing, 5)):
            raise ValueError(f"topology.links: none from rank to rank {', '.join(first)}")

    def by_pair(self) -> dict[tuple[int, int], Link]:
        return {(link.src, link.dst): link for link in self.links}

    @cached_property
    def wires(self) -> Wires:
        index = {name: i for i, name in enumerate(self.resources)}
        most = max((len(link.resources) for link in self.links), default=0)
        uses = np.full((self.num_ranks, self.num_ranks, most), -1, np.intp)
        latency = np.zeros((self.num_ranks, self.num_ranks))
        for link in self.links:
            uses[link.src, link.dst, : len(link.resources)] = [index[name] for name in link.resources]
            latency[link.src, link.dst] = link.latency
        return Wires(np.array(list(self.resources.values())), latency, uses)

    def first(self, num_ranks: int) -> Topology:
        """Its first ranks alone."""
        if num_ranks > self.num_ranks:
            raise ValueError(f"a topology of {self.num_ranks} ranks has no {num_ranks}; describe a larger one")
        links = tuple(x for x in self.links if max(x.src, x.dst) < num_ranks)
        used = {name for link in links for name in link.resources}
        return Topology(num_ranks, {n: c for n, c in self.resources.items() if n in used}, links)

    def scaled(self, bandwidth: float = 1.0, latency: float = 1.0) -> Topology:
        """Every capacity and every latency times a factor."""
        resources = {name: capacity * bandwidth for name, capacity in self.resources.items()}
        return replace(
            self,
            resources=resources,
            links=tuple(replace(link, latency=link.latency * latency) for link in self.links),
        )


@dataclass(frozen=True, slots=True)
class KernelRates:
    """Attention FLOP/s by the shape of a block: full[i][j] for queries[i] x keys[j] that are all visible, causal[i]
    for queries[i] against as many keys, of which each sees its own and those before (only those pairs count).
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    full: tuple[tuple[float, ...], ...]
    causal: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, axis in (("queries", self.queries), ("keys", self.keys)):
            ascending = bool(axis) and axis[0] > 0 and list(axis) == sorted(set(axis))
            _require(ascending, f"rates.kernel.{name}", axis, "numbers above 0, ascending")
        shape = [len(row) for row in self.full]
        _require(
            shape == [len(self.keys)] * len(self.queries),
            "rates.kernel.full",
            f"rows of {shape}",
            f"{len(self.queries)} rows of {len(self.keys)}",
        )
        _require(
            len(self.causal) == len(self.queries),
            "rates.kernel.causal",
            f"{len(self.causal)} long",
            f"{len(self.queries)} long",
        )
        _require(min(*map(min, self.full), *self.causal) > 0, "rates.kernel", self, "FLOP/s above 0")

    def scaled(self, factor: float) -> KernelRates:
        return replace(
            self,
            full=tuple(tuple(rate * factor for rate in row) for row in self.full),
            causal=tuple(rate * factor for rate in self.causal),
        )

    def full_rate(self, queries: ArrayLike, keys: ArrayLike) -> Floats:
        """FLOP/s of full blocks, interpolated over the logarithms of both sides; constant beyond the table."""
        i, u = _place(self.queries, queries)
        j, v = _place(self.keys, keys)
        table = _logs(self.full)
        below = table[i, j] * (1 - v) + table[i, np.minimum(j + 1, len(self.keys) - 1)] * v
        up = np.minimum(i + 1, len(self.queries) - 1)
        above = table[up, j] * (1 - v) + table[up, np.minimum(j + 1, len(self.keys) - 1)] * v
        return np.asarray(np.exp(below * (1 - u) + above * u))

    def best_rate(self, queries: int) -> float:
        """FLOP/s that no block of at most so many queries exceeds."""
        tried = np.array([*(n for n in self.queries if n < queries), queries])
        return float(max(self.full_rate(tried[:, None], self.keys).max(), self.causal_rate(tried).max()))

    def causal_rate(self, queries: ArrayLike) -> Floats:
        """FLOP/s of causal blocks on the diagonal."""
        logs = np.interp(np.log(np.maximum(queries, 1)), np.log(self.queries), np.log(self.causal))
        return np.asarray(np.exp(logs))


@lru_cache(maxsize=16)
def _logs(rates: tuple[tuple[float, ...], ...]) -> Floats:
    return np.asarray(np.log(rates))


def _place(axis: tuple[int, ...], values: ArrayLike) -> tuple[NDArray[np.intp], Floats]:
    """The cell of an axis in which values lie, and how far in, in logarithms."""
    logs, at = np.log(axis), np.log(np.maximum(values, 1))
    if len(axis) == 1:
        return np.zeros(np.shape(at), np.intp), np.zeros(np.shape(at))
    cell = np.clip(np.searchsorted(logs, at, side="right") - 1, 0, len(axis) - 2)
    return cell, np.clip((at - logs[cell]) / (logs[cell + 1] - logs[cell]), 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Rates:
    """What work on one rank costs."""

    kernel: KernelRates
    dense_flops: float  # FLOP/s of everything that is not attention
    memory_bytes: float  # bytes/s at which weights are read: the least that a step's dense work takes
    merge_bytes: float  # bytes/s of fp32 state (out and lse) merged into another
    copy_bytes: float  # bytes/s of messages that have to be packed
    call_seconds: float  # each kernel call
    fold_seconds: float  # each merge of a result into a state, however small
    round_seconds: float  # each round of a plan
    message_seconds: float  # each message sent or received
    step_seconds: float  # each forward pass
    overlap: float  # share of a transfer's time that its ranks can compute meanwhile; 1: hardware of its own does it

    def __post_init__(self) -> None:
        for name in ("dense_flops", "memory_bytes", "merge_bytes", "copy_bytes"):
            _require(getattr(self, name) > 0, f"rates.{name}", getattr(self, name), "above 0")
        for name in ("call_seconds", "fold_seconds", "round_seconds", "message_seconds", "step_seconds"):
            _require(getattr(self, name) >= 0, f"rates.{name}", getattr(self, name), "seconds, at least 0")
        _require(0 <= self.overlap <= 1, "rates.overlap", self.overlap, "between 0 and 1")

    def scaled(self, factor: float) -> Rates:
        """The kernel, and everything else that moves through a rank's own units, faster by a factor."""
        moved = ("dense_flops", "memory_bytes", "merge_bytes", "copy_bytes")
        kernel = self.kernel.scaled(factor)
        return replace(self, kernel=kernel, **{name: getattr(self, name) * factor for name in moved})


@dataclass(frozen=True, slots=True)
class Machine:
    """error: share by which predictions of a step for it may be wrong; a plan that sends must gain more."""

    name: str
    topology: Topology
    rates: Rates
    error: float = 0.08

    def __post_init__(self) -> None:
        _require(0 <= self.error < 1, "error", self.error, "at least 0 and below 1")

    @property
    def num_ranks(self) -> int:
        return self.topology.num_ranks

    def first(self, num_ranks: int) -> Machine:
        """Its first ranks alone."""
        return self if num_ranks == self.num_ranks else replace(self, topology=self.topology.first(num_ranks))

    def to_json(self) -> str:
        return msgspec.json.format(msgspec.json.encode(self)).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, origin: str = "JSON") -> Machine:
        """Raises ValueError naming `origin`, the field and what it should be."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, ValueError) as error:
            raise ValueError(f"{origin}: {error}") from error
