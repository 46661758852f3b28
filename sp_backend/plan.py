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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from sp_backend.layout import CAUSAL, Block, Layout, Mask


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


class LazyRounds(Protocol):
    """Rounds whose objects are made when somebody looks at them."""

    def __getitem__(self, index: int, /) -> Round: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Round]: ...

    def of_rank(self, rank: int) -> Iterable[Round]:
        """With no other rank's instructions."""


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    layout: Layout
    rounds: tuple[Round, ...] | LazyRounds  # of strategies: columns.Rounds
    _by_rank: dict[int, tuple[RankRound, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def for_rank(self, rank: int) -> tuple[RankRound, ...]:
        if rank not in self._by_rank:
            seen = self.rounds if isinstance(self.rounds, tuple) else self.rounds.of_rank(rank)
            self._by_rank[rank] = tuple(_part(r, rank) for r in seen)
        return self._by_rank[rank]

    @property
    def digest(self) -> str:
        """Equal on two processes exactly when they hold the same plan."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def table(self, most_lines: int | None = None) -> str:
        """Ranks down, rounds across. `q3: kv0 kv3*` attends (* causal); `kv0,3>1` sends chunks 0 and 3 to
        rank 1. Ranks that come after so many lines are left out.
        """
        cells = [["", *(f"round {i}" for i in range(len(self.rounds)))]]
        for rank in range(self.layout.num_ranks):
            if most_lines is not None and len(cells) >= most_lines:
                break
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


def _part(whole: Round, rank: int) -> RankRound:
    """A round's part of one rank."""
    return RankRound(
        tuple(t for t in whole.transfers if t.dst == rank),
        tuple(t for t in whole.transfers if t.src == rank),
        tuple(a for a in whole.attends if a.rank == rank),
    )


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
