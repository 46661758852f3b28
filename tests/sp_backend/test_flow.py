"""Flow and operations say the same of every plan: one as arrays, the other as objects, from different code."""

from collections import Counter
from typing import Any

import pytest

from sp_backend.columns import OPERANDS
from sp_backend.flow import Flow, flow_of
from sp_backend.layout import Block
from sp_backend.operations import Operations, operations
from sp_backend.plan import Plan
from sp_backend.strategies import STRATEGIES, plan_for, variants

Told = Counter[tuple[Any, ...]]  # (what, round, rank, ...)


def told_by_flow(plan: Plan, flow: Flow) -> Told:
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
        keys.setdefault(part, []).append((chunk, flow.cuts[cut]))
    for i, (call, q, heads, causal, merges) in enumerate(zip(*(x.tolist() for x in flow.parts), strict=True)):
        found["part", *calls[call], q, heads, causal, merges, tuple(sorted(keys.get(i, [])))] += 1
    return found


def told_by_operations(ops: Operations) -> Told:
    found = Counter[tuple[Any, ...]]()
    links = [(m.round, m.src, m.dst) for m in ops.messages]

    def form(b: Block) -> tuple[Any, ...]:
        return b.operand, b.chunk, b.heads[1] - b.heads[0], b.piece[1]

    for link, m in zip(links, ops.messages, strict=True):
        found.update(("message", link, form(b)) for b in m.blocks)
    for when, by_rank in enumerate(ops.rounds):
        for rank, r in enumerate(by_rank):
            at = when, rank
            found.update(("wait", *at, links[m]) for m in {*r.needs, *(f.message for f in r.folds_before)})
            for before, folds in ((True, r.folds_before), (False, r.folds)):
                heads = [(f, f.block.heads[1] - f.block.heads[0]) for f in folds]
                found.update(("fold", *at, links[f.message], f.block.chunk, n, before) for f, n in heads)
            found.update(("copy", *at, form(c.block), form(c.beside)) for c in r.copies)
            for turn, call in enumerate(r.calls):
                found.update(("operand", *at, turn, links[m]) for m in call.needs)
                for p in call.parts:
                    heads_, kvs = sum(q.heads[1] - q.heads[0] for q in p.qs), p.kvs[: len(p.kvs) - p.causal]
                    full = tuple(sorted((kv.chunk, kv.piece) for kv in kvs))
                    found["part", *at, turn, p.qs[0].chunk, heads_, p.causal, bool(p.merges), full] += 1
    return found


def check(plan: Plan) -> None:
    assert told_by_flow(plan, flow_of(plan)) == told_by_operations(operations(plan))


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
