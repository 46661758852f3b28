"""From chunks to commands: every SP rank learns who owns new pages, and gets its own pages and tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq

import msgspec

from scheduler.placement import Placement
from scheduler.sequence import UNDRAWN, Chunk, Sequence
from sp_backend.commands import Group, Sampling, SequenceStep, Step

TOKEN_BYTES = 4


def steps_of(step_id: int, chunks: Seq[Chunk], released: list[int], placement: Placement) -> list[Step]:
    """One command for each SP rank. Marks the chunks' pages as known to the workers."""
    groups: dict[str, list[list[SequenceStep]]] = {}  # plan -> rank -> sequences
    for chunk in chunks:
        assert chunk.plan is not None, "every plan is chosen by now"
        by_rank = groups.setdefault(chunk.plan, [[] for _ in range(placement.num_ranks)])
        for rank, part in enumerate(_parts(chunk, placement)):
            by_rank[rank].append(part)
        chunk.sequence.num_sent = len(chunk.sequence.pages)
    moved = [chunk.sequence.id for chunk in chunks if _moves(chunk, placement)]
    return [
        Step(step_id, [Group(plan, by_rank[rank]) for plan, by_rank in groups.items()], released, moved)
        for rank in range(placement.num_ranks)
    ]


def _parts(chunk: Chunk, placement: Placement) -> list[SequenceStep]:
    """A chunk as each SP rank sees it."""
    sequence, num_ranks = chunk.sequence, placement.num_ranks
    owners = bytes(sequence.owners[sequence.num_sent :])
    pages = _pages_by_rank(sequence, num_ranks) if owners else [b""] * num_ranks
    tokens = _tokens_by_rank(chunk, placement)
    last_page = (chunk.start + chunk.num_new - 1) // placement.page_size
    pooling = sequence.request.pooling
    sampling = sampling_of(sequence) if chunk.samples and pooling is None else None
    if pooling == "last" and not chunk.samples:
        pooling = None
    drawn_on = range(num_ranks) if placement.heads else (sequence.owners[last_page],)
    return [
        SequenceStep(
            sequence.id,
            chunk.start,
            chunk.num_new,
            chunk.home.start,
            len(chunk.home),
            owners,
            pages[rank],
            tokens[rank],
            sampling if rank in drawn_on else None,
            pooling,
        )
        for rank in range(num_ranks)
    ]


def _moves(chunk: Chunk, placement: Placement) -> bool:
    """Whether its token is being drawn on another rank than the one that computes it."""
    sequence, at = chunk.sequence, chunk.start
    if placement.heads or sequence.tokens[at] != UNDRAWN:
        return False
    return sequence.owners[(at - 1) // placement.page_size] != sequence.owners[at // placement.page_size]


def _pages_by_rank(sequence: Sequence, num_ranks: int) -> list[bytes]:
    pages = [array("i") for _ in range(num_ranks)]
    for rank, page in zip(sequence.owners[sequence.num_sent :], sequence.pages[sequence.num_sent :], strict=True):
        pages[rank].append(page)
    return [own.tobytes() for own in pages]


def _tokens_by_rank(chunk: Chunk, placement: Placement) -> list[bytes]:
    """Each rank's new tokens: those of the pages it owns; in layout heads every rank computes all."""
    sequence = chunk.sequence
    tokens = sequence.tokens[chunk.start : chunk.start + chunk.num_new].tobytes()
    if placement.heads:
        return [tokens] * placement.num_ranks
    if len(chunk.home) == 1:
        return [tokens if rank in chunk.home else b"" for rank in range(placement.num_ranks)]
    size = placement.page_size * TOKEN_BYTES
    first = chunk.start // placement.page_size
    parts: list[list[bytes]] = [[] for _ in range(placement.num_ranks)]
    for number, begin in enumerate(range(0, len(tokens), size), first):
        parts[sequence.owners[number]].append(tokens[begin : begin + size])
    return [b"".join(own) for own in parts]


def sampling_of(sequence: Sequence) -> Sampling:
    """The request's sampling, with what depends on its tokens so far: banned stop tokens and context."""
    request = sequence.request
    sampling = request.sampling
    if sequence.num_generated < request.min_tokens and request.stop_token_ids:
        banned = sorted(request.stop_token_ids.union(sampling.banned))
        sampling = msgspec.structs.replace(sampling, banned=banned)
    if sampling.penalizes:
        sampling = msgspec.structs.replace(sampling, context=sequence.tokens.tobytes(), num_prompt=sequence.num_prompt)
    elif sampling.grammar is not None:  # a long prompt would be sent with every token
        sampling = msgspec.structs.replace(sampling, context=sequence.tokens[sequence.num_prompt :].tobytes())
    return sampling
