"""All ranks tell each other something, over any transport: to set up and to compare, not for attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sp_backend.transport import Expected, Message, Transport


def all_gather(transport: Transport, parts: Sequence[Tensor]) -> None:
    """Fill in the other ranks' parts from theirs. Flat uint8, one a rank; sizes are known to all, and may be 0."""
    mine = parts[transport.rank]
    peers = [peer for peer in range(transport.size) if peer != transport.rank]
    senders = [peer for peer in peers if parts[peer].numel()]
    receiving, sending = transport.exchange(
        [Expected(peer, parts[peer].numel()) for peer in senders],
        [Message(peer, mine) for peer in peers if mine.numel()],
    )
    for peer, arriving in zip(senders, receiving, strict=True):
        parts[peer].copy_(arriving.wait())
        arriving.release()
    for leaving in sending:
        leaving.wait()


def gather_bytes(transport: Transport, data: bytes) -> list[bytes]:
    """Every rank's bytes, of any number, on every rank."""
    sizes = torch.zeros(transport.size, dtype=torch.int64)
    sizes[transport.rank] = len(data)
    all_gather(transport, list(sizes.view(torch.uint8).view(transport.size, -1)))
    parts = [torch.empty(int(size), dtype=torch.uint8) for size in sizes]
    if data:
        parts[transport.rank] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    all_gather(transport, parts)
    return [part.numpy().tobytes() for part in parts]
