"""What a step's hidden states are wanted for: tokens drawn from them, embeddings, log-probabilities of prompts.

Ranks that share a vocabulary compute logits together and draw the same: all take part, the first of them answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sp_backend.commands import PooledStates, SampledToken, Scores
from sp_backend.grammars import Grammars
from sp_backend.local_batch import LocalBatch, SampleRow, ScoredRows
from sp_backend.models.decoder import Decoder
from sp_backend.sampling import Sample, sample, score

SCORED_ROWS = 128  # whose logits are in memory at once, [rows, vocab] in fp32


class Answers:
    """One rank's. hidden, below: [n, hidden], as Decoder.forward gives it."""

    def __init__(self, decoder: Decoder, grammars: Grammars) -> None:
        self._decoder, self._grammars = decoder, grammars
        self._is_first = decoder.shard.group_rank == 0
        self._drawn: dict[int, int] = {}

    @property
    def drawn(self) -> Mapping[int, int]:
        """Tokens that this rank drew in the last step that it took part in: request id -> token."""
        return self._drawn

    def forget(self, request_ids: Sequence[int]) -> None:
        """Requests that ended, or that come back later, perhaps on another rank: what it then draws for them counts."""
        self._grammars.forget(request_ids)
        for request_id in request_ids:
            self._drawn.pop(request_id, None)

    def tokens(self, batch: LocalBatch, hidden: Tensor) -> list[SampledToken]:
        samples = self._samples(batch.samples, hidden) if batch.samples else []
        pairs = list(zip(batch.samples, samples, strict=True))
        self._drawn = {row.request_id: drawn.token for row, drawn in pairs}
        if not self._is_first:
            return []
        return [SampledToken(row.request_id, drawn.token, drawn.logprob, drawn.top) for row, drawn in pairs]

    def pooled(self, batch: LocalBatch, hidden: Tensor) -> list[PooledStates]:
        if not self._is_first:
            return []
        return [
            PooledStates(part.request_id, self._decoder.pooled(hidden, part.rows).numpy(force=True).tobytes())
            for part in batch.pooled
        ]

    def scores(self, batch: LocalBatch, hidden: Tensor) -> list[Scores]:
        found = [self._scored(part, batch.positions, hidden) for part in batch.scored]
        return found if self._is_first else []

    def _samples(self, rows: list[SampleRow], hidden: Tensor) -> list[Sample]:
        logits = self._decoder.logits(hidden[[row.row for row in rows]])
        allowed = [self._grammars.allowed(row.request_id, row.sampling) for row in rows]
        return sample(logits, [row.sampling for row in rows], [row.position for row in rows], allowed)

    def _scored(self, part: ScoredRows, positions: Tensor, hidden: Tensor) -> Scores:
        rows = torch.cat([torch.arange(own.start, own.stop, device=hidden.device) for own in part.rows])
        blocks = zip(torch.split(rows, SCORED_ROWS), torch.split(part.targets, SCORED_ROWS), strict=True)
        scored = [score(self._decoder.logits(hidden[block]), targets, part.num_top) for block, targets in blocks]
        return Scores(
            part.request_id,
            (positions[rows] + 1).tolist(),
            [logprob for logprobs, _ in scored for logprob in logprobs],
            [top for _, tops in scored for top in tops],
        )
