"""Which rank holds which tokens. Pure: no torch.

New tokens are cut into chunks. Each rank's cached tokens form one more, its history: index num_new + rank.
    zigzag      2P chunks, rank r owns chunks r and 2P-1-r: causal work is even
    contiguous  P chunks, rank r owns chunk r
    heads       P chunks as contiguous, but every rank holds Q (and must end with the state) of all chunks for
                its own group of heads; KV chunk c lies on rank c, or with redundant_kv on every rank
    home        P chunks, chunk r holds whole sequences that live on rank r
With history "copies" every rank holds all cached tokens, of which its queries see its own copy, and must end with the
keys and values of all new ones: for engines whose KV cache is the same on every rank.
Of a degree d < P, groups of d neighbouring ranks share no sequence: group g's chunks follow those of group g-1, and
are cut as those of a layout of d ranks.
Chunks are named by index, never by length: one plan serves every ragged batch, empty chunks included.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, NamedTuple

Operand = Literal["Q", "KV", "STATE"]
Q: Final = "Q"
KV: Final = "KV"
STATE: Final = "STATE"

Mask = Literal["empty", "causal", "full"]
EMPTY: Final = "empty"
CAUSAL: Final = "causal"
FULL: Final = "full"

Kind = Literal["zigzag", "contiguous", "heads", "home"]
History = Literal["all", "own", "none", "copies"]
KINDS: tuple[Kind, ...] = ("zigzag", "contiguous", "heads", "home")

Heads = tuple[int, int]


class Block(NamedTuple):  # a tuple, as are the instructions: plans have many thousands, compared again and again
    """A part of one operand: a chunk's rows for a range of heads.

    heads: half-open range of query heads; a KV block carries the KV heads that they read.
    piece: the i-th of n slices of each sequence's rows in the chunk; KV only.
    """

    operand: Operand
    chunk: int
    heads: Heads
    piece: tuple[int, int] = (0, 1)

    def holds(self, other: Block) -> bool:
        """Whether `other` is contained in this block."""
        if self.operand != other.operand or self.chunk != other.chunk:
            return False
        (i, n), (j, m) = self.piece, other.piece
        inside = i * m <= j * n and (j + 1) * n <= (i + 1) * m
        return inside and self.heads[0] <= other.heads[0] and other.heads[1] <= self.heads[1]

    def overlaps(self, other: Block) -> bool:
        """Whether some element lies in both blocks."""
        if self.operand != other.operand or self.chunk != other.chunk:
            return False
        (i, n), (j, m) = self.piece, other.piece
        meet = i * m < (j + 1) * n and j * n < (i + 1) * m
        return meet and self.heads[0] < other.heads[1] and other.heads[0] < self.heads[1]


@dataclass(frozen=True, slots=True)
class Layout:
    """num_heads and num_kv_heads are those of one SP group, that is, already divided by the TP size."""

    num_ranks: int
    kind: Kind
    num_heads: int
    num_kv_heads: int
    causal: bool = True
    # whose queries see a rank's cached tokens: all, those of its own group, none exist, or its own as all have a copy
    history: History = "all"
    redundant_kv: bool = False  # heads only: KV of new tokens is on every rank from the start
    degree: int | None = None  # ranks of a group; None: all, or in layout home with history "own" just one

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ValueError(f"num_ranks must be at least 1, not {self.num_ranks}")
        if self.kind not in KINDS:
            raise ValueError(f"unknown layout {self.kind!r}; known: {', '.join(KINDS)}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly")
        if self.kind == "heads" and self.num_heads % self.num_ranks:
            fit = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"layout heads: {self.num_heads} query heads cannot be divided over {self.num_ranks} ranks; "
                f"sizes that fit: {', '.join(map(str, fit))}"
            )
        if self.history == "copies" and (self.kind not in ("zigzag", "contiguous") or self.degree is not None):
            raise ValueError(f"history 'copies' needs layout zigzag or contiguous over all ranks, not {self.kind}")
        if self.redundant_kv and self.kind != "heads":
            raise ValueError(f"redundant_kv needs layout heads, not {self.kind}")
        if self.degree is not None and (self.degree < 1 or self.num_ranks % self.degree):
            fit = [d for d in range(1, self.num_ranks + 1) if self.num_ranks % d == 0]
            raise ValueError(
                f"degree: {self.num_ranks} ranks cannot be divided into groups of {self.degree}; "
                f"degrees that fit: {', '.join(map(str, fit))}"
            )
        if self.group_size < self.num_ranks:
            if self.kind == "heads":
                raise ValueError(f"degree {self.degree}: layout heads spreads every sequence over all ranks")
            if self.history == "all" and self.kind != "home":
                raise ValueError(f"degree {self.degree}: history of other groups cannot be seen; use history 'own'")
        elif self.history == "own" and self.degree is None and self.kind != "home":
            raise ValueError(
                f"history 'own' needs layout home or a degree: {self.kind} spreads sequences over all ranks"
            )

    @property
    def group_size(self) -> int:
        """Number of ranks that share a sequence (its history, in layout home)."""
        if self.degree is not None:
            return self.degree
        return 1 if self.kind == "home" and self.history == "own" else self.num_ranks

    @property
    def num_groups(self) -> int:
        return self.num_ranks // self.group_size

    @property
    def num_new(self) -> int:
        """Number of chunks of new tokens, which are also the query chunks."""
        return 2 * self.num_ranks if self.kind == "zigzag" else self.num_ranks

    @property
    def num_chunks(self) -> int:
        """Number of KV chunks: new ones, then one history chunk a rank."""
        return self.num_new + (0 if self.history == "none" else self.num_ranks)

    @property
    def all_heads(self) -> Heads:
        return 0, self.num_heads

    def history_of(self, rank: int) -> int:
        """The index of a rank's history chunk."""
        assert self.history != "none", "this layout has no history"
        return self.num_new + rank

    def owner(self, chunk: int) -> int:
        """The rank that holds the KV of a chunk (and, except in layout heads, its queries)."""
        if chunk >= self.num_new:
            return chunk - self.num_new
        if self.kind != "zigzag":
            return chunk
        group, c = divmod(chunk, 2 * self.group_size)
        return group * self.group_size + min(c, 2 * self.group_size - 1 - c)

    def q_of(self, rank: int) -> list[int]:
        """The query chunks that start, and whose states end, on a rank."""
        return list(range(self.num_new)) if self.kind == "heads" else self._new_of(rank)

    def kv_of(self, rank: int) -> list[int]:
        """The KV chunks that a rank holds at the start, in index order."""
        new = list(range(self.num_new)) if self.redundant_kv else self._new_of(rank)
        return new if self.history == "none" else [*new, self.history_of(rank)]

    def all_q(self) -> list[list[int]]:
        """q_of every rank."""
        return [self.q_of(r) for r in range(self.num_ranks)]

    def all_kv(self) -> list[list[int]]:
        """kv_of every rank."""
        return [self.kv_of(r) for r in range(self.num_ranks)]

    def _new_of(self, rank: int) -> list[int]:
        """The chunks of new tokens that a rank owns."""
        if self.kind != "zigzag":
            return [rank]
        group, r = divmod(rank, self.group_size)
        first = group * 2 * self.group_size
        return [first + r, first + 2 * self.group_size - 1 - r]

    def heads_of(self, rank: int) -> Heads:
        """The query heads whose Q a rank holds at the start."""
        if self.kind != "heads":
            return self.all_heads
        size = self.num_heads // self.num_ranks
        return rank * size, (rank + 1) * size

    def kv_heads(self, heads: Heads) -> Heads:
        """The KV heads that a range of query heads reads; groups may be cut."""
        group = self.num_heads // self.num_kv_heads
        return heads[0] // group, -(-heads[1] // group)

    def start(self) -> list[tuple[Block, int]]:
        """The Q and KV blocks on each rank before the first round."""
        ranks = range(self.num_ranks)
        held = [(Block(KV, c, self.all_heads), r) for r in ranks for c in self.kv_of(r)]
        return held + [(Block(Q, c, self.heads_of(r)), r) for r in ranks for c in self.q_of(r)]

    def finish(self) -> list[tuple[Block, int]]:
        """The rank on which each state must end."""
        return [(Block(STATE, c, self.heads_of(r)), r) for r in range(self.num_ranks) for c in self.q_of(r)]

    def keeps(self, block: Block) -> bool:
        """Whether a block that comes to a rank has to stay there."""
        return self.history == "copies" and block.operand == KV and block.chunk < self.num_new

    def mask(self, q: int, kv: int) -> Mask:
        """What queries of chunk q see of the keys of chunk kv."""
        if kv >= self.num_new and self.history == "copies":
            return FULL if self.owner(kv) == self.owner(q) else EMPTY
        if kv >= self.num_new:
            return FULL if self.history == "all" or self.group_of(kv) == self.group_of(q) else EMPTY
        if q == kv:
            return CAUSAL if self.causal else FULL
        if self.kind == "home" or (self.causal and kv > q):
            return EMPTY  # other sequences, or later tokens
        return FULL if self.group_of(kv) == self.group_of(q) else EMPTY

    def group_of(self, chunk: int) -> int:
        """The group whose sequences a chunk is part of."""
        return self.owner(chunk) // self.group_size

    def cut_pages(self, num_tokens: int, page_size: int, group: int = 0) -> tuple[int, ...]:
        """Rows of each new chunk of one sequence that a group shares, cut between pages; the last may be partial."""
        assert self.kind != "home", "home sequences are not cut"
        num_pages, num_chunks = -(-num_tokens // page_size), self.num_new // self.num_groups
        cuts = [min(num_pages * c // num_chunks * page_size, num_tokens) for c in range(num_chunks + 1)]
        before, after = group * num_chunks, (self.num_groups - 1 - group) * num_chunks
        return (0,) * before + tuple(hi - lo for lo, hi in pairwise(cuts)) + (0,) * after

    def page_ranks(self, num_tokens: int, page_size: int, group: int = 0) -> tuple[int, ...]:
        """The rank of each new page of one sequence spread over a group."""
        rows = self.cut_pages(num_tokens, page_size, group)
        return tuple(self.owner(c) for c, n in enumerate(rows) for _ in range(-(-n // page_size)))
