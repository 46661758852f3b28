"""Sequence-parallel attention in a program of one's own: its process group, its tensors, one function.

The ranks of a group call each function together, with their own shard and otherwise equal arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from sp_backend.config import DTYPES
from sp_backend.counting import Counters
from sp_backend.engine import Problem, agree, engine_of
from sp_backend.layout import Kind
from sp_backend.shards import Shards, cut, from_rows, full_lengths, to_rows, token_counts
from sp_backend.strategies import Options, Variant
from sp_backend.transport import Transport
from sp_backend.transport.gather import all_gather
from sp_backend.transport.gloo import ProcessGroup


class History(NamedTuple):
    """Cached tokens: those that this rank holds, in any order, which need not be where new tokens would lie."""

    k: Tensor  # [cached tokens, kv_heads, head_dim], sequence by sequence
    v: Tensor  # as k
    lengths: Sequence[Sequence[int]]  # [sequence][rank]: on every rank, the cached tokens of all


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: int | Sequence[int],
    group: ProcessGroup | None = None,
    strategy: str = "auto",
    options: Options | None = None,
    layout: Kind = "zigzag",
    input_format: str = "TND",
    num_heads: int | None = None,
    causal: bool = True,
    history: History | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of sequences whose tokens are sharded over the ranks of a group.

    Each rank passes the rows that `shard` gives it and receives their outputs. Queries see all keys of their own
    sequence (`causal`: those up to their position) and all of its history. Inference only: there is no backward.

    q: [tokens, heads, head_dim] on the CPU, float32, bfloat16 or float16; in another `input_format` (see below)
        [B, S, heads, head_dim] and so on. A rank may have no tokens.
    k, v: as q, with kv_heads, which divides heads (GQA, MQA). Each group of heads/kv_heads neighbours shares one.
    lengths: tokens of each sequence over all ranks: any numbers, no padding, also fewer than there are ranks. An int
        stands for one sequence or, with a batch axis, for each sequence of the batch.
    group: a process group of any backend; None: the default one. Connections of its own are made over gloo, with the
        time limit of `init_process_group`.
    strategy, options: what travels between ranks, see docs/library.md. It changes speed, and results only by rounding.
        "auto": what is predicted to be the fastest for these lengths and this history.
    layout: "zigzag" makes causal work even over ranks; "contiguous" gives each rank one run of tokens.
    input_format: "TND", "BSND", "SBND", "BSH" or "SBH", S being this rank's tokens of each sequence.
    num_heads: heads of q; needed for, and only for, the two formats that end in H.
    history: keys and values of these sequences that are cached already, on any ranks; see History.
    scale: of the scores, at least 0; None: head_dim ** -0.5.

    Returns out, in the format and dtype of q, and with `return_lse` also the log-sum-exp of each row's scores: natural
    log, fp32, the shape of q as [.., heads, head_dim] without head_dim.

    Raises ValueError, naming the argument, for whatever does not fit; also if ranks call it with different arguments,
    as long as none of them has been through with the same ones before. RuntimeError: a rank did not answer in time.
    """
    full = full_lengths(lengths, input_format, q)
    q, k, v = _heads_apart(q, k, v, input_format, num_heads)
    query, key, value = (to_rows(x, input_format) for x in (q, k, v))
    _check_tensors(query, key, value)
    if scale is not None and not 0 <= scale < inf:
        raise ValueError(f"scale is {scale}: give a number of at least 0, or None for head_dim ** -0.5")
    engine = engine_of(group)
    problem = Problem(
        strategy=Variant(strategy, options or Options()),
        layout=layout,
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=query.shape[2],
        dtype=query.dtype,
        causal=causal,
        scale=scale,
    )
    history = None if history is None else History(*history)
    held = None if history is None else (history.k, history.v)
    cached = _check_history(history, key, len(full), engine.transport)
    _check_rows(query.shape[0], cut(layout, engine.transport.size, full), engine.transport.rank)
    with torch.no_grad():
        out, lse = engine.prepare(problem, full, cached).run(query, key, value, held)
    result = from_rows(out, input_format, len(full))
    if input_format.endswith("H"):
        result = result.flatten(-2)
    return (result, from_rows(lse, input_format, len(full))) if return_lse else result


def shard(
    x: Tensor,
    lengths: int | Sequence[int],
    *,
    group: ProcessGroup | None = None,
    layout: Kind = "zigzag",
    input_format: str = "TND",
) -> Tensor:
    """This rank's rows of a full tensor, a copy: [tokens, ...], [B, S, ...] or [S, B, ...], of any dtype.

    Rows go sequence by sequence, by position in each. Ids, embeddings and q, k, v are cut alike.
    """
    transport = engine_of(group).transport
    full = full_lengths(lengths, input_format, x)
    rows = to_rows(x, input_format)
    if rows.shape[0] != sum(full):
        raise ValueError(f"x has {rows.shape[0]} tokens in all, but lengths sum to {sum(full)}")
    mine = rows.index_select(0, cut(layout, transport.size, full).tokens(transport.rank))
    return from_rows(mine, input_format, len(full))


def unshard(
    x: Tensor,
    lengths: int | Sequence[int],
    *,
    group: ProcessGroup | None = None,
    layout: Kind = "zigzag",
    input_format: str = "TND",
) -> Tensor:
    """The full tensor, on every rank, from what `shard` or `attention` gave to each."""
    transport = engine_of(group).transport
    full = full_lengths(lengths, input_format, x)
    shards = cut(layout, transport.size, full)
    rows = to_rows(x, input_format).contiguous()
    _check_rows(rows.shape[0], shards, transport.rank)
    agree(transport, {"lengths": full, "layout": layout, "x's dtype": x.dtype, "x's shape": rows.shape[1:]})
    whole = rows.new_empty(sum(full), *rows.shape[1:])
    parts = [rows.new_empty(shards.num_rows(r), *rows.shape[1:]) for r in range(transport.size)]
    parts[transport.rank] = rows
    all_gather(transport, [part.view(-1).view(torch.uint8) for part in parts])
    for rank, part in enumerate(parts):
        whole[shards.tokens(rank)] = part
    return from_rows(whole, input_format, len(full))


def position_ids(
    lengths: int | Sequence[int],
    *,
    start: int | Sequence[int] = 0,
    group: ProcessGroup | None = None,
    layout: Kind = "zigzag",
) -> Tensor:
    """[rows] int64: the position of each of this rank's rows in its sequence, for rotary embeddings.

    start: of each sequence's first token, which is the number of tokens that it has cached. With a batch axis, give
    `lengths` as an int for the positions of one sequence, which are those of all.
    """
    transport = engine_of(group).transport
    full = full_lengths(lengths, "TND")
    starts = token_counts([start] * len(full) if isinstance(start, int) else start, "start")
    if len(starts) != len(full):
        raise ValueError(f"start has {len(starts)} entries for {len(full)} sequences")
    return cut(layout, transport.size, full).positions(transport.rank, starts)


def counters(group: ProcessGroup | None = None) -> Counters:
    """What this rank's calls of `attention` over a group have sent, waited for and computed, in all."""
    return engine_of(group).counters()


def _heads_apart(
    q: Tensor, k: Tensor, v: Tensor, input_format: str, num_heads: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three with axes N and D, and the right number of axes."""
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.ndim != len(input_format):
            raise ValueError(f"{name} of shape {list(x.shape)} does not have the axes of input_format {input_format}")
        if not x.shape[-1]:
            raise ValueError(f"{name} of shape {list(x.shape)} has nothing along its last axis")
    if not input_format.endswith("H"):
        if num_heads is not None:
            raise ValueError(f"num_heads: input_format {input_format} has an axis for heads; leave it out")
        return q, k, v
    if num_heads is None or num_heads < 1 or q.shape[-1] % num_heads:
        raise ValueError(
            f"num_heads is {num_heads}: input_format {input_format} needs the heads of q, a divisor of {q.shape[-1]}"
        )
    head_dim = q.shape[-1] // num_heads
    for name, x in {"k": k, "v": v}.items():
        if x.shape[-1] % head_dim:
            raise ValueError(f"{name}'s last axis is {x.shape[-1]}: it must be a multiple of head_dim {head_dim}")
    q, k, v = (x.reshape(*x.shape[:-1], x.shape[-1] // head_dim, head_dim) for x in (q, k, v))
    return q, k, v


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """All [rows, heads, head_dim]."""
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.device.type != "cpu":
            raise ValueError(f"{name} is on {x.device}: move it to the CPU")
        if x.dtype not in [getattr(torch, dtype) for dtype in DTYPES]:
            raise ValueError(f"{name} is {x.dtype}: convert it to one of {', '.join(DTYPES)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} and q {q.dtype}: give all three in one dtype")
        if x.requires_grad:
            raise ValueError(f"{name} requires a gradient, and there is no backward: pass {name}.detach()")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {list(k.shape)} and v {list(v.shape)}: they must be equal")
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"k has shape {list(k.shape)} and q {list(q.shape)}: tokens and head_dim must be equal")
    if not k.shape[1] or not q.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads: give a divisor of the {q.shape[1]} of q")


def _check_rows(num_rows: int, shards: Shards, rank: int) -> None:
    if num_rows != shards.num_rows(rank):
        raise ValueError(
            f"rank {rank} has {num_rows} tokens in all: lengths {list(shards.lengths)} in layout {shards.layout.kind} "
            f"give it {shards.num_rows(rank)}; cut full tensors with shard()"
        )


def _check_history(
    history: History | None, k: Tensor, num_sequences: int, transport: Transport
) -> tuple[tuple[int, ...], ...]:
    """History's lengths; all 0 without one."""
    if history is None:
        return ((0,) * transport.size,) * num_sequences
    lengths = tuple(token_counts(by_rank, "one of history's lengths") for by_rank in history.lengths)
    if [len(by_rank) for by_rank in lengths] != [transport.size] * num_sequences:
        raise ValueError(f"history's lengths: give {num_sequences} sequences of {transport.size} ranks each")
    shape = (sum(by_rank[transport.rank] for by_rank in lengths), *k.shape[1:])
    for name, x in {"k": history.k, "v": history.v}.items():
        if x.shape != shape or x.dtype != k.dtype or x.device != k.device:
            raise ValueError(
                f"history's {name} is {x.dtype} {list(x.shape)} on {x.device}: by its lengths and k it must be "
                f"{k.dtype} {list(shape)} on {k.device}"
            )
    return lengths
