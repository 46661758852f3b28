"""What the executor knows of messages on their way, and views of the blocks that lie in one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sp_backend.layout import KV
from sp_backend.schedule import Envelope, Section
from sp_backend.state import AttentionState
from sp_backend.transport import Receiving, Sending


@dataclass(slots=True)
class Arrival:
    """A message on its way, waited for at the first use of one of its blocks."""

    envelope: Envelope
    receiving: Receiving
    live: int  # blocks that are still to be read
    data: Tensor | None = None


@dataclass(slots=True)
class ArrivingState:
    section: Section
    arrival: Arrival


@dataclass(slots=True)
class Leaving:
    """What a round sends, and what is free once all of it has left: messages read, and buffers."""

    sending: list[Sending] = field(default_factory=list)
    read: list[Receiving] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)


def view_of_rows(message: Tensor, section: Section, head_dim: int, dtype: torch.dtype) -> Tensor:
    """A block's rows in a message [bytes]: Q [rows, heads, head_dim], KV [rows, 2, kv_heads, head_dim]."""
    data = message[section.first : section.last].view(dtype)
    if section.use.block.operand == KV:
        return data.view(section.rows, 2, -1, head_dim)
    return data.view(section.rows, -1, head_dim)


def view_of_state(message: Tensor, section: Section, dtype: torch.dtype) -> AttentionState:
    """A state in a message [bytes]: out in the model's dtype, then lse in fp32."""
    block = section.use.block
    heads = block.heads[1] - block.heads[0]
    middle = section.last - section.rows * heads * 4
    out = message[section.first : middle].view(dtype)
    lse = message[middle : section.last].view(torch.float32)
    return AttentionState(out.view(section.rows, heads, -1), lse.view(section.rows, heads))
