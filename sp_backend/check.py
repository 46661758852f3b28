"""Proves a plan without running it. Pure: no torch.

Proven: operands are on a rank when used; every visible (query chunk, KV chunk, slice, head) is folded exactly
once into the state that ends where the layout wants it, under the right mask; nothing is delivered twice or
in vain; no state is left behind; keys that every rank has to keep come to it. A ragged sample, expanded to token
positions, is counted pair by pair as well.

Deadlock: a transfer names both its ends and both ends post in plan order, so links match. A rank posts a
round's receives before anything that can block, and what it then waits for was posted in this round or an
earlier one. So some rank in the earliest unfinished round can always go on, even if every send waits for its
receiver. A replay of exactly that (`rendezvous`) is part of the proof.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm

import numpy as np

from sp_backend.columns import columns_of, links_of
from sp_backend.layout import CAUSAL, EMPTY, KV, STATE, Block, Layout, Q
from sp_backend.plan import Attend, Plan, Transfer
from sp_backend.ragged import Fold, RaggedSample

WHOLE = (0, 1)
_Link = tuple[int, int]  # src, dst


@dataclass(frozen=True, slots=True)
class Report:
    """`errors` is empty when the plan is proven."""

    errors: tuple[str, ...]
    loads: tuple[Counter[tuple[int, int]], ...]  # per round: blocks by (src, dst)
    peak_q_blocks: tuple[int, ...]  # per rank: received blocks held at once
    peak_kv_blocks: tuple[int, ...]


@dataclass(slots=True)
class _Replay:
    """What every rank holds while a plan is replayed on symbols."""

    layout: Layout
    errors: list[str] = field(default_factory=list)
    held: dict[tuple[int, str, int], list[Block]] = field(default_factory=lambda: defaultdict(list))
    slots: dict[tuple[int, int], list[Fold]] = field(default_factory=lambda: defaultdict(list))
    arrived: dict[tuple[int, Block], int] = field(default_factory=dict)  # (rank, received block) -> round
    last_use: dict[tuple[int, Block], int] = field(default_factory=dict)

    def use(self, rank: int, block: Block, when: int) -> bool:
        """Note a use of a held block; False if no held block contains it."""
        for b in self.held[rank, block.operand, block.chunk]:
            if b.holds(block):
                self.last_use[rank, b] = when
                return True
        return False


def check(plan: Plan) -> Report:
    replay = _Replay(plan.layout)
    for block, rank in plan.layout.start():
        replay.held[rank, block.operand, block.chunk].append(block)
    for when, r in enumerate(plan.rounds):
        blocks, states = _transfers(replay, r.transfers, when)
        for a in r.attends:
            _attend(replay, a, when)
        for rank, block in blocks:
            replay.held[rank, block.operand, block.chunk].append(block)
            replay.arrived.setdefault((rank, block), when)
        for rank, chunk, folds in states:
            replay.slots[rank, chunk] += folds
    sample = RaggedSample(plan.layout)
    for block, rank in plan.layout.finish():
        folds = replay.slots.pop((rank, block.chunk), [])
        replay.errors += _coverage(plan.layout, block, folds)
        replay.errors += sample.count(block, folds)
    replay.errors += [f"state left behind: q{c} on rank {r}" for (r, c), folds in replay.slots.items() if folds]
    replay.errors += _kept(replay)
    unused = [(r, b) for r, b in replay.arrived if (r, b) not in replay.last_use and not plan.layout.keeps(b)]
    replay.errors += [f"delivered in vain: {block} to rank {rank}" for rank, block in unused]
    replay.errors += rendezvous(plan)
    loads = tuple(Counter((t.src, t.dst) for t in r.transfers) for r in plan.rounds)
    return Report(tuple(replay.errors), loads, _peaks(replay, plan, Q), _peaks(replay, plan, KV))


def rendezvous(plan: Plan, *, receives_first: bool = True) -> list[str]:
    """Replay a plan with sends that block until the receiver has posted; one line for each rank that is stuck.

    A rank waits for all that came in a round before it sends in the next, which is earlier than executors do.
    receives_first: the order within a round, which executors keep; the other one is here to show why.
    """
    ranks = range(plan.layout.num_ranks)
    steps: list[list[tuple[str, _Link]]] = [[] for _ in ranks]
    before: list[_Link] = []
    for all_links in links_of(columns_of(plan)):
        links = [link for link in all_links if {*link} <= {*ranks}]
        posts = [(dst, ("post", (src, dst))) for src, dst in links]
        waits = [(dst, ("wait for", (src, dst))) for src, dst in before]
        sends = [(src, ("send", (src, dst))) for src, dst in links]
        for rank, step in [*posts, *waits, *sends] if receives_first else [*waits, *sends, *posts]:
            steps[rank].append(step)
        before = links
    return [f"deadlock: rank {rank} can never {what} {link[0]}>{link[1]}" for rank, (what, link) in _stuck(steps)]


def _stuck(steps: list[list[tuple[str, _Link]]]) -> Iterator[tuple[int, tuple[str, _Link]]]:
    """The first step of each rank that it cannot take, when all have gone as far as they can."""
    posted: Counter[_Link] = Counter()
    sent: Counter[_Link] = Counter()
    at = [0] * len(steps)
    moved = True
    while moved:
        moved = False
        for rank, mine in enumerate(steps):
            while at[rank] < len(mine):
                what, link = mine[at[rank]]
                if (what == "send" and not posted[link]) or (what == "wait for" and not sent[link]):
                    break
                posted[link] += {"post": 1, "send": -1}.get(what, 0)
                sent[link] += {"send": 1, "wait for": -1}.get(what, 0)
                at[rank] += 1
                moved = True
    return ((rank, mine[i]) for rank, (mine, i) in enumerate(zip(steps, at, strict=True)) if i < len(mine))


def _malformed(layout: Layout, block: Block) -> str | None:
    lo, hi = block.heads
    i, n = block.piece
    chunks = layout.num_chunks if block.operand == KV else layout.num_new
    if block.operand not in (Q, KV, STATE) or not 0 <= block.chunk < chunks:
        return "no such chunk"
    if not 0 <= lo < hi <= layout.num_heads:
        return "no such heads"
    if not 0 <= i < n:
        return "no such piece"
    return "only KV is cut into pieces" if block.operand != KV and block.piece != WHOLE else None


_Arrivals = tuple[list[tuple[int, Block]], list[tuple[int, int, list[Fold]]]]


def _transfers(replay: _Replay, transfers: tuple[Transfer, ...], when: int) -> _Arrivals:
    ranks = range(replay.layout.num_ranks)
    blocks: list[tuple[int, Block]] = []
    coming: dict[tuple[int, str, int], list[Block]] = defaultdict(list)
    states: list[tuple[int, int, list[Fold]]] = []
    for t in transfers:
        problem = _malformed(replay.layout, t.block)
        if t.src == t.dst or t.src not in ranks or t.dst not in ranks:
            problem = "bad link"
        elif problem is None and t.block.operand == STATE:
            taken, problem = _take_state(replay, t)
            states.append((t.dst, t.block.chunk, taken))
        elif problem is None:
            key = (t.dst, t.block.operand, t.block.chunk)
            if not replay.use(t.src, t.block, when):
                problem = "not held"
            elif any(b.overlaps(t.block) for b in replay.held[key] + coming[key]):
                problem = "already there"
            coming[key].append(t.block)
            blocks.append((t.dst, t.block))
        if problem:
            replay.errors.append(f"round {when}: {problem}: {t}")
    return blocks, states


def _take_state(replay: _Replay, t: Transfer) -> tuple[list[Fold], str | None]:
    """Remove from the sender's slot what the transfer carries away."""
    lo, hi = t.block.heads
    slot = replay.slots[t.src, t.block.chunk]
    taken = [f for f in slot if lo < f.heads[1] and f.heads[0] < hi]
    replay.slots[t.src, t.block.chunk] = [f for f in slot if f.heads[1] <= lo or hi <= f.heads[0]]
    if not taken:
        return taken, "empty state sent"
    cut = any(f.heads[0] < lo or f.heads[1] > hi for f in taken)
    return taken, "state cut across heads" if cut else None


def _attend(replay: _Replay, a: Attend, when: int) -> None:
    layout, problem = replay.layout, None
    if a.rank not in range(layout.num_ranks) or (a.q.operand, a.kv.operand) != (Q, KV) or a.q.heads != a.kv.heads:
        problem = "malformed"
    else:
        problem = _malformed(layout, a.q) or _malformed(layout, a.kv)
    if problem is None:
        if not all([replay.use(a.rank, a.q, when), replay.use(a.rank, a.kv, when)]):
            problem = "not held"
        elif a.mask == EMPTY or a.mask != layout.mask(a.q.chunk, a.kv.chunk):
            problem = "wrong mask"
        elif a.mask == CAUSAL and a.kv.piece != WHOLE:
            problem = "causal mask on a piece"
        replay.slots[a.rank, a.q.chunk].append(Fold(a.q.heads, a.kv, a.mask == CAUSAL))
    if problem:
        replay.errors.append(f"round {when}: {problem}: {a}")


def _coverage(layout: Layout, state: Block, folds: list[Fold]) -> Iterator[str]:
    """Every visible KV chunk, each of its slices, for each head of the state, exactly once."""
    by_chunk: dict[int, list[Fold]] = defaultdict(list)
    for f in folds:
        by_chunk[f.kv.chunk].append(f)
    visible = {c for c in range(layout.num_chunks) if layout.mask(state.chunk, c) != EMPTY}
    for c in sorted(set(by_chunk) - visible):
        yield f"{state} sees invisible kv{c}"
    for c in sorted(visible):
        found = by_chunk[c]
        if len(found) == 1 and found[0].heads == state.heads and found[0].kv.piece == WHOLE:
            continue
        slices = lcm(*(f.kv.piece[1] for f in found))
        times = np.zeros((layout.num_heads, slices), int)
        for f in found:
            i, n = f.kv.piece
            times[slice(*f.heads), slices * i // n : slices * (i + 1) // n] += 1
        times[slice(*state.heads)] -= 1
        if times.any():
            h, s = (int(x[0]) for x in times.nonzero())
            wrong = "missing" if times[h, s] < 0 else "too often"
            yield f"{state}: head {h} of kv{c}, slice {s}/{slices}, {wrong}"


def _kept(replay: _Replay) -> Iterator[str]:
    """Where every rank has to keep all new keys: that all of them are there. Nothing is there twice."""
    layout = replay.layout
    for rank in range(layout.num_ranks):
        for chunk in range(layout.num_new if layout.history == "copies" else 0):
            blocks = replay.held[rank, KV, chunk]
            share = sum(Fraction(b.heads[1] - b.heads[0], layout.num_heads * b.piece[1]) for b in blocks)
            if share != 1:
                yield f"kv{chunk} is not kept: rank {rank} ends with {share} of it"


def _peaks(replay: _Replay, plan: Plan, operand: str) -> tuple[int, ...]:
    alive = np.zeros((plan.layout.num_ranks, len(plan.rounds) + 2), int)
    for (rank, block), since in replay.arrived.items():
        if block.operand == operand:
            alive[rank, since : replay.last_use.get((rank, block), since) + 1] += 1
    return tuple(alive.max(axis=1).tolist())
