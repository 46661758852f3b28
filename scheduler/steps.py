"""From chunks to commands: every SP rank that takes part learns who owns new pages, and gets its own pages and tokens.

A rank that has nothing to do in a step hears nothing of it: a short prompt on one rank wakes no other.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import msgspec

from scheduler.placement import Placement
from scheduler.sequence import UNDRAWN, Chunk, Sequence
from sp_backend.commands import LOCAL, TOKEN_BYTES, Group, Sampling, Scoring, SequenceStep, Step


class StepWriter:
    """Remembers which pages of which sequences each SP rank knows of."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._ranks = range(placement.num_ranks)
        self._known: list[dict[int, int]] = [{} for _ in self._ranks]  # [rank]: sequence id -> number of pages
        self._released: list[list[int]] = [[] for _ in self._ranks]  # [rank]: sequences that it has not forgotten yet

    def write(self, step_id: int, chunks: Seq[Chunk], ended: Iterable[int]) -> list[Step | None]:
        """One command for each SP rank; None: it has nothing to do. ended: sequences whose pages went back."""
        self._release(ended)
        groups: list[dict[str, list[SequenceStep]]] = [{} for _ in self._ranks]  # [rank]: plan -> sequences
        for chunk in chunks:
            assert chunk.plan is not None, "every plan is chosen by now"
            for rank, part in self._parts(chunk):
                groups[rank].setdefault(chunk.plan, []).append(part)
        moved = [chunk.sequence.id for chunk in chunks if _moves(chunk, self._placement)]
        return [self._step(step_id, rank, groups[rank], moved) for rank in self._ranks]

    def _release(self, ended: Iterable[int]) -> None:
        for sequence_id in ended:
            for known, released in zip(self._known, self._released, strict=True):
                if known.pop(sequence_id, None) is not None:
                    released.append(sequence_id)

    def _step(self, step_id: int, rank: int, groups: dict[str, list[SequenceStep]], moved: list[int]) -> Step | None:
        if not groups and not moved:  # all ranks tell each other what moves
            return None
        released, self._released[rank] = self._released[rank], []
        return Step(step_id, [Group(plan, parts) for plan, parts in groups.items()], released, moved)

    def _parts(self, chunk: Chunk) -> Iterable[tuple[int, SequenceStep]]:
        """A chunk as each SP rank sees it that takes part: under any plan but LOCAL all do, with tokens or without."""
        sequence, placement = chunk.sequence, self._placement
        pooling = sequence.request.pooling
        sampling = sampling_of(sequence) if chunk.samples and pooling is None else None
        if pooling == "last" and not chunk.samples:
            pooling = None
        if chunk.plan == LOCAL:
            tokens = {chunk.home.start: _tokens(chunk)}
            drawn_on: Seq[int] = chunk.home
        else:
            tokens = dict(enumerate(_by_rank(_tokens(chunk), chunk, placement)))
            last_page = (chunk.end - 1) // placement.page_size
            drawn_on = self._ranks if placement.heads else (sequence.owners[last_page],)
        scoring = self._scoring(chunk)
        for rank, own in tokens.items():
            owners, pages = self._new_pages(sequence, rank)
            sampled = sampling if rank in drawn_on else None
            yield (
                rank,
                SequenceStep(
                    sequence.id,
                    chunk.start,
                    chunk.num_new,
                    chunk.home.start,
                    len(chunk.home),
                    owners,
                    pages,
                    own,
                    sampled,
                    pooling,
                    scoring[rank],
                ),
            )

    def _scoring(self, chunk: Chunk) -> Seq[Scoring | None]:
        """For each rank; until the prompt's scores are told, with its first token."""
        num_top = chunk.sequence.request.prompt_logprobs
        if num_top is None or chunk.sequence.num_generated:
            return [None] * len(self._ranks)
        return [Scoring(own, num_top) for own in _by_rank(_following(chunk), chunk, self._placement)]

    def _new_pages(self, sequence: Sequence, rank: int) -> tuple[bytes, bytes]:
        """Owners of the pages that a rank does not know of yet, and the indices of those that are its own."""
        known, num_pages = self._known[rank].get(sequence.id, 0), len(sequence.pages)
        if known == num_pages:  # most decode steps
            return b"", b""
        self._known[rank][sequence.id] = num_pages
        owners = sequence.owners[known:]
        own = array("i", (page for owner, page in zip(owners, sequence.pages[known:], strict=True) if owner == rank))
        return bytes(owners), own.tobytes()


def _moves(chunk: Chunk, placement: Placement) -> bool:
    """Whether its token is being drawn on another rank than the one that computes it."""
    sequence, at = chunk.sequence, chunk.start
    if placement.heads or sequence.tokens[at] != UNDRAWN:
        return False
    return sequence.owners[(at - 1) // placement.page_size] != sequence.owners[at // placement.page_size]


def _tokens(chunk: Chunk) -> bytes:
    return chunk.sequence.tokens[chunk.start : chunk.end].tobytes()


def _following(chunk: Chunk) -> bytes:
    """The token after each of the chunk's; the controller drops what stands for the one after the prompt."""
    following = chunk.sequence.tokens[chunk.start + 1 : chunk.end + 1]
    following.extend([0] * (chunk.num_new - len(following)))
    return following.tobytes()


def _by_rank(tokens: bytes, chunk: Chunk, placement: Placement) -> list[bytes]:
    """Each rank's new tokens: those of the pages it owns; in layout heads every rank computes all."""
    if placement.heads:
        return [tokens] * placement.num_ranks
    if len(chunk.home) == 1:
        return [tokens if rank in chunk.home else b"" for rank in range(placement.num_ranks)]
    size = placement.page_size * TOKEN_BYTES
    first = chunk.start // placement.page_size
    parts: list[list[bytes]] = [[] for _ in range(placement.num_ranks)]
    for number, begin in enumerate(range(0, len(tokens), size), first):
        parts[chunk.sequence.owners[number]].append(tokens[begin : begin + size])
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
