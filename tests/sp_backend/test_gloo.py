"""The same plans on real ranks, over each transport: equal to lockstep bit for bit, and every byte predicted."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from sp_backend.execute import Executor
from sp_backend.geometry import predicted_bytes
from sp_backend.kernels import get_kernel
from sp_backend.layout import Kind
from sp_backend.native import choose_kernel
from sp_backend.strategies import STRATEGIES, plan_for, variants
from sp_backend.transport import Expected, Message, Transport
from sp_backend.transport.gather import gather_bytes
from sp_backend.transport.gloo import GlooTransport, sp_groups
from sp_backend.transport.recording import RecordingTransport
from sp_backend.transport.shared_memory import GRANULE, SharedMemoryTransport, shared_memory
from tests.lockstep import Batch, Request, run_lockstep
from tests.ranks import run_on_ranks

WORLD = 4  # one pool of processes for all tests
REQUESTS = [Request(37, 20), Request(3), Request(1, 50, 1), Request(0, 5), Request(1, 8, 2)]
Case = dict[str, Any]


def cases(num_ranks: int) -> list[Case]:
    """Every variant, and the other layouts of each strategy."""
    others: list[tuple[str, Kind, bool]] = [(n, k, False) for n, s in STRATEGIES.items() for k in s.kinds]
    others += [("sharded_q", "heads", True)]
    sizes = {"num_ranks": num_ranks, "num_heads": 12, "num_kv_heads": 4}
    every = [{"variant": v, "kind": "zigzag", "redundant_kv": False, **sizes} for v in variants(num_ranks, 12)]
    return every + [{"variant": n, "kind": k, "redundant_kv": red, **sizes} for n, k, red in others if k != "zigzag"]


def make(transport: str, num_ranks: int, rank: int) -> Transport:
    gloo = GlooTransport.create(num_ranks, num_ranks, rank, timeout=20)
    made = shared_memory(gloo, timeout=20) if transport == "shared_memory" else gloo
    assert made is not None
    return made


def run_cases(
    rank: int, size: int, transport: str, num_ranks: int, plans: list[Case], dtype: torch.dtype, how: dict[str, int]
) -> list[Any]:
    if rank >= num_ranks:
        return []
    wire = RecordingTransport(make(transport, num_ranks, rank))
    results = []
    for case in plans:
        plan = plan_for(**case)
        batch = Batch(plan.layout, REQUESTS, dtype=dtype)
        wire.bytes.clear()
        kernel = get_kernel(choose_kernel()[0])
        executor = Executor(plan, rank, kernel, wire, head_dim=batch.head_dim, dtype=dtype, **how)
        schedule = executor.schedule(batch.geometry)
        for _ in range(3):  # layers: buffers are reused
            states = executor.run(schedule, batch.q_of(rank), batch.kv_of(rank))
        assert executor.counters.bytes_sent == sum(wire.bytes.values())
        results.append(({c: s.out for c, s in states.items()}, wire.bytes.copy()))
    return results


@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize(("dtype", "how"), [(torch.float32, {"overlap": False}), (torch.bfloat16, {"most_history": 5})])
def test_every_plan_gives_the_bits_of_lockstep_and_sends_the_predicted_bytes(
    transport: str, num_ranks: int, dtype: torch.dtype, how: dict[str, int]
) -> None:
    """how: also without hiding transfers, and with history in pieces."""
    plans = cases(num_ranks)
    by_rank = run_on_ranks(WORLD, run_cases, transport, num_ranks, plans, dtype, how)[:num_ranks]
    for i, case in enumerate(plans):
        plan = plan_for(**case)
        batch = Batch(plan.layout, REQUESTS, dtype=dtype)
        outs = batch.gather([results[i][0] for results in by_rank])
        alone = run_lockstep(plan, batch, kernel=get_kernel(choose_kernel()[0]), **how)
        assert all(torch.equal(a, b) for a, b in zip(outs, alone.outs, strict=True)), case
        sent: Counter[tuple[int, int]] = sum((results[i][1] for results in by_rank), Counter())
        predicted: Counter[tuple[int, int]] = sum(
            predicted_bytes(plan, batch.geometry, batch.head_dim, dtype.itemsize), Counter()
        )
        assert sent == Counter({link: 3 * n for link, n in predicted.items()}), case


def held_after(rank: int, size: int, kind: str, layers: int) -> tuple[int, int]:
    """Bytes that a transport keeps, and messages sent in a layer, which are small ones."""
    transport = make(kind, size, rank)
    plan = plan_for("token_ring", num_ranks=size, num_heads=8, num_kv_heads=2)
    batch = Batch(plan.layout, REQUESTS)
    executor = Executor(
        plan, rank, get_kernel("torch_cpu"), transport, head_dim=batch.head_dim, dtype=torch.float32, overlap=False
    )
    schedule = executor.schedule(batch.geometry)
    for _ in range(layers):
        executor.run(schedule, batch.q_of(rank), batch.kv_of(rank))
        gather_bytes(transport, b"")  # all of it has been read
    if isinstance(transport, SharedMemoryTransport):
        return transport.num_bytes, sum(len(r.sends) for r in schedule.rounds)
    assert isinstance(transport, GlooTransport)
    return transport.pool.num_free_bytes, 0


def test_layers_reuse_their_buffers() -> None:
    assert run_on_ranks(WORLD, held_after, "gloo", 8) == run_on_ranks(WORLD, held_after, "gloo", 3)
    for num_bytes, messages in run_on_ranks(WORLD, held_after, "shared_memory", 40):
        assert 0 < num_bytes <= (messages + 4 * WORLD) * GRANULE


def exchange_in_groups(rank: int, size: int, sp_size: int) -> list[int]:
    transport = GlooTransport.create(size, sp_size, rank, timeout=20)
    peers = [p for p in range(sp_size) if p != transport.rank]
    mine = torch.full((4,), rank, dtype=torch.uint8)
    receiving, sending = transport.exchange([Expected(p, 4) for p in peers], (Message(p, mine) for p in peers))
    for pending in [*receiving, *sending, *receiving]:  # a second wait does nothing
        pending.wait()
    return [int(arriving.wait()[3]) for arriving in receiving]


def test_sp_groups_of_a_larger_world_do_not_mix() -> None:
    assert sp_groups(4, 2) == [[0, 1], [2, 3]]
    assert run_on_ranks(WORLD, exchange_in_groups, 2) == [[1], [0], [3], [2]]
    with pytest.raises(ValueError, match="cannot be divided"):
        sp_groups(6, 4)


def gloo_threads_of(rank: int, size: int, kind: str) -> tuple[int, int]:
    """That a transport adds, and that are left when it is gone."""

    def count() -> int:
        names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
        return sum("gloo" in name for name in names)

    before = count()
    transport = make(kind, size, rank)
    gather_bytes(transport, b"")
    during = count()
    del transport
    return during - before, count() - before


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_ranks_that_share_memory_keep_no_gloo_threads() -> None:
    """Each of its groups has one that wakes a hundred times a second."""
    assert all(during > 0 and left == 0 for during, left in run_on_ranks(WORLD, gloo_threads_of, "gloo"))
    assert run_on_ranks(WORLD, gloo_threads_of, "shared_memory") == [(0, 0)] * WORLD


def wait_for_nothing(rank: int, size: int) -> str:
    transport = GlooTransport.create(size, size, rank, timeout=0.5)
    if rank > 0:
        return ""
    receiving, _ = transport.exchange([Expected(1, 1)], ())
    with pytest.raises(RuntimeError) as failure:
        receiving[0].wait()
    return str(failure.value)


def test_a_silent_rank_is_an_error_after_the_timeout() -> None:
    assert "nothing came from rank 1 (time limit 0.5 s)" in run_on_ranks(WORLD, wait_for_nothing)[0]
