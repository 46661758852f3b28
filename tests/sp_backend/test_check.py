"""The proof catches what it must: hand-made mistakes, and thousands of random ones."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sp_backend.check import check, rendezvous
from sp_backend.columns import Rounds, columns_of
from sp_backend.kernels import get_kernel
from sp_backend.layout import CAUSAL, EMPTY, FULL, KV, STATE, Block, Layout, Q
from sp_backend.native import choose_kernel
from sp_backend.plan import Plan, PlanError, Round, Transfer
from sp_backend.proof import is_proven
from sp_backend.strategies import STRATEGIES, Variant, plan_for, variants
from tests.lockstep import Batch, Request, error, run_lockstep

SIZES = {"num_heads": 6, "num_kv_heads": 3}


def edit(plan: Plan, index: int, change: Callable[[list[Any], list[Any]], None]) -> Plan:
    """The plan with round `index` changed in place by change(transfers, attends)."""
    rounds = list(plan.rounds)
    transfers, attends = list(rounds[index].transfers), list(rounds[index].attends)
    change(transfers, attends)
    rounds[index] = Round(tuple(transfers), tuple(attends))
    return replace(plan, rounds=tuple(rounds))


def errors(plan: Plan) -> str:
    return "\n".join(check(plan).errors)


@pytest.fixture
def ring() -> Plan:
    return plan_for("ring_pass_kv", num_ranks=3, **SIZES)


@pytest.fixture
def token_ring() -> Plan:
    return plan_for("token_ring", num_ranks=3, **SIZES)


def test_a_block_that_never_arrives(ring: Plan) -> None:
    assert "not held: Attend" in errors(edit(ring, 0, lambda ts, _: ts.pop(0)))


def test_a_block_used_in_the_round_of_its_arrival(ring: Plan) -> None:
    merged = Round(ring.rounds[0].transfers, ring.rounds[0].attends + ring.rounds[1].attends)
    assert "not held" in errors(replace(ring, rounds=(merged, ring.rounds[1]._replace(attends=()), *ring.rounds[2:])))


def test_a_pair_that_is_missing_or_seen_twice(ring: Plan) -> None:
    assert "missing" in errors(edit(ring, 1, lambda _, ats: ats.pop()))
    assert "too often" in errors(edit(ring, 1, lambda _, ats: ats.append(ats[0])))


def test_a_wrong_mask(ring: Plan) -> None:
    def unmask(_: list[Any], attends: list[Any]) -> None:
        i = next(i for i, a in enumerate(attends) if a.mask == CAUSAL)
        attends[i] = attends[i]._replace(mask=FULL)

    found = errors(edit(ring, 0, unmask))
    assert "wrong mask" in found and "is not seen once" in found  # by symbols and by counting tokens


def test_deliveries_twice_or_in_vain(ring: Plan) -> None:
    again = ring.rounds[0].transfers[0]
    assert "already there" in errors(edit(ring, 0, lambda ts, _: ts.append(again)))
    assert "already there" in errors(edit(ring, 1, lambda ts, _: ts.append(again)))
    half = again._replace(block=again.block._replace(piece=(0, 2)))
    assert "already there" in errors(edit(ring, 1, lambda ts, _: ts.append(half)))
    useless = Transfer(Block(Q, 0, (0, 6)), 0, 1)
    assert "delivered in vain" in errors(edit(ring, 0, lambda ts, _: ts.append(useless)))


def test_states_lost_left_behind_or_sent_empty(token_ring: Plan) -> None:
    last = len(token_ring.rounds) - 1
    found = errors(edit(token_ring, last, lambda ts, _: ts.pop()))
    assert "state left behind" in found and "missing" in found
    state = next(t for t in token_ring.rounds[last].transfers)
    assert "empty state sent" in errors(edit(token_ring, last, lambda ts, _: ts.append(state)))
    part = state._replace(block=state.block._replace(heads=(0, 3)))
    assert "cut across heads" in errors(edit(token_ring, last, lambda ts, _: ts.__setitem__(0, part)))


def test_malformed_instructions(ring: Plan) -> None:
    block = Block(KV, 0, (0, 6))
    for transfer, reason in [
        (Transfer(block, 0, 0), "bad link"),
        (Transfer(block, 0, 3), "bad link"),
        (Transfer(block._replace(chunk=9), 0, 1), "no such chunk"),
        (Transfer(block._replace(heads=(0, 7)), 0, 1), "no such heads"),
        (Transfer(block._replace(piece=(2, 2)), 0, 1), "no such piece"),
        (Transfer(Block(Q, 0, (0, 6), (0, 2)), 0, 1), "only KV is cut"),
    ]:
        assert reason in errors(edit(ring, 0, lambda ts, _, t=transfer: ts.append(t)))  # type: ignore[misc]


def test_pieces_of_a_chunk_may_travel_apart_but_must_all_come() -> None:
    """Rank 1 attends chunk 0 in two halves, as strategies with several rings do."""
    plan = plan_for("ring_pass_kv", num_ranks=2, kind="contiguous", **SIZES)

    def halve(x: Any) -> list[Any]:
        name = "block" if isinstance(x, Transfer) else "kv"
        return [x._replace(**{name: getattr(x, name)._replace(piece=(i, 2))}) for i in range(2)]

    def cut(transfers: list[Any], attends: list[Any]) -> None:
        transfers[:] = [h for t in transfers for h in halve(t)]
        attends[:] = [h for a in attends for h in (halve(a) if a.mask == FULL else [a])]

    halves = edit(edit(plan, 0, cut), 1, cut)
    assert not errors(halves)
    assert "missing" in errors(edit(halves, 1, lambda _, ats: ats.pop()))
    batch = Batch(halves.layout, [Request(13, 9), Request(4)])
    assert error(run_lockstep(halves, batch).outs, batch.expected()) < 1e-5


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_sends_may_block_because_receives_are_posted_first(num_ranks: int) -> None:
    ring = plan_for("ring_pass_kv", num_ranks=num_ranks, num_heads=8, num_kv_heads=8)
    assert not rendezvous(ring)
    stuck = rendezvous(ring, receives_first=False)
    assert stuck == [f"deadlock: rank {r} can never send {r}>{(r - 1) % num_ranks}" for r in range(num_ranks)]


def test_loads_and_peaks(ring: Plan) -> None:
    """A downward ring of 3: two new chunks and a history a rank, the back chunk of rank 0 dropped at once."""
    report = check(ring)
    assert report.loads[0] == {(0, 2): 2, (1, 0): 3, (2, 1): 3}
    assert report.loads[1] == {(0, 2): 2, (1, 0): 3, (2, 1): 2}
    assert report.loads[2] == {}
    assert report.peak_kv_blocks == (6, 5, 4) and report.peak_q_blocks == (0, 0, 0)


class Mutator:
    """Changes one instruction of a plan at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def mutate(self, plan: Plan) -> Plan:
        rounds = [(list(r.transfers), list(r.attends)) for r in plan.rounds]
        spots = [(i, k, j) for i, r in enumerate(rounds) for k in (0, 1) for j in range(len(r[k]))]
        i, k, j = self.random.choice(spots)
        lines, line = rounds[i][k], rounds[i][k][j]
        match self.random.choice(["delete", "duplicate", "move", "move", "edit", "edit", "edit", "edit"]):
            case "delete":
                lines.pop(j)
            case "duplicate":
                self.random.choice(rounds)[k].append(line)
            case "move":
                lines.pop(j)
                to = i + self.random.choice([-1, 1])
                if not 0 <= to < len(rounds):
                    rounds.insert(max(to, 0), ([], []))
                    to = max(to, 0)
                rounds[to][k].append(line)
            case _:
                lines[j] = self.edit(plan.layout, line)
        return replace(plan, rounds=tuple(Round(tuple(t), tuple(a)) for t, a in rounds))

    def edit(self, lay: Layout, line: Any) -> Any:
        pick = self.random.choice
        if isinstance(line, Transfer):
            name = pick(["src", "dst", "block"])
            if name == "block":
                return line._replace(block=self.block(lay, line.block))
            return line._replace(**{name: pick(range(lay.num_ranks))})
        name = pick(["rank", "mask", "q", "kv"])
        if name == "rank":
            return line._replace(rank=pick(range(lay.num_ranks)))
        if name == "mask":
            return line._replace(mask=pick([EMPTY, CAUSAL, FULL]))
        return line._replace(**{name: self.block(lay, getattr(line, name))})

    def block(self, lay: Layout, block: Block) -> Block:
        pick, heads = self.random.choice, lay.num_heads
        match pick(["chunk", "heads", "piece", "operand"]):
            case "chunk":
                return block._replace(chunk=pick(range(lay.num_chunks)))
            case "heads":
                return block._replace(heads=pick([(0, heads), (0, heads // 2), (heads // 2, heads), (1, 2)]))
            case "piece":
                return block._replace(piece=pick([(0, 1), (0, 2), (1, 2), (2, 3)]))
            case _:
                return block._replace(operand=pick([Q, KV, STATE]))


def plans_to_mutate() -> list[Plan]:
    """Every strategy by itself on 2 and 3 ranks, every variant on 4, causal and full in turn."""
    of_ranks = {p: [Variant(name) for name in STRATEGIES] for p in (2, 3)} | {4: variants(4, SIZES["num_heads"])}
    cases = [
        (v, num_ranks, kind) for num_ranks, vs in of_ranks.items() for v in vs for kind in STRATEGIES[v.strategy].kinds
    ]
    return [
        plan_for(v, num_ranks=num_ranks, kind=kind, causal=i % 3 > 0, **SIZES)
        for i, (v, num_ranks, kind) in enumerate(cases)
    ]


def test_every_mutant_that_is_proven_is_correct() -> None:
    plans, kernel = plans_to_mutate(), get_kernel(choose_kernel()[0])
    mutator, killed, survived = Mutator(seed=1), 0, 0
    for i in range(4000):
        plan = plans[i % len(plans)]
        mutant = mutator.mutate(plan)
        if mutant == plan:
            continue
        if check(mutant).errors:
            killed += 1
            continue
        survived += 1
        batch = Batch(mutant.layout, [Request(11, 9), Request(3, home=1), Request(5, 4, home=3)], head_dim=4)
        assert error(run_lockstep(mutant, batch, kernel=kernel).outs, batch.expected()) < 1e-5, mutant.table()
    assert killed > 2500 and survived > 500  # reordered, split or rerouted without harm


def test_keys_that_are_not_kept_are_an_error() -> None:
    plan = plan_for("token_ring", num_ranks=3, num_heads=4, num_kv_heads=2, copies=True)
    assert not check(plan).errors
    copies = [t for r in plan.rounds for t in r.transfers if t.block.operand == KV]
    assert len(copies) == 3 * 4  # every rank gets the two chunks of each other one
    for lost in copies:
        rounds = tuple(r._replace(transfers=tuple(t for t in r.transfers if t != lost)) for r in plan.rounds)
        assert check(replace(plan, rounds=rounds)).errors == (
            f"kv{lost.block.chunk} is not kept: rank {lost.dst} ends with 0 of it",
        )


def test_a_strategy_that_moves_a_part_of_the_heads_cannot_keep_copies() -> None:
    with pytest.raises(PlanError, match="is not kept"):
        plan_for("ulysses", num_ranks=2, num_heads=4, num_kv_heads=2, copies=True)


def expressible(plan: Plan) -> bool:
    """Whether columns can say it: attends of queries and keys of the same heads, that see something."""
    attends = [a for r in plan.rounds for a in r.attends]
    return all(
        (a.q.operand, a.kv.operand) == (Q, KV) and a.q.heads == a.kv.heads and a.q.piece == (0, 1) and a.mask != EMPTY
        for a in attends
    )


def test_the_quick_proof_is_never_more_lenient() -> None:
    """It takes all plans as they are, and no mutant in which check finds a mistake."""
    plans, taken, refused = plans_to_mutate(), 0, 0
    for plan in plans:
        assert is_proven(plan), plan.name
    for seed in range(3000):
        mutant = Mutator(seed).mutate(plans[seed % len(plans)])
        if expressible(mutant):
            proven, right = is_proven(replace(mutant, rounds=Rounds(columns_of(mutant)))), not check(mutant).errors
            assert right or not proven, f"{mutant.name}, seed {seed}"
            taken, refused = taken + proven, refused + (right and not proven)
    assert taken > refused  # it is quick for most that are right
