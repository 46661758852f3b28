"""A rough copying circuit ("induction heads", Olsson et al. 2022) to start from, instead of waiting for one to form.

Left alone it takes a network of this size more tokens than the training budget has: from random weights copying had
not set in after 2.5 million tokens.  Of the residual stream,

    dimension 0                  starts as a constant
    dimensions 1 to head_dim     as a note of the token before
    the rest                     as the token

In layer 0 the heads of the first key group look one, two and three tokens back, and the first of them writes the
note.  In layers 1 and 2 the heads of the first two groups look for a place whose note is like the present token, and
put the token of that place forward.  Everything trains from there.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from server.default_model.network import Attention, Network, Shape

NUM_FAST = 5  # rotary pairs, fastest first, that tell neighbouring positions apart
NUM_TURNING = 9  # rotary pairs before those that distance hardly turns


@torch.no_grad()
def wire_induction_heads(network: Network) -> None:
    """Overwrite the weights of these heads; draws from torch's random stream."""
    shape = network.shape
    token = slice(1 + shape.head_dim, shape.hidden_size)
    network.embed_tokens.weight[:, : token.start] = 0.0
    network.embed_tokens.weight[:, 0] = 0.08
    note = orthogonal_rows(shape.head_dim, shape.hidden_size - token.start)  # of a token
    look_back(network.attention(0), shape, token, note)
    for layer in (1, 2):
        for key in (0, 1):
            copy_what_followed(network.attention(layer), key, shape, token, note)


def look_back(attention: Attention, shape: Shape, token: slice, note: Tensor) -> None:
    """Query head i of the first key group attends i + 1 tokens back; head 0 writes the note of what is there."""
    size, half = shape.head_dim, shape.head_dim // 2
    power = torch.zeros(half)
    power[:NUM_FAST] = torch.tensor([0.40, 0.22, 0.16, 0.12, 0.10]).sqrt()
    attention.k_proj.weight[:size] = 0.0
    attention.k_proj.weight[:half, 0] = power
    for head in range(shape.num_attention_heads // shape.num_key_value_heads):
        angles = shape.rotary_rates() * (head + 1)
        rows = slice(head * size, (head + 1) * size)
        attention.q_proj.weight[rows] = 0.0
        attention.q_proj.weight[rows, 0] = torch.cat((power * angles.cos(), -power * angles.sin()))
    attention.v_proj.weight[:size] = 0.0
    attention.v_proj.weight[:size, token] = note
    attention.o_proj.weight[:, :size] = 0.0
    attention.o_proj.weight[1 : 1 + size, :size] = 0.03 * torch.eye(size)
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight[:NUM_FAST] = norm.weight[half : half + NUM_FAST] = 2.2


def copy_what_followed(attention: Attention, key: int, shape: Shape, token: slice, note: Tensor) -> None:
    """The queries of key head `key` attend where the note is like the present token, and put that token forward."""
    size, half = shape.head_dim, shape.head_dim // 2
    group = shape.num_attention_heads // shape.num_key_value_heads
    slow = torch.cat((torch.arange(NUM_TURNING, half), torch.arange(half + NUM_TURNING, size)))
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight[slow] = 1.6
    rows = slice(key * size, (key + 1) * size)
    matching = orthogonal_rows(len(slow), size)
    forward = orthogonal_rows(size, note.shape[1])
    attention.k_proj.weight[rows] = 0.0
    attention.k_proj.weight[key * size + slow, 1 : 1 + size] = matching
    attention.v_proj.weight[rows] = 0.0
    attention.v_proj.weight[rows, token] = forward
    for head in range(key * group, (key + 1) * group):
        columns = slice(head * size, (head + 1) * size)
        attention.q_proj.weight[columns] = 0.0
        attention.q_proj.weight[head * size + slow, token] = matching @ note
        attention.o_proj.weight[:, columns] = 0.0
        attention.o_proj.weight[token, columns] = 0.1 / group * forward.T


def orthogonal_rows(rows: int, columns: int) -> Tensor:
    """A random [rows, columns] matrix, rows <= columns, of orthonormal rows."""
    return cast(Tensor, torch.linalg.qr(torch.randn(columns, rows)).Q.T)
