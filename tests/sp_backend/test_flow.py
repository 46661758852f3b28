"""Flow says of all ranks at once what each rank's program, which the executor runs, says of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from sp_backend.columns import OPERANDS
from sp_backend.flow import Flow, flow_of
from sp_backend.layout import KV, STATE, Block, Heads
from sp_backend.plan import Plan
from sp_backend.program import Call, Program, ProgramRound, Use, compile_rank
from sp_backend.shape import ModelShape
from sp_backend.simulate import simulate
from sp_backend.strategies import STRATEGIES, Variant, plan_for, variants
from tests.lockstep import Batch, Request, run_lockstep
from tests.sp_backend.machines import mesh

Told = Counter[tuple[Any, ...]]  # (what, round, rank, ...)
Link = tuple[int, int, int]  # round, src, dst


def told_by_flow(flow: Flow) -> Told:
    t, found = flow.columns.transfers, Counter[tuple[Any, ...]]()
    links = list(zip(*(x.tolist() for x in flow.messages), strict=True))

    def block(row: int) -> tuple[Any, ...]:
        return OPERANDS[t.operand[row]], int(t.chunk[row]), int(t.hi[row] - t.lo[row]), int(t.pieces[row])

    for row, message in enumerate(flow.message_of.tolist()):
        found["message", links[message], block(row)] += 1
    for when, rank, message in zip(*flow.waits, strict=True):
        found["wait", when, rank, links[message]] += 1
    for when, rank, message, chunk, heads, before in zip(*flow.folds, strict=True):
        found["fold", when, rank, links[message], chunk, heads, bool(before)] += 1
    for when, rank, row, beside in zip(*flow.copies, strict=True):
        found["copy", when, rank, block(row), block(beside)] += 1
    calls = list(zip(*(x.tolist() for x in flow.calls), strict=True))
    for call, rank, message in zip(*flow.call_waits, strict=True):
        assert calls[call][1] == rank
        found["operand", *calls[call], links[message]] += 1
    keys: dict[int, list[Any]] = {}
    for part, chunk, cut in zip(*(x.tolist() for x in flow.keys), strict=True):
        keys.setdefault(part, []).append((chunk, flow.forms.cuts[cut]))
    for i, (call, q, heads, causal, merges) in enumerate(zip(*(x.tolist() for x in flow.parts), strict=True)):
        found["part", *calls[call], q, heads, causal, merges, tuple(sorted(keys.get(i, [])))] += 1
    return found


def told_by_programs(plan: Plan, paged: bool) -> Told:
    layout, found = plan.layout, Counter[tuple[Any, ...]]()
    for rank in range(layout.num_ranks):
        own = [c for c in layout.kv_of(rank) if layout.owner(c) == rank] if paged else []
        in_order = sorted(own, key=lambda c: (c < layout.num_new, c))
        found.update(_Walk(plan, rank, compile_rank(plan, rank, in_order)).told())
    return found


class _Walk:
    """Follows one rank as the executor goes."""

    def __init__(self, plan: Plan, rank: int, program: Program) -> None:
        self._layout, self._rank, self._program = plan.layout, rank, program
        self._came: dict[Block, Link] = {}
        self._arriving: list[tuple[Link, Block]] = []  # states
        self._filled: set[tuple[int, Heads]] = set()  # slots with something in them

    def told(self) -> Iterator[tuple[Any, ...]]:
        for when, r in enumerate(self._program.rounds):
            yield from self._round(when, r)
        yield from self._folds(len(self._program.rounds), self._arriving, before=False)

    def _round(self, when: int, r: ProgramRound) -> Iterator[tuple[Any, ...]]:
        at = when, self._rank
        early = self._fold_before([u.block for m in r.sends for u in m.uses])
        yield from self._folds(when, early, before=True)
        passed_on = {self._came[u.held] for m in r.sends for u in m.uses if u.held in self._came}
        yield from (("wait", *at, link) for link in passed_on | {link for link, _ in early})
        for m in r.sends:
            yield from (("copy", *at, _form(block), _form(beside)) for block, beside in self._copies(m.uses))
        usable, self._arriving = self._arriving, []
        for m in r.receives:
            link = when, m.peer, self._rank
            yield from (("message", link, _form(b)) for b in m.blocks)
            self._arriving += [(link, b) for b in m.blocks if b.operand == STATE]
            self._came |= {b: link for b in m.blocks if b.operand != STATE}
        for turn, call in enumerate(r.calls):
            yield from self._call((*at, turn), call)
        yield from self._folds(when, usable, before=False)
        self._filled |= {self._slot(b) for _, b in usable}

    def _folds(self, when: int, states: Iterable[tuple[Link, Block]], before: bool) -> Iterator[tuple[Any, ...]]:
        return (("fold", when, self._rank, link, b.chunk, _width(b), before) for link, b in states)

    def _slot(self, block: Block) -> tuple[int, Heads]:
        return block.chunk, self._program.slots[block.chunk, block.heads]

    def _fold_before(self, blocks: list[Block]) -> list[tuple[Link, Block]]:
        leaving = [b for b in blocks if b.operand == STATE]
        folds = [f for f in self._arriving if any(f[1].chunk == b.chunk for b in leaving)]
        self._arriving = [f for f in self._arriving if f not in folds]
        self._filled -= {self._slot(b) for b in leaving}
        return folds

    def _copies(self, uses: tuple[Use, ...]) -> Iterator[tuple[Block, Block]]:
        own = [u.block for u in uses if u.held not in self._came]
        cached = next((b for b in own if b.operand == KV and b.chunk >= self._layout.num_new), None)
        for u in uses:
            if u.block.operand == STATE or u.block != u.held:
                yield u.block, u.block
            elif cached is not None and len(own) > 1:
                yield u.block, cached

    def _call(self, at: tuple[int, int, int], call: Call) -> Iterator[tuple[Any, ...]]:
        uses = [u for chunk in call.qs for u in chunk]
        operands = {self._came[u.held] for u in (*uses, *call.kvs) if u.held in self._came}
        yield from (("operand", *at, link) for link in operands)
        for chunk, seen in zip(call.qs, call.num_seen, strict=True):
            slots = [self._slot(u.block) for u in chunk]
            wider = any(slot[1] != u.block.heads for u, slot in zip(chunk, slots, strict=True))
            merges = wider or any(slot in self._filled for slot in slots)
            self._filled |= set(slots)
            full = tuple(sorted((kv.block.chunk, kv.block.piece) for kv in call.kvs[: seen - call.causal]))
            heads = sum(_width(u.block) for u in chunk)
            yield "part", *at, chunk[0].block.chunk, heads, call.causal, merges, full


def _form(b: Block) -> tuple[Any, ...]:
    return b.operand, b.chunk, _width(b), b.piece[1]


def _width(block: Block) -> int:
    return block.heads[1] - block.heads[0]


def check(plan: Plan) -> None:
    for paged in (True, False):
        assert told_by_flow(flow_of(plan, paged=paged)) == told_by_programs(plan, paged), (plan.name, paged)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 6, 8])
def test_of_every_variant(num_ranks: int) -> None:
    sizes: dict[str, Any] = {"num_ranks": num_ranks, "num_heads": 24, "num_kv_heads": 8}
    for i, variant in enumerate([*variants(num_ranks, 24), *variants(num_ranks, 24, "heads")]):
        for kind in STRATEGIES[variant.strategy].kinds:
            check(plan_for(variant, kind=kind, causal=i % 3 > 0, **sizes))


@pytest.mark.parametrize("num_ranks", [1, 5, 7, 12, 16])
def test_of_every_strategy(num_ranks: int) -> None:
    sizes: dict[str, Any] = {"num_ranks": num_ranks, "num_heads": 2 * num_ranks, "num_kv_heads": num_ranks}
    for name, strategy in STRATEGIES.items():
        for kind in strategy.kinds:
            if (name, kind) != ("decode", "heads"):  # its groups of heads are one call, which flow counts apart
                check(plan_for(name, kind=kind, **sizes))
    check(plan_for("sharded_q", redundant_kv=True, **sizes))
    if num_ranks > 1:
        check(plan_for("ring_pass_q", copies=True, **sizes))


# What ranks really do


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_so_many_kernel_calls_are_made_as_are_simulated(num_ranks: int) -> None:
    """On ranks whose keys are in pages, each with rows of every chunk and enough queries for keys to be joined."""
    shape = ModelShape(num_heads=12, num_kv_heads=4, head_dim=8, itemsize=4)
    for variant in [*variants(num_ranks, 12), *variants(num_ranks, 12, "heads"), Variant("local")]:
        plan = plan_for(variant, num_ranks=num_ranks, num_heads=12, num_kv_heads=4)
        homes = range(0, num_ranks, plan.layout.group_size)
        batch = Batch(plan.layout, [Request(40 * num_ranks, 30, home) for home in homes])
        ranks = run_lockstep(plan, batch, paged=True).executors
        found = simulate(plan, mesh(num_ranks), shape, batch.geometry)
        simulated = Counter(e.rank for e in found.timeline if e.kind == "attend")
        assert [e.counters.kernel_calls for e in ranks] == [simulated[r] for r in range(num_ranks)], str(variant)


@pytest.mark.parametrize("cached", [0, 30])
def test_new_and_cached_keys_of_a_rank_are_one_call(cached: int) -> None:
    """In layout tokens: where both its chunks lie, with what is cached, in its pages."""
    plan = plan_for("ring_pass_kv", num_ranks=4, num_heads=12, num_kv_heads=4)
    ranks = run_lockstep(plan, Batch(plan.layout, [Request(160, cached)]), paged=True).executors
    assert [e.counters.kernel_calls for e in ranks] == [4] * 4  # one for each round
