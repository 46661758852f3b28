"""All ranks of a plan in one process on a random ragged batch, and fp64 attention to compare them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sp_backend.execute import Executor, Keep, Run
from sp_backend.geometry import Geometry, Positions
from sp_backend.kernels import Kernel, get_kernel
from sp_backend.kv_cache import Rows
from sp_backend.layout import Block, Layout
from sp_backend.pieces import MOST_HISTORY
from sp_backend.plan import Plan
from sp_backend.transport.lockstep import LockstepNetwork
from sp_backend.transport.recording import RecordingTransport


@dataclass(frozen=True)
class Request:
    """`new` tokens after `cached` ones, whose pages lie on all ranks of the group that rank `home` is in."""

    new: int
    cached: int = 0
    home: int = 0


class Batch:
    """Random queries, keys and values of some sequences, laid out as a plan's layout wants them."""

    def __init__(
        self,
        layout: Layout,
        sequences: Sequence[Request],
        *,
        head_dim: int = 8,
        page_size: int = 2,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.layout, self.sequences, self.head_dim, self.dtype = layout, sequences, head_dim, dtype
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.q = [normal(s.new, layout.num_heads, head_dim) * 2 for s in sequences]
        self.kv = [normal(self._cached(s) + s.new, 2, layout.num_kv_heads, head_dim) for s in sequences]
        self.positions = [self._positions(i, s, page_size) for i, s in enumerate(sequences)]
        self.geometry = Geometry([[len(p) for p in chunks] for chunks in self.positions], self.positions)

    def _cached(self, sequence: Request) -> int:
        return 0 if self.layout.history == "none" else sequence.cached

    def _positions(self, index: int, s: Request, page_size: int) -> list[Positions]:
        lay, home, cached = self.layout, s.home % self.layout.num_ranks, self._cached(s)
        group, size = home // lay.group_size, lay.group_size
        new, old = cached + np.arange(s.new), np.arange(cached)
        if lay.kind == "home" or (lay.kind == "heads" and s.new == 1):  # a decoded token: any one chunk
            chunks = [new if c == home else new[:0] for c in range(lay.num_new)]
        else:
            chunks = np.split(new, np.cumsum(lay.cut_pages(s.new, page_size, group))[:-1])
        if lay.history != "none":
            owners = group * size + (old // page_size * 7 + index) % 5 % size
            chunks += [old if lay.history == "copies" else old[owners == r] for r in range(lay.num_ranks)]
        return chunks

    def q_of(self, rank: int) -> dict[int, Tensor]:
        heads = slice(*self.layout.heads_of(rank))
        return {
            c: torch.cat(
                [
                    q[p[c] - self._cached(s), heads]
                    for q, p, s in zip(self.q, self.positions, self.sequences, strict=True)
                ]
            )
            for c in self.layout.q_of(rank)
        }

    def kv_of(self, rank: int) -> dict[int, Tensor]:
        return {
            c: torch.cat([kv[p[c]] for kv, p in zip(self.kv, self.positions, strict=True)])
            for c in self.layout.kv_of(rank)
        }

    def pages_of(self, rank: int) -> tuple[dict[int, Rows], Tensor]:
        """Where this rank's keys lie, scattered over a pool, and the pool. What others project has no place in it."""
        kv = {c: kv for c, kv in self.kv_of(rank).items() if self.layout.owner(c) == rank}
        total = sum(map(len, kv.values()))
        order = np.random.default_rng(rank).permutation(2 * total)[:total]
        slots = np.split(order, np.cumsum([len(part) for part in kv.values()])[:-1])
        pool = torch.full((2 * total + 1, 2, self.layout.num_kv_heads, self.head_dim), torch.nan, dtype=self.dtype)
        for rows, part in zip(slots, kv.values(), strict=True):
            pool[torch.from_numpy(rows)] = part
        return {c: Rows(rows, torch.device("cpu")) for c, rows in zip(kv, slots, strict=True)}, pool

    def gather(self, states: Sequence[dict[int, Tensor]]) -> list[Tensor]:
        """Per sequence [new, heads, head_dim], from each rank's outputs by chunk."""
        outs = [torch.full(q.shape, torch.nan) for q in self.q]
        for rank, by_chunk in enumerate(states):
            heads = slice(*self.layout.heads_of(rank))
            for c, out in by_chunk.items():
                rows = out.split([len(p[c]) for p in self.positions])
                for i, part in enumerate(rows):
                    outs[i][self.positions[i][c] - self._cached(self.sequences[i]), heads] = part
        return outs

    def expected(self, window: int | None = None) -> list[Tensor]:
        """Full attention in fp64."""
        outs = []
        for s, q, kv in zip(self.sequences, self.q, self.kv, strict=True):
            cached, group = self._cached(s), self.layout.num_heads // self.layout.num_kv_heads
            k, v = kv.double().repeat_interleave(group, 2).unbind(1)
            scores = torch.einsum("qhd,khd->hqk", q.double(), k) * self.head_dim**-0.5
            distance = cached + torch.arange(s.new)[:, None] - torch.arange(cached + s.new)
            seen = distance >= 0 if self.layout.causal else torch.ones_like(distance, dtype=torch.bool)
            if window is not None:
                seen &= distance < window
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, v))
        return outs


@dataclass
class LockstepResult:
    outs: list[Tensor]
    links: list[dict[tuple[int, int], int]]  # per round: (src, dst) -> bytes
    executors: list[Executor]
    kept: list[dict[Block, Tensor]]  # by rank: what came and was shown to be kept, in the last layer


def run_lockstep(
    plan: Plan,
    batch: Batch,
    *,
    kernel: Kernel | None = None,
    window: int | None = None,
    layers: int = 1,
    overlap: bool = True,
    paged: bool = False,
    most_history: int = MOST_HISTORY,
) -> LockstepResult:
    """paged: each rank's keys lie scattered in a pool; its new ones are given as tensors as well, as by a model."""
    kernel = kernel or get_kernel("reference")
    network = LockstepNetwork(plan.layout.num_ranks)
    wires = [RecordingTransport(network.rank(r)) for r in range(network.size)]
    executors = [
        Executor(
            plan,
            r,
            kernel,
            wire,
            head_dim=batch.head_dim,
            dtype=batch.dtype,
            overlap=overlap,
            most_history=most_history,
        )
        for r, wire in enumerate(wires)
    ]
    places, pages = zip(*(batch.pages_of(r) if paged else ({}, None) for r in range(network.size)), strict=True)
    schedules = [e.schedule(batch.geometry, window, places[r]) for r, e in enumerate(executors)]
    given = range(plan.layout.num_new if paged else plan.layout.num_chunks)
    for _ in range(layers):
        kept: list[dict[Block, Tensor]] = [{} for _ in executors]
        runs = [
            Run(
                e,
                s,
                batch.q_of(r),
                {c: kv for c, kv in batch.kv_of(r).items() if c in given},
                pages[r],
                _keeper(kept[r]),
            )
            for r, (e, s) in enumerate(zip(executors, schedules, strict=True))
        ]
        links = []
        for i in range(len(schedules[0].rounds)):
            for wire in wires:
                wire.bytes.clear()
            for run in runs:
                run.post(i)
            for run in runs:
                run.attend(i)
            links.append({link: n for wire in wires for link, n in wire.bytes.items()})
        states = [run.finish() for run in runs]
    network.assert_idle()
    return LockstepResult(batch.gather([{c: s.out for c, s in by.items()} for by in states]), links, executors, kept)


def _keeper(kept: dict[Block, Tensor]) -> Keep:
    def keep(block: Block, kv: Tensor) -> None:
        assert block not in kept, f"{block} is shown twice"
        kept[block] = kv.clone()

    return keep


def error(outs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference; infinite if anything is NaN."""
    worst = 0.0
    for out, want in zip(outs, expected, strict=True):
        difference = (out.double() - want).abs().nan_to_num(torch.inf)
        worst = max(worst, float(difference.max()) if difference.numel() else 0.0)
    return worst
