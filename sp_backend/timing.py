"""How ranks time what they do, alone or together, and tell each other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from sp_backend.transport import Expected, Message, Receiving, Sending, Transport
from sp_backend.transport.gather import gather_bytes

REPEATS = 5


def shortest(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of a call: whatever else runs on the machine only adds to it. The first is not counted."""
    run()
    times = []
    for _ in range(repeats):
        since = time.perf_counter()
        run()
        times.append(time.perf_counter() - since)
    return min(times)


def shortest_together(transport: Transport, run: Callable[[], object]) -> float:
    """The same of something that all ranks do at once."""
    barrier(transport)
    return shortest(run)


def exchange(
    transport: Transport, sends: dict[int, int], receives: dict[int, int], meanwhile: Callable[[], object] | None = None
) -> None:
    """Messages of so many bytes to and from peers."""
    incoming = [Expected(peer, n) for peer, n in receives.items()]
    outgoing = (Message(peer, transport.take(n).zero_()) for peer, n in sends.items())
    receiving, sending = transport.exchange(incoming, outgoing)
    if meanwhile is not None:
        meanwhile()
    settle(receiving, sending)


def settle(receiving: Sequence[Receiving], sending: Sequence[Sending]) -> None:
    """Wait for messages both ways, and give those that came back unread."""
    for arriving in receiving:
        arriving.wait()
        arriving.release()
    for leaving in sending:
        leaving.wait()


def barrier(transport: Transport) -> None:
    gather_bytes(transport, b"")


def of_all_ranks(transport: Transport, values: Sequence[float]) -> list[list[float]]:
    """Every rank's values. Collective."""
    return [json.loads(part) for part in gather_bytes(transport, json.dumps(list(values)).encode())]
