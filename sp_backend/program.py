"""One rank's side of a plan, resolved once: what each message carries, what each kernel call reads, what dies
when.

Pure: no torch, no sizes. Blocks of one link and round travel in one message. Full attends of a round that read
the same keys become one kernel call over several query chunks, and adjacent groups of heads that meet the same
keys are put side by side. Results are folded in the order written here, so the same run gives the same bits on
every transport.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sp_backend.layout import CAUSAL, FULL, KV, STATE, Block, Heads
from sp_backend.plan import Attend, Plan, Transfer


@dataclass(frozen=True, slots=True)
class Use:
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
    """Query chunks that meet the same keys (just one if causal), each in one or more adjacent groups of heads."""

    qs: tuple[tuple[Use, ...], ...]  # [query chunk][heads]
    kv: Use
    causal: bool


@dataclass(frozen=True, slots=True)
class ProgramRound:
    receives: tuple[Incoming, ...]
    sends: tuple[Outgoing, ...]
    calls: tuple[Call, ...]
    dead: tuple[Block, ...]  # received blocks not read after this round


@dataclass(frozen=True, slots=True)
class Program:
    rounds: tuple[ProgramRound, ...]
    slots: dict[tuple[int, Heads], Heads]  # (query chunk, heads of a state) -> heads of the slot it is folded into
    start: tuple[Block, ...]  # Q and KV held before the first round
    finish: tuple[Block, ...]  # states that end on this rank


def compile_rank(plan: Plan, rank: int) -> Program:
    held: dict[tuple[str, int], list[Block]] = defaultdict(list)
    start = tuple(b for b, r in plan.layout.start() if r == rank)
    for block in start:
        held[block.operand, block.chunk].append(block)
    received: list[Block] = []
    last_use: dict[Block, int] = {}

    def use(block: Block, when: int) -> Use:
        if block.operand == STATE:
            return Use(block, block)
        source = next(b for b in held[block.operand, block.chunk] if b.holds(block))
        last_use[source] = when
        return Use(block, source)

    rounds = []
    for when, part in enumerate(plan.for_rank(rank)):
        sends = [Outgoing(dst, tuple(use(b, when) for b in bs)) for dst, bs in _by_link(part.sends, "dst")]
        calls = [
            Call(
                tuple(tuple(use(a.q, when) for a in same_chunk) for same_chunk in zip(*groups, strict=True)),
                use(kv, when),
                groups[0][0].mask == CAUSAL,
            )
            for kv, groups in _fused(part.attends, lambda b: any(h.holds(b) for h in held[KV, b.chunk]))
        ]
        receives = tuple(Incoming(src, bs) for src, bs in _by_link(part.receives, "src"))
        for b in (b for m in receives for b in m.blocks if b.operand != STATE):
            held[b.operand, b.chunk].append(b)
            received.append(b)
        rounds.append((receives, tuple(sends), tuple(calls)))
    dead: dict[int, list[Block]] = defaultdict(list)
    for b in received:
        if b in last_use:
            dead[last_use[b]].append(b)
    return Program(
        tuple(ProgramRound(*r, tuple(dead[i])) for i, r in enumerate(rounds)),
        _slots(plan, rank),
        start,
        tuple(b for b, r in plan.layout.finish() if r == rank),
    )


def _by_link(transfers: Sequence[Transfer], end: str) -> list[tuple[int, tuple[Block, ...]]]:
    links: dict[int, list[Block]] = defaultdict(list)
    for t in transfers:
        links[getattr(t, end)].append(t.block)
    return [(peer, tuple(blocks)) for peer, blocks in links.items()]


def _fused(attends: Sequence[Attend], is_held: Callable[[Block], bool]) -> list[tuple[Block, list[list[Attend]]]]:
    """Kernel calls: the keys of each, and its attends by group of heads, then by query chunk."""
    rows: dict[object, list[Attend]] = defaultdict(list)
    for a in attends:
        rows[(a.kv, a.q.heads) if a.mask == FULL else a].append(a)
    columns: dict[object, list[list[Attend]]] = defaultdict(list)
    for group in rows.values():
        first = group[0]
        columns[first.kv.chunk, first.kv.piece, first.mask, *(a.q.chunk for a in group)].append(group)
    calls: list[tuple[Block, list[list[Attend]]]] = []
    for groups in columns.values():
        groups.sort(key=lambda group: group[0].kv.heads)
        for i, group in enumerate(groups):
            kv = group[0].kv
            if i and calls[-1][0].heads[1] == kv.heads[0]:
                hull = replace(kv, heads=(calls[-1][0].heads[0], kv.heads[1]))
                if is_held(hull):
                    calls[-1] = hull, [*calls[-1][1], group]
                    continue
            calls.append((kv, [group]))
    return calls


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
