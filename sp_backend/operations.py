"""What each rank does in each round of a plan, in the executor's order: the structure that cost and simulation put
times to. Pure: no torch, no sizes, no times.

A message is one link's blocks of one round. Waits are named by the message they wait for, at its first use: before a
block of it is sent on, before a kernel call that reads it, or, for a state, when it is folded.
"""

from __future__ import annotations

from dataclasses import dataclass

from sp_backend.layout import KV, STATE, Block, Heads
from sp_backend.plan import Plan
from sp_backend.program import Call, Program, ProgramRound, Use, compile_rank


@dataclass(frozen=True, slots=True)
class MessageOp:
    round: int
    src: int
    dst: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """Merge a state that arrived."""

    message: int
    block: Block


@dataclass(frozen=True, slots=True)
class Copy:
    """Pack a block into a message; only needed if `beside` has rows too."""

    block: Block
    beside: Block


@dataclass(frozen=True, slots=True)
class Part:
    """One query chunk of a kernel call. causal: against itself, which is the last of the keys; the others are full."""

    qs: tuple[Block, ...]  # adjacent groups of heads
    kvs: tuple[Block, ...]
    causal: bool
    merges: tuple[Block, ...]  # of qs: those whose result is folded into a slot that holds something


@dataclass(frozen=True, slots=True)
class CallOp:
    needs: tuple[int, ...]  # messages
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class RankOps:
    """One rank's round, top to bottom."""

    receives: tuple[int, ...]
    needs: tuple[int, ...]  # messages with blocks that are sent on
    folds_before: tuple[Fold, ...]  # arrived states that are sent on
    copies: tuple[Copy, ...]
    sends: tuple[int, ...]
    calls: tuple[CallOp, ...]
    folds: tuple[Fold, ...]  # states of the round before
    settles: tuple[int, ...]  # messages of the round before, whose memory is needed again


@dataclass(frozen=True, slots=True)
class Operations:
    """rounds[i][rank]; the last is what remains when the plan's rounds are over."""

    messages: tuple[MessageOp, ...]
    rounds: tuple[tuple[RankOps, ...], ...]


def operations(plan: Plan) -> Operations:
    ranks = range(plan.layout.num_ranks)
    programs = [compile_rank(plan, r) for r in ranks]
    ids: dict[tuple[int, int, int], int] = {}
    messages: list[MessageOp] = []
    for rank, program in enumerate(programs):
        for i, r in enumerate(program.rounds):
            for m in r.receives:
                ids[i, m.peer, rank] = len(messages)
                messages.append(MessageOp(i, m.peer, rank, m.blocks))
    by_rank = [_Walk(plan, rank, program, ids).rounds() for rank, program in enumerate(programs)]
    return Operations(tuple(messages), tuple(zip(*by_rank, strict=True)))


class _Walk:
    """Follows one rank as the executor goes."""

    def __init__(self, plan: Plan, rank: int, program: Program, ids: dict[tuple[int, int, int], int]) -> None:
        self._layout, self._rank, self._program, self._ids = plan.layout, rank, program, ids
        self._came: dict[Block, int] = {}  # a received block -> its message
        self._arriving: list[Fold] = []
        self._filled: set[tuple[int, Heads]] = set()  # slots with something in them
        self._sent: tuple[int, ...] = ()

    def rounds(self) -> list[RankOps]:
        done = [self._round(i, r) for i, r in enumerate(self._program.rounds)]
        return [*done, RankOps((), (), (), (), (), (), tuple(self._arriving), self._sent)]

    def _round(self, index: int, r: ProgramRound) -> RankOps:
        receives = tuple(self._ids[index, m.peer, self._rank] for m in r.receives)
        needs = {self._came[u.held] for m in r.sends for u in m.uses if u.held in self._came}
        folds_before = self._fold_before([u.block for m in r.sends for u in m.uses])
        copies = [copy for m in r.sends for copy in self._copies(m.uses)]
        usable, self._arriving = self._arriving, []
        for message, incoming in zip(receives, r.receives, strict=True):
            for block in incoming.blocks:
                if block.operand == STATE:
                    self._arriving.append(Fold(message, block))
                else:
                    self._came[block] = message
        calls = tuple(self._call(c) for c in r.calls)
        self._filled |= {self._slot(fold.block) for fold in usable}
        before, self._sent = self._sent, tuple(self._ids[index, self._rank, m.peer] for m in r.sends)
        return RankOps(
            receives, tuple(sorted(needs)), folds_before, tuple(copies), self._sent, calls, tuple(usable), before
        )

    def _slot(self, block: Block) -> tuple[int, Heads]:
        return block.chunk, self._program.slots[block.chunk, block.heads]

    def _fold_before(self, blocks: list[Block]) -> tuple[Fold, ...]:
        leaving = [b for b in blocks if b.operand == STATE]
        folds = [f for f in self._arriving if any(f.block.chunk == b.chunk for b in leaving)]
        self._arriving = [f for f in self._arriving if f not in folds]
        self._filled -= {self._slot(b) for b in leaving}
        return tuple(folds)

    def _copies(self, uses: tuple[Use, ...]) -> list[Copy]:
        """States, parts of a block, and cached next to new keys, which lie elsewhere, have to be packed."""
        own = [u.block for u in uses if u.held not in self._came]
        cached = next((b for b in own if b.operand == KV and b.chunk >= self._layout.num_new), None)
        copies = []
        for u in uses:
            if u.block.operand == STATE or u.block != u.held:
                copies.append(Copy(u.block, u.block))
            elif cached is not None and len(own) > 1:
                copies.append(Copy(u.block, cached))
        return copies

    def _call(self, call: Call) -> CallOp:
        uses = [u for chunk in call.qs for u in chunk]
        needs = {self._came[u.held] for u in (*uses, *call.kvs) if u.held in self._came}
        parts = []
        for chunk, seen in zip(call.qs, call.num_seen, strict=True):
            qs, slots = [u.block for u in chunk], [self._slot(u.block) for u in chunk]
            merges = [q for q, slot in zip(qs, slots, strict=True) if slot in self._filled or slot[1] != q.heads]
            self._filled |= set(slots)
            parts.append(Part(tuple(qs), tuple(kv.block for kv in call.kvs[:seen]), call.causal, tuple(merges)))
        return CallOp(tuple(sorted(needs)), tuple(parts))
