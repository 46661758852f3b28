"""Memory shared by the ranks of a host: read in place, and clear errors when a rank is gone."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sp_backend.transport import Expected, Message
from sp_backend.transport.gloo import GlooTransport
from sp_backend.transport.shared_memory import SharedMemoryTransport, shared_memory
from tests.ranks import run_on_ranks

WORLD = 4


def connect(rank: int, size: int, timeout: float = 20.0) -> SharedMemoryTransport:
    made = shared_memory(GlooTransport.create(size, size, rank, timeout), timeout)
    assert made is not None
    return made


def message(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def exchange_many(rank: int, size: int) -> list[list[int]]:
    """Messages of several sizes to each peer, waited for in the opposite order, and once more."""
    transport, sizes = connect(rank, size), (3, 200_000, 1)
    got = []
    for turn in range(5):
        peers = [peer for peer in range(size) if peer != rank]
        receiving, _ = transport.exchange(
            [Expected(peer, n) for peer in peers for n in sizes],
            (
                Message(peer, torch.full((n,), 10 * rank + peer + turn, dtype=torch.uint8))
                for peer in peers
                for n in sizes
            ),
        )
        came = [arriving.wait() for arriving in reversed(receiving)][::-1]
        got = [int(data[0]) - turn for data in came]
        assert [data.numel() for data in came] == [*sizes] * len(peers)
        assert all(bool((data == data[0]).all()) for data in came)
        for arriving in receiving:
            arriving.release()
    return [got[i : i + 3] for i in range(0, len(got), 3)]


def test_messages_of_a_link_come_in_order_whatever_the_order_of_waiting() -> None:
    for rank, got in enumerate(run_on_ranks(WORLD, exchange_many)):
        assert got == [[10 * peer + rank] * 3 for peer in range(WORLD) if peer != rank]


def write_after_sending(rank: int, size: int) -> list[int]:
    transport, peer = connect(rank, size), rank ^ 1
    mine = transport.take(2)
    mine.copy_(message(rank, 1))
    (arriving,), _ = transport.exchange([Expected(peer, 2)], [Message(peer, mine)])
    before = arriving.wait().tolist()
    dist.barrier()
    mine[1] = 7  # against the rules: to show that nothing was copied
    dist.barrier()
    return before + arriving.wait().tolist()


def test_a_message_in_memory_of_the_transport_is_read_where_it_was_written() -> None:
    assert run_on_ranks(WORLD, write_after_sending)[2] == [3, 1, 3, 7]


def flood(rank: int, size: int) -> int:
    """More notes than fit in a socket, both ways at once."""
    transport, peer, count = connect(rank, size), rank ^ 1, 2000
    receiving, _ = transport.exchange(
        [Expected(peer, 1)] * count, (Message(peer, message(i % 251)) for i in range(count))
    )
    return sum(int(arriving.wait()) == i % 251 for i, arriving in enumerate(receiving))


def test_many_messages_at_once_block_nobody() -> None:
    assert run_on_ranks(2, flood) == [2000] * 2


def wait_for_nothing(rank: int, size: int) -> str:
    transport = connect(rank, size, timeout=0.3)
    (arriving,), _ = transport.exchange([Expected(rank ^ 1, 1)], ())
    with pytest.raises(RuntimeError) as failure:
        arriving.wait()
    dist.barrier()
    return str(failure.value)


def test_a_silent_rank_is_an_error_after_the_timeout() -> None:
    assert run_on_ranks(WORLD, wait_for_nothing)[2] == "rank 2: nothing came from rank 3 (time limit 0.3 s)"


RANK = """
import sys, torch
import torch.distributed as dist
from sp_backend.transport import Expected, Message
from sp_backend.transport.gloo import GlooTransport
from sp_backend.transport.shared_memory import shared_memory
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
transport = shared_memory(GlooTransport.create(2, 2, rank, 30), 30)
(arriving,), _ = transport.exchange([Expected(1 - rank, 1 << 20)], [Message(1 - rank, transport.take(1 << 20))])
arriving.wait()
print("connected", flush=True)
(arriving,), _ = transport.exchange([Expected(1 - rank, 1)], ())
arriving.wait()
"""


def test_a_killed_rank_is_noticed_at_once(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "connected\n"
        ranks[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, said = ranks[0].communicate(timeout=20)
        assert "rank 0: rank 1 is gone" in said
        assert time.monotonic() - killed < 15  # of a limit of 30 s
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
