"""One rank's side of a plan, resolved once: what messages carry, what kernel calls read, when blocks die.

Pure: no torch, no sizes. Blocks of one link and round travel in one message; attends of a round are fused into few
kernel calls. Results are folded in the order written here, so the same run gives the same bits on every transport.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sp_backend.fuse import Fused, fuse
from sp_backend.layout import STATE, Block, Heads
from sp_backend.plan import Plan


class Use(NamedTuple):
    """A block that is read, and the held block that contains it (for a state: itself)."""

    block: Block
    held: Block


@dataclass(frozen=True, slots=True)
class Incoming:
    peer: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Outgoing:
    peer: int
    uses: tuple[Use, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A fused call (see fuse.Fused) that knows where its blocks are held."""

    qs: tuple[tuple[Use, ...], ...]  # [query chunk][heads]
    kvs: tuple[Use, ...]
    num_seen: tuple[int, ...]  # [query chunk]
    causal: bool

    def apart(self) -> list[Call]:
        """The same as calls with one KV block each."""
        calls = []
        for i, kv in enumerate(self.kvs):
            own = [q for q, n in zip(self.qs, self.num_seen, strict=True) if self.causal and i == n - 1]
            full = tuple(q for q, n in zip(self.qs, self.num_seen, strict=True) if i < n - self.causal)
            calls += [Call((q,), (kv,), (1,), True) for q in own]
            calls += [Call(full, (kv,), (1,) * len(full), False)] if full else []
        return calls


@dataclass(frozen=True, slots=True)
class ProgramRound:
    receives: tuple[Incoming, ...]
    sends: tuple[Outgoing, ...]
    calls: tuple[Call, ...]
    dead: tuple[Block, ...]  # received blocks not read after this round; those never read are in none


@dataclass(frozen=True, slots=True)
class Program:
    rounds: tuple[ProgramRound, ...]
    slots: dict[tuple[int, Heads], Heads]  # (query chunk, heads of a state) -> heads of the slot it is folded into
    start: tuple[Block, ...]  # Q and KV held before the first round
    finish: tuple[Block, ...]  # states that end on this rank


class _Holdings:
    """The blocks that a rank holds, and the last round in which each is read."""

    def __init__(self, start: Iterable[Block]) -> None:
        self.blocks: dict[tuple[str, int], list[Block]] = defaultdict(list)
        self.last_use: dict[Block, int] = {}
        for block in start:
            self.add(block)

    def add(self, block: Block) -> None:
        self.blocks[block.operand, block.chunk].append(block)

    def find(self, block: Block) -> Block | None:
        return next((b for b in self.blocks[block.operand, block.chunk] if b.holds(block)), None)

    def use(self, block: Block, when: int) -> Use:
        if block.operand == STATE:
            return Use(block, block)
        held = self.find(block)
        assert held is not None, f"round {when}: {block} is not held; was the plan proven?"
        self.last_use[held] = when
        return Use(block, held)

    def call(self, fused: Fused, when: int) -> Call:
        qs = tuple(tuple(self.use(q, when) for q in heads) for heads in fused.qs)
        return Call(qs, tuple(self.use(kv, when) for kv in fused.kvs), fused.num_seen, fused.causal)


def compile_rank(plan: Plan, rank: int, paged: Sequence[int] = ()) -> Program:
    """paged: the chunks whose keys this rank has in pages, all in one tensor, in the order of their positions."""
    start = tuple(b for b, r in plan.layout.start() if r == rank)
    holdings, own = _Holdings(start), _Holdings(start)
    received: list[Block] = []
    rounds = []
    for when, part in enumerate(plan.for_rank(rank)):
        sends = _by_peer((t.dst, t.block) for t in part.sends)
        outgoing = tuple(Outgoing(dst, tuple(holdings.use(b, when) for b in blocks)) for dst, blocks in sends)
        calls = tuple(holdings.call(fused, when) for fused in fuse(part.attends, own.find, paged))
        receives = _by_peer((t.src, t.block) for t in part.receives)
        for block in (b for _, blocks in receives for b in blocks if b.operand != STATE):
            holdings.add(block)
            received.append(block)
        rounds.append((tuple(Incoming(src, tuple(blocks)) for src, blocks in receives), outgoing, calls))
    dead = [tuple(b for b in received if holdings.last_use.get(b) == when) for when in range(len(rounds))]
    return Program(
        tuple(ProgramRound(*r, dead[when]) for when, r in enumerate(rounds)),
        _slots(plan, rank),
        start,
        tuple(b for b, r in plan.layout.finish() if r == rank),
    )


def _by_peer(blocks: Iterable[tuple[int, Block]]) -> list[tuple[int, list[Block]]]:
    links: dict[int, list[Block]] = defaultdict(list)
    for peer, block in blocks:
        links[peer].append(block)
    return list(links.items())


def _slots(plan: Plan, rank: int) -> dict[tuple[int, Heads], Heads]:
    """One slot for heads that are only ever folded, sent and finished together; overlapping ones share."""
    used: dict[int, set[Heads]] = defaultdict(set)
    for b in [b for b, r in plan.layout.finish() if r == rank] + _states(plan, rank):
        used[b.chunk].add(b.heads)
    slots: dict[tuple[int, Heads], Heads] = {}
    for chunk, ranges in used.items():
        merged: list[Heads] = []
        for lo, hi in sorted(ranges):
            if merged and lo < merged[-1][1]:
                merged[-1] = merged[-1][0], max(hi, merged[-1][1])
            else:
                merged.append((lo, hi))
        for lo, hi in ranges:
            slots[chunk, (lo, hi)] = next(m for m in merged if m[0] <= lo and hi <= m[1])
    return slots


def _states(plan: Plan, rank: int) -> list[Block]:
    states = []
    for part in plan.for_rank(rank):
        states += [t.block for t in (*part.receives, *part.sends) if t.block.operand == STATE]
        states += [a.q for a in part.attends]
    return states
