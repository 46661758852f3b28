"""A plan: which block travels from which rank to which, and which rank attends which blocks, in rounds. Pure:
no torch.

A plan is global (all ranks at once), so a transfer has both its ends. A round means, on every rank: post all
its receives, then all its sends, then attend. There is no barrier; what arrives is usable from the next round
on. Sending Q or KV copies it; sending STATE empties the sender's slot before this round's attends. What a
rank computes or receives for a query chunk is folded into that chunk's slot, so merging needs no instruction.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from sp_backend.layout import CAUSAL, EMPTY, KV, STATE, Block, Layout, Mask, Q


class PlanError(ValueError):
    """A plan that cannot be built or is not proven."""


class Transfer(NamedTuple):
    block: Block
    src: int
    dst: int


class Attend(NamedTuple):
    rank: int
    q: Block
    kv: Block
    mask: Mask


class Round(NamedTuple):
    transfers: tuple[Transfer, ...] = ()
    attends: tuple[Attend, ...] = ()


class RankRound(NamedTuple):
    """One rank's part of a round, in plan order."""

    receives: tuple[Transfer, ...]
    sends: tuple[Transfer, ...]
    attends: tuple[Attend, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    layout: Layout
    rounds: tuple[Round, ...]
    _by_rank: list[tuple[RankRound, ...]] = field(default_factory=list, init=False, repr=False, compare=False)

    def for_rank(self, rank: int) -> tuple[RankRound, ...]:
        if not self._by_rank:  # all ranks in one pass: whoever costs a plan of many asks for each
            rounds = [_divide(r, self.layout.num_ranks) for r in self.rounds]
            self._by_rank.extend(tuple(r[rank] for r in rounds) for rank in range(self.layout.num_ranks))
        return self._by_rank[rank]

    @property
    def digest(self) -> str:
        """Equal on two processes exactly when they hold the same plan."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def table(self) -> str:
        """Ranks down, rounds across. `q3: kv0 kv3*` attends (* causal); `kv0,3>1` sends chunks 0 and 3 to
        rank 1.
        """
        cells = [["", *(f"round {i}" for i in range(len(self.rounds)))]]
        for rank in range(self.layout.num_ranks):
            columns = [_cell(r, self.layout) for r in self.for_rank(rank)]
            height = max((len(c) for c in columns), default=0)
            for line in range(max(height, 1)):
                label = f"rank {rank}" if line == 0 else ""
                cells.append([label, *(c[line] if line < len(c) else "" for c in columns)])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in cells)
        lay = self.layout
        title = f"{self.name}: layout {lay.kind}, {lay.num_ranks} ranks, {lay.num_heads}:{lay.num_kv_heads} heads"
        return "\n".join([title, *lines])


def _divide(whole: Round, num_ranks: int) -> list[RankRound]:
    """A round's part of each rank."""
    receives: list[list[Transfer]] = [[] for _ in range(num_ranks)]
    sends: list[list[Transfer]] = [[] for _ in range(num_ranks)]
    attends: list[list[Attend]] = [[] for _ in range(num_ranks)]
    for t in whole.transfers:
        sends[t.src].append(t)
        receives[t.dst].append(t)
    for a in whole.attends:
        attends[a.rank].append(a)
    return [RankRound(tuple(r), tuple(s), tuple(a)) for r, s, a in zip(receives, sends, attends, strict=True)]


def _cell(part: RankRound, layout: Layout) -> list[str]:
    sent: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for t in part.sends:
        sent[t.block.operand.lower(), _suffix(t.block, layout), t.dst].append(t.block.chunk)
    lines = [f"{op}{','.join(map(str, cs))}{suffix}>{dst}" for (op, suffix, dst), cs in sent.items()]
    seen: dict[str, list[str]] = defaultdict(list)
    for a in part.attends:
        star = "*" if a.mask == CAUSAL else ""
        seen[f"q{a.q.chunk}{_suffix(a.q, layout)}"].append(f"kv{a.kv.chunk}{_piece(a.kv)}{star}")
    return lines + [f"{q}: {' '.join(kvs)}" for q, kvs in seen.items()]


def _suffix(block: Block, layout: Layout) -> str:
    heads = "" if block.heads == layout.all_heads else f"[{block.heads[0]}:{block.heads[1]}]"
    return heads + _piece(block)


def _piece(block: Block) -> str:
    return "" if block.piece == (0, 1) else f"({block.piece[0]}/{block.piece[1]})"


def visible(layout: Layout, rank: int, qs: Iterable[Block], kvs: Sequence[Block]) -> list[Attend]:
    """An Attend for every pair of the given blocks whose mask is not empty."""
    pairs = ((q, kv, layout.mask(q.chunk, kv.chunk)) for q in qs for kv in kvs)
    return [Attend(rank, q, kv, mask) for q, kv, mask in pairs if mask != EMPTY]


def replicate(plan: Plan, layout: Layout) -> Plan:
    """The plan of one group, run by every group of a layout at once: the same rounds on other ranks and chunks."""
    rounds: list[Round] = [Round()] * len(plan.rounds)
    for group in range(layout.num_groups):
        rename = _Renaming(plan.layout, layout, group)
        for i, r in enumerate(plan.rounds):
            transfers = (Transfer(rename.block(t.block), rename.rank(t.src), rename.rank(t.dst)) for t in r.transfers)
            attends = (Attend(rename.rank(a.rank), rename.block(a.q), rename.block(a.kv), a.mask) for a in r.attends)
            rounds[i] = Round((*rounds[i].transfers, *transfers), (*rounds[i].attends, *attends))
    return Plan(plan.name, layout, tuple(rounds))


@dataclass(frozen=True, slots=True)
class _Renaming:
    """Ranks and blocks of a group, as the layout of all groups calls them."""

    inner: Layout
    outer: Layout
    group: int

    def rank(self, rank: int) -> int:
        return self.group * self.inner.num_ranks + rank

    def block(self, block: Block) -> Block:
        if block.chunk < self.inner.num_new:
            return block._replace(chunk=self.group * self.inner.num_new + block.chunk)
        return block._replace(chunk=self.outer.history_of(self.rank(self.inner.owner(block.chunk))))


def complete(plan: Plan) -> Plan:
    """Add what a strategy leaves undelivered of the keys that every rank has to keep.

    In round t, from the second one on, rank r sends its own to rank r+t: never on a link that Q takes down a ring.
    """
    layout, ranks, rounds = plan.layout, plan.layout.num_ranks, list(plan.rounds)
    if layout.history != "copies":
        return plan
    arriving = {(t.dst, t.block.chunk) for r in rounds for t in r.transfers if layout.keeps(t.block)}
    rounds += [Round()] * (ranks - len(rounds))
    for step in range(1, ranks):
        links = ((r, (r + step) % ranks, c) for r in range(ranks) for c in layout.kv_of(r) if c < layout.num_new)
        missing = [Transfer(Block(KV, c, layout.all_heads), r, to) for r, to, c in links if (to, c) not in arriving]
        rounds[step] = rounds[step]._replace(transfers=(*rounds[step].transfers, *missing))
    return replace(plan, rounds=tuple(rounds))


def prune(plan: Plan) -> Plan:
    """Drop transfers that nobody uses, states that nobody computed, and rounds left empty.

    Builders write the full schedule; what a mask makes useless goes here. On a downward ring under zigzag
    this alone saves a quarter of the bytes.
    """
    return _drop_empty_states(_drop_unused(plan))


def _drop_unused(plan: Plan) -> Plan:
    used: dict[tuple[int, str, int], set[Block]] = defaultdict(set)  # what a rank reads in a later round
    rounds = []
    for r in reversed(plan.rounds):
        live = [
            t
            for t in r.transfers
            if t.block.operand == STATE
            or plan.layout.keeps(t.block)
            or any(t.block.holds(b) for b in used[t.dst, t.block.operand, t.block.chunk])
        ]
        for t in live:
            used[t.src, t.block.operand, t.block.chunk].add(t.block)
        for a in r.attends:
            used[a.rank, Q, a.q.chunk].add(a.q)
            used[a.rank, KV, a.kv.chunk].add(a.kv)
        rounds.append(r._replace(transfers=tuple(live)))
    return replace(plan, rounds=tuple(reversed(rounds)))


def _drop_empty_states(plan: Plan) -> Plan:
    filled: set[tuple[int, int, tuple[int, int]]] = set()  # slots with something in them
    rounds = []
    for r in plan.rounds:
        live = [t for t in r.transfers if t.block.operand != STATE or (t.src, t.block.chunk, t.block.heads) in filled]
        states = [t for t in live if t.block.operand == STATE]
        filled -= {(t.src, t.block.chunk, t.block.heads) for t in states}
        filled |= {(a.rank, a.q.chunk, a.q.heads) for a in r.attends}
        filled |= {(t.dst, t.block.chunk, t.block.heads) for t in states}
        if live or r.attends:
            rounds.append(Round(tuple(live), r.attends))
    return replace(plan, rounds=tuple(rounds))
