"""Every plan, all ranks in lockstep, against full attention in fp64: outputs, bytes and counters."""

import math
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from torch import Tensor

from sp_backend.buffers import BufferPool, as_bytes, join_rows
from sp_backend.execute import Executor
from sp_backend.geometry import Geometry, predicted_bytes, query_key_pairs
from sp_backend.kernels import Attention, Work, get_kernel
from sp_backend.kernels.reference import kernel as reference
from sp_backend.layout import KV, Block, Kind, Layout
from sp_backend.native import choose_kernel
from sp_backend.pieces import MOST_HISTORY
from sp_backend.plan import Plan
from sp_backend.program import compile_rank
from sp_backend.prune import prune
from sp_backend.state import AttentionState
from sp_backend.strategies import STRATEGIES, plan_for, prove, variants
from sp_backend.transport.lockstep import LockstepNetwork
from tests.lockstep import Batch, Request, error, run_lockstep

KERNEL = choose_kernel()[0]
RAGGED = [Request(37, 20), Request(3, home=1), Request(1, 50, 1), Request(0, 5), Request(16, 3, 2), Request(1, 9, 3)]
SIZES = {  # ranks -> (query heads, KV heads): some groups are cut, MQA and MHA are there
    1: [(8, 2), (4, 4)],
    2: [(12, 4), (8, 1)],
    3: [(12, 4), (4, 4), (8, 1)],
    4: [(12, 4), (8, 1), (4, 4)],
    8: [(8, 2)],
}
CASES = [
    (name, kind, redundant)
    for name, strategy in STRATEGIES.items()
    for kind in strategy.kinds
    for redundant in ((False, True) if kind == "heads" else (False,))
]
COPYING = {
    "ring_pass_kv",
    "ring_pass_kv_up",
    "ring_pass_kv_both",
    "ring_pass_q",
    "token_ring",
    "all_gather_kv",
    "hamilton",
}
NAMES = [f"{n}-{k}{'-redundant' * r}" for n, k, r in CASES]


def plans(name: str, kind: str, redundant: bool, ranks: list[int], causal: bool = True) -> list[Plan]:
    return [
        plan_for(
            name,
            num_ranks=p,
            num_heads=h,
            num_kv_heads=k,
            kind=kind,  # type: ignore[arg-type]
            redundant_kv=redundant,
            causal=causal,
        )
        for p in ranks
        for h, k in SIZES[p]
        if kind != "heads" or h % p == 0
    ]


@pytest.mark.parametrize(("name", "kind", "redundant"), CASES, ids=NAMES)
def test_ragged_batches_with_history_equal_full_attention(name: str, kind: str, redundant: bool) -> None:
    for plan in plans(name, kind, redundant, [1, 2, 3, 4, 8]):
        batch = Batch(plan.layout, RAGGED)
        result = run_lockstep(plan, batch, kernel=get_kernel(KERNEL))
        assert error(result.outs, batch.expected()) < 1e-5
        assert result.links == predicted_bytes(plan, batch.geometry, batch.head_dim, 4)


@pytest.mark.parametrize(("name", "kind", "redundant"), CASES, ids=NAMES)
def test_without_a_causal_mask_every_query_sees_every_key(name: str, kind: str, redundant: bool) -> None:
    for plan in plans(name, kind, redundant, [2, 3], causal=False):
        batch = Batch(plan.layout, RAGGED)
        assert error(run_lockstep(plan, batch, kernel=get_kernel(KERNEL)).outs, batch.expected()) < 1e-5


@pytest.mark.parametrize(("name", "kind", "redundant"), CASES, ids=NAMES)
@pytest.mark.parametrize("window", [None, 6])
def test_keys_scattered_over_pages_are_attended_there(
    name: str, kind: str, redundant: bool, window: int | None
) -> None:
    """Under each kernel in turn: that each reads keys where they lie is for test_kernels.py to show."""
    kernels = cycle(("reference", "torch_cpu", KERNEL))
    for plan, kernel in zip(plans(name, kind, redundant, [1, 2, 3, 4]), kernels, strict=False):
        batch = Batch(plan.layout, RAGGED)
        result = run_lockstep(plan, batch, kernel=get_kernel(kernel), window=window, paged=True, layers=2)
        assert error(result.outs, batch.expected(window)) < 1e-5
        assert result.links == predicted_bytes(plan, batch.geometry, batch.head_dim, 4)


def test_keys_in_pages_are_attended_in_one_call_a_round() -> None:
    """History and new keys of this rank together: a decoded token, and a zigzag ring of two ranks."""
    for name, kind, ranks, request in (
        ("local", "home", 1, Request(1, 50)),
        ("ring_pass_kv", "zigzag", 2, Request(40, 50)),
    ):
        plan = plan_for(name, num_ranks=ranks, num_heads=8, num_kv_heads=2, kind=kind)  # type: ignore[arg-type]
        for executor in run_lockstep(plan, Batch(plan.layout, [request, request]), paged=True).executors:
            assert executor.counters.kernel_calls == ranks


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("name", sorted(COPYING))
def test_with_copies_every_rank_is_shown_every_new_key_once(name: str, kind: str) -> None:
    for ranks in (2, 3, 4):
        plan = plan_for(name, num_ranks=ranks, num_heads=8, num_kv_heads=2, kind=kind, copies=True)  # type: ignore[arg-type]
        batch = Batch(plan.layout, RAGGED)
        result = run_lockstep(plan, batch, layers=2)
        assert error(result.outs, batch.expected()) < 1e-5
        assert result.links == predicted_bytes(plan, batch.geometry, batch.head_dim, 4)
        held = {c: kv for rank in range(ranks) for c, kv in batch.kv_of(rank).items() if kv.numel()}
        for rank, kept in enumerate(result.kept):
            others = {c for c in range(plan.layout.num_new) if c in held and plan.layout.owner(c) != rank}
            assert {block.chunk for block in kept} == others
            for chunk in others:
                blocks = {b: kv for b, kv in kept.items() if b.chunk == chunk}
                assert sum(len(kv) for kv in blocks.values()) == len(held[chunk])
                for block, kv in blocks.items():
                    spans = zip(
                        batch.geometry.spans(Block(KV, chunk, (0, 8))), batch.geometry.ranges(block), strict=True
                    )
                    assert kv.equal(torch.cat([held[chunk][at + lo : at + hi] for (at, _), (lo, hi) in spans]))


def test_many_packed_segments_under_a_full_mask() -> None:
    """As images are packed for a vision model: each patch sees all of its own image and nothing else."""
    segments = [Request(16)] * 60 + [Request(9), Request(23)]
    for variant in variants(3, 6):
        plan = plan_for(variant, num_ranks=3, num_heads=6, num_kv_heads=6, causal=False)
        batch = Batch(plan.layout, segments)
        assert error(run_lockstep(plan, batch, kernel=get_kernel(KERNEL)).outs, batch.expected()) < 1e-5


@pytest.mark.parametrize(("name", "kind", "redundant"), CASES, ids=NAMES)
@pytest.mark.parametrize("window", [1, 6, 1000])
def test_sliding_windows(name: str, kind: str, redundant: bool, window: int) -> None:
    for plan in plans(name, kind, redundant, [2, 4])[::3]:
        batch = Batch(plan.layout, RAGGED)
        for kernel in ("reference", "torch_cpu", KERNEL):
            outs = run_lockstep(plan, batch, kernel=get_kernel(kernel), window=window).outs
            assert error(outs, batch.expected(window)) < 1e-5


@pytest.mark.parametrize(("name", "kind", "redundant"), CASES, ids=NAMES)
def test_the_fast_kernel_in_bfloat16(name: str, kind: str, redundant: bool) -> None:
    """As close to fp64 as partial results rounded to bf16 can be: a small multiple of bf16's 2^-9."""
    for plan in plans(name, kind, redundant, [1, 3, 4]):
        batch = Batch(plan.layout, RAGGED, dtype=torch.bfloat16)
        result = run_lockstep(plan, batch, kernel=get_kernel(KERNEL))
        assert error(result.outs, batch.expected()) < 0.03
        assert result.links == predicted_bytes(plan, batch.geometry, batch.head_dim, 2)


@pytest.mark.parametrize(("name", "kind", "redundant"), CASES, ids=NAMES)
def test_a_layout_without_history(name: str, kind: Kind, redundant: bool) -> None:
    layout = Layout(3, kind, 6, 2, history="none", redundant_kv=redundant)
    plan = prove(prune(STRATEGIES[name].build(layout)))
    batch = Batch(layout, RAGGED)
    assert error(run_lockstep(plan, batch).outs, batch.expected()) < 1e-5


@pytest.mark.parametrize("num_ranks", [*range(1, 9), 12, 13, 16])
def test_up_to_sixteen_ranks(num_ranks: int) -> None:
    """Every strategy; of more than 8 ranks, its layouts in turn. (test_strategies.py proves the plans of all to 16.)"""
    for name, strategy in STRATEGIES.items():
        kinds = strategy.kinds if num_ranks <= 8 else [strategy.kinds[num_ranks % len(strategy.kinds)]]
        for kind in kinds:
            sizes = {"num_ranks": num_ranks, "num_heads": 2 * num_ranks, "num_kv_heads": num_ranks}
            plan = plan_for(name, kind=kind, **sizes)  # type: ignore[arg-type]
            batch = Batch(plan.layout, [Request(9 * num_ranks + 1, 2 * num_ranks + 5), Request(1, 33, 5)], head_dim=2)
            result = run_lockstep(plan, batch, kernel=get_kernel(KERNEL))
            assert error(result.outs, batch.expected()) < 1e-5
            assert result.links == predicted_bytes(plan, batch.geometry, batch.head_dim, 4)


@pytest.mark.parametrize("num_ranks", [4, 6, 8])
def test_every_variant(num_ranks: int) -> None:
    """Options and degrees: groups of ranks run side by side."""
    for variant in variants(num_ranks, 12):
        plan = plan_for(variant, num_ranks=num_ranks, num_heads=12, num_kv_heads=4)
        batch = Batch(plan.layout, RAGGED)
        result = run_lockstep(plan, batch, kernel=get_kernel(KERNEL))
        assert error(result.outs, batch.expected()) < 1e-5, plan.name
        assert result.links == predicted_bytes(plan, batch.geometry, batch.head_dim, 4)


def test_waiting_for_transfers_before_attending_changes_no_bit() -> None:
    for variant in variants(4, 12):
        plan = plan_for(variant, num_ranks=4, num_heads=12, num_kv_heads=4)
        batch = Batch(plan.layout, RAGGED)
        hidden, exposed = (run_lockstep(plan, batch, overlap=overlap).outs for overlap in (True, False))
        assert all(torch.equal(a, b) for a, b in zip(hidden, exposed, strict=True)), plan.name


def test_counters_agree_with_predictions() -> None:
    plan = plan_for("ring_pass_kv", num_ranks=4, num_heads=8, num_kv_heads=2)
    batch = Batch(plan.layout, RAGGED)
    links = predicted_bytes(plan, batch.geometry, batch.head_dim, 4)
    for rank, executor in enumerate(run_lockstep(plan, batch, layers=3).executors):
        sent = sum(n for by in links for (src, _), n in by.items() if src == rank)
        assert executor.counters.bytes_sent == 3 * sent
        assert executor.counters.query_key_pairs == 3 * query_key_pairs(plan, batch.geometry, rank)
        assert executor.counters.wait_seconds > 0 and executor.counters.kernel_calls > 0


@pytest.mark.parametrize(("kind", "calls"), [("home", [2, 1, 1]), ("heads", [2, 1, 1])])
def test_decoding_one_token_reads_each_rank_s_keys_in_one_call(kind: Kind, calls: list[int]) -> None:
    """The owner of the new token attends that and its history; the others just their history, all heads at once."""
    plan = plan_for("decode", num_ranks=3, num_heads=12, num_kv_heads=4, kind=kind)
    result = run_lockstep(plan, Batch(plan.layout, [Request(1, 50, home=0)]))
    assert [e.counters.kernel_calls for e in result.executors] == calls


@pytest.mark.parametrize("num_ranks", [4, 6])
def test_received_keys_are_attended_in_one_call_a_round(num_ranks: int) -> None:
    """However many pieces and chunks they come in; two where some are causal (only ulysses trades own keys away)."""
    for variant in variants(num_ranks, 12):
        plan = plan_for(variant, num_ranks=num_ranks, num_heads=12, num_kv_heads=4)
        for rank in range(num_ranks):
            program = compile_rank(plan, rank)
            for r in program.rounds:
                joined = [c for c in r.calls if c.kvs[0].held not in program.start]
                assert len({c.causal for c in joined}) == len(joined), plan.name
                assert variant.strategy in ("ulysses", "hybrid") or not any(c.causal for c in joined)


def test_keys_are_not_joined_for_few_queries_if_they_are_many_or_under_a_window() -> None:
    """A copy would cost more than it saves, or positions would not ascend."""
    plan = plan_for("all_gather_kv", num_ranks=4, num_heads=4, num_kv_heads=2)

    def calls(new: int, window: int | None = None, cached: int = 40) -> int:
        batch = Batch(plan.layout, [Request(new, cached)], head_dim=2)
        run = run_lockstep(plan, batch, window=window, most_history=1 << 20)
        return run.executors[0].counters.kernel_calls

    assert calls(80) == 4 + 1  # two causal chunks, the front one for the back one, history; then all that came
    assert (
        calls(24) == calls(80, window=1000) == calls(80, cached=60_000) == 4 + 6 + 3
    )  # new chunks and histories of three ranks


def test_every_pair_of_a_sequence_is_attended_by_some_rank() -> None:
    for name, kind, redundant in CASES:
        plan = plan_for(name, num_ranks=4, num_heads=8, num_kv_heads=2, kind=kind, redundant_kv=redundant)
        batch = Batch(plan.layout, RAGGED)
        pairs = sum(query_key_pairs(plan, batch.geometry, r) for r in range(4))
        assert pairs == sum(s.cached * s.new + s.new * (s.new + 1) / 2 for s in RAGGED)


@pytest.mark.parametrize(("name", "kind", "redundant"), CASES, ids=NAMES)
def test_a_layer_takes_no_memory_that_the_one_before_has_not_given_back(name: str, kind: str, redundant: bool) -> None:
    for plan in (plans(name, kind, redundant, [ranks])[0] for ranks in (2, 3)):
        free = [
            [
                executor.pool.num_free_bytes
                for executor in run_lockstep(plan, Batch(plan.layout, RAGGED), layers=n).executors
            ]
            for n in (3, 5)  # sizes settle at first
        ]
        assert free[0] == free[1] and all(free[0])


@pytest.mark.parametrize("name", ["ring_pass_kv", "token_ring"])
def test_memory_for_partial_results_does_not_grow_with_history(name: str) -> None:
    """It is that of the queries a rank has at a time: its own, and in TokenRing those that visit. (A ring of KV joins
    keys that came in blocks: at most as many as come in a round.)"""
    plan = plan_for(name, num_ranks=2, num_heads=4, num_kv_heads=2)
    state = 20 * 4 * (8 + 1) * 4  # rows of a rank, heads, out and lse, fp32
    keys = MOST_HISTORY * 2 * 2 * 8 * 4  # keys and values of 2 heads, fp32
    found = []
    for cached in (20_000, 40_000):
        batch = Batch(plan.layout, [Request(40, cached)])
        executors = run_lockstep(plan, batch, paged=True, layers=3).executors
        found.append([executor.pool.num_free_bytes for executor in executors])
    assert found[0] == found[1] and max(found[0]) <= (2 * state if name == "token_ring" else state + keys)


def test_a_long_step_then_a_short_one_then_an_empty_one() -> None:
    plan = plan_for("ring_pass_kv", num_ranks=2, num_heads=4, num_kv_heads=2)
    network = LockstepNetwork(1)
    alone = plan_for("ring_pass_kv", num_ranks=1, num_heads=4, num_kv_heads=2)
    executor = Executor(alone, 0, reference, network.rank(0), head_dim=8, dtype=torch.float32)
    assert plan.rounds != alone.rounds
    for requests in ([Request(40, 7)], [Request(2)], [Request(0, 3)], []):
        batch = Batch(alone.layout, requests) if requests else None
        geometry = batch.geometry if batch else Geometry([])
        q, kv = (batch.q_of(0), batch.kv_of(0)) if batch else ({}, {})
        states = executor.run(executor.schedule(geometry), q, kv)
        assert sorted(states) == [0, 1]
        assert sum(len(s.out) for s in states.values()) == sum(r.new for r in requests)
        if batch:
            outs = batch.gather([{c: s.out for c, s in states.items()}])
            assert error(outs, batch.expected()) < 1e-5


def test_what_cannot_be_run_is_refused() -> None:
    plan = plan_for("local", num_ranks=1, num_heads=4, num_kv_heads=2, causal=False)
    wire = LockstepNetwork(1).rank(0)
    with pytest.raises(ValueError, match="head_dim must be even"):
        Executor(plan, 0, reference, wire, head_dim=7, dtype=torch.float32)
    with pytest.raises(ValueError, match="window needs causal"):
        Executor(plan, 0, reference, wire, head_dim=8, dtype=torch.float32).schedule(Geometry([[3, 0]]), window=2)


def base_two(work: Work) -> Attention:
    """A kernel that reports its lse in base 2, as some GPU kernels do."""

    def attend(q: Tensor, kv: Tensor, into: AttentionState | None = None, merge: bool = True) -> AttentionState:
        state = reference(work)(q, kv)
        wrong = AttentionState(state.out, state.lse / math.log(2))
        if into is None:
            return wrong
        return into.merge_(wrong) if merge else into.copy_(wrong)

    return attend


def forgetful(work: Work) -> Attention:
    """A kernel that drops the last key of every span."""

    spans = tuple(s._replace(k_hi=s.k_hi - 1) for s in work.spans)
    return reference(replace(work, spans=spans, causal=False))


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n != "local"])
def test_these_tests_would_notice_a_wrong_kernel(name: str) -> None:
    plan = plan_for(name, num_ranks=2, num_heads=4, num_kv_heads=2)
    batch = Batch(plan.layout, RAGGED)
    for wrong in (base_two, forgetful):
        assert error(run_lockstep(plan, batch, kernel=wrong).outs, batch.expected()) > 1e-2


def test_these_tests_would_notice_a_key_block_that_was_not_attended() -> None:
    plan = plan_for("ring_pass_kv", num_ranks=2, num_heads=4, num_kv_heads=2)
    batch = Batch(plan.layout, RAGGED)
    for i, call in [(i, c) for i, r in enumerate(plan.rounds) for c in r.attends]:
        rounds = list(plan.rounds)
        kept = tuple(a for a in rounds[i].attends if a != call)
        rounds[i] = type(rounds[i])(rounds[i].transfers, kept)
        broken = Plan(plan.name, plan.layout, tuple(rounds))
        assert error(run_lockstep(broken, batch).outs, batch.expected()) > 1e-2


def test_pieces_are_cut_from_each_sequence() -> None:
    geometry = Geometry([[5], [0], [4]])
    assert geometry.ranges(Block("KV", 0, (0, 1), (1, 2))) == [(2, 5), (0, 0), (2, 4)]
    assert geometry.spans(Block("KV", 0, (0, 1), (1, 2))) == [(0, 3), (3, 3), (3, 5)]
    assert geometry.num_rows(Block("KV", 0, (0, 1), (1, 2))) == 5


def test_tensors_that_lie_together_are_joined_without_a_copy() -> None:
    whole = torch.arange(24.0).view(6, 2, 2)
    a, b = whole[:2], whole[2:5]
    joined = join_rows([a, b])
    assert joined.data_ptr() == a.data_ptr() and torch.equal(joined, whole[:5])
    assert torch.equal(join_rows([b, a]), torch.cat([b, a]))
    heads = join_rows([a[:, 1:], b[:, 1:]])  # strided rows too
    assert heads.data_ptr() == a[:, 1:].data_ptr() and torch.equal(heads, whole[:5, 1:])
    flat = as_bytes([a, b])
    assert flat is not None and flat.data_ptr() == a.data_ptr() and flat.numel() == whole[:5].nbytes
    assert as_bytes([b, a]) is None and as_bytes([a[:, 1:]]) is None


def test_the_buffer_pool_gives_back_what_fits_and_grows_what_does_not() -> None:
    pool = BufferPool()
    first = pool.take(100)
    pool.give(first)
    again = pool.take(50)
    assert again.data_ptr() == first.data_ptr() and again.shape == (50,)
    pool.give(again)
    assert pool.num_free_bytes == 100
    pool.give(pool.take(200))
    assert pool.num_free_bytes == 200
