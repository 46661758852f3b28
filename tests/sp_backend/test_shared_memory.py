"""Memory shared by the ranks of a host: read in place, and clear errors when a rank is gone."""

import gc
import os
import resource
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


def come_too_late(rank: int, size: int) -> str:
    """A message that was waited for in vain comes after all."""
    transport = connect(rank, size, timeout=0.3)
    if rank == 0:
        (arriving,), _ = transport.exchange([Expected(1, 1)], ())
        with pytest.raises(RuntimeError):
            arriving.wait()
    dist.barrier()
    if rank == 1:
        transport.exchange((), [Message(0, message(1))])
    dist.barrier()
    if rank == 1:
        return ""
    with pytest.raises(RuntimeError) as failure:
        transport.exchange([Expected(1, 1)], ())
    return str(failure.value)


def test_after_a_timeout_no_old_message_is_taken_for_a_new_one() -> None:
    said = run_on_ranks(2, come_too_late)[0]
    assert said.startswith("rank 0: nothing came from rank 1") and "connect the ranks anew" in said


def expect_more(rank: int, size: int) -> str:
    transport, peer = connect(rank, size), rank ^ 1
    (arriving,), _ = transport.exchange([Expected(peer, 3)], [Message(peer, message(1, 2))])
    with pytest.raises(RuntimeError) as failure:
        arriving.wait()
    dist.barrier()
    return str(failure.value)


def test_a_message_of_another_size_is_an_error_that_names_both() -> None:
    assert run_on_ranks(2, expect_more)[0] == "rank 0: rank 1 sent 2 bytes, not 3: give all ranks equal arguments"


def leave_after_sending(rank: int, size: int) -> list[int]:
    """Rank 1 is through with its part when rank 0 tells it what was read, and has not looked for the rest."""
    transport, got = connect(rank, size), []
    if rank == 1:
        transport.exchange((), [Message(0, message(5))])
        dist.barrier()
        transport.exchange((), [Message(0, message(6))])
        del transport
        gc.collect()
        dist.barrier()
        return []
    (first, second), _ = transport.exchange([Expected(1, 1)] * 2, ())
    got += first.wait().tolist()
    dist.barrier()
    dist.barrier()
    first.release()
    return got + second.wait().tolist()


def test_what_a_rank_sent_before_it_left_is_read() -> None:
    assert run_on_ranks(2, leave_after_sending)[0] == [5, 6]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def hold_messages(rank: int, size: int) -> tuple[int, int]:
    """Files that are open more while eight messages each way are held, and when the transport is gone."""
    transport, peer, count = connect(rank, size), rank ^ 1, 8
    dist.barrier()
    gc.collect()
    before = open_files()
    receiving, _ = transport.exchange([Expected(peer, 1)] * count, [Message(peer, message(1))] * count)
    for arriving in receiving:
        arriving.wait()
    held = open_files() - before
    del transport, receiving, arriving
    gc.collect()
    return held, open_files() - before


def test_a_segment_takes_two_files_where_it_was_made_and_one_where_it_is_read() -> None:
    socket = 1
    assert run_on_ranks(2, hold_messages) == [(8 * (2 + 1), -socket)] * 2


def receive_with_no_file_left(rank: int, size: int) -> str:
    transport = connect(rank, size)
    if rank == 1:
        transport.exchange((), [Message(0, message(1))])
    dist.barrier()
    if rank == 1:
        return ""
    (arriving,), _ = transport.exchange([Expected(1, 1)], ())
    few, many = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, many))
    try:
        with pytest.raises(RuntimeError) as failure:
            arriving.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, many))
    return str(failure.value)


def test_too_many_open_files_are_named_with_what_to_do() -> None:
    assert run_on_ranks(2, receive_with_no_file_left)[0] == (
        "rank 0: too many open files to read what rank 1 sends: raise `ulimit -n`"
    )


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
