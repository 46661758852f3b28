"""Logits to tokens.

A draw depends on the seed, the token's position and the distribution alone: one number in [0, 1), hashed from
seed and position, is looked up in the cumulative distribution in vocabulary order. So the same request gives
the same tokens in any batch, on any rank and after any retraction, up to rounding of its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from sp_backend.commands import Sampling, TokenLogprob

ALIKE_ROWS = 16  # drawn together: probabilities of a large vocabulary take 1.2 MB a row in fp64
LEAST_TEMPERATURE = 1e-5  # below it is greedy: scores divided by it would leave the range of fp32


class Sample(NamedTuple):
    token: int
    logprob: float | None  # of the unmodified distribution; None unless asked for
    top: list[TokenLogprob]  # the most likely tokens, as many as asked for


@torch.inference_mode()
def sample(
    logits: Tensor,
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    allowed: Sequence[Tensor | None] | None = None,
) -> list[Sample]:
    """One token per row of logits [rows, vocab] in fp32; positions are those of the tokens to be drawn.

    allowed: for each row bool [vocab], what its grammar permits, or None.
    """
    tokens = _most_likely(logits)
    masks = [None] * len(tokens) if allowed is None else allowed
    alike = [i for i, (s, mask) in enumerate(zip(samplings, masks, strict=True)) if mask is None and _is_plain(s)]
    for block in (alike[i : i + ALIKE_ROWS] for i in range(0, len(alike), ALIKE_ROWS)):
        drawn = _draw_alike(logits[block], [samplings[i] for i in block], [positions[i] for i in block])
        for i, token in zip(block, drawn, strict=True):
            tokens[i] = tokens[i] if token is None else token
    for i in set(range(len(tokens))).difference(alike):
        tokens[i] = _sample_row(logits, i, tokens[i], samplings[i], positions[i], masks[i])
    return [
        Sample(token, None, []) if sampling.logprobs is None else _with_logprobs(logits[i], token, sampling.logprobs)
        for i, (token, sampling) in enumerate(zip(tokens, samplings, strict=True))
    ]


@torch.inference_mode()
def score(logits: Tensor, targets: Tensor, num_top: int) -> tuple[list[float], list[list[TokenLogprob]]]:
    """For each row the target's log-probability and the most likely tokens. logits [rows, vocab], targets [rows]."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(num_top, logits.shape[-1]))
    tops = [
        [TokenLogprob(*pair) for pair in zip(*row, strict=True)]
        for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return logprobs.gather(-1, targets[:, None])[:, 0].tolist(), tops


def _most_likely(logits: Tensor) -> list[int]:
    """Of each row the first of its highest scores; NaN counts as the highest. [rows, vocab]"""
    best = logits.numpy().argmax(-1) if logits.is_cpu else logits.argmax(-1)  # torch's takes ten times as long there
    tokens: list[int] = best.tolist()
    return tokens


def _is_plain(sampling: Sampling) -> bool:
    """Whether its temperature alone decides, and it is not greedy."""
    filters = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    return sampling.temperature >= LEAST_TEMPERATURE and not filters and not _is_adjusted(sampling, None)


def _draw_alike(logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[int | None]:
    """A token for each row [rows, vocab] whose sampling is plain; None: nothing to draw from."""
    highest = logits.amax(-1, keepdim=True)
    temperatures = torch.tensor([s.temperature for s in samplings], device=logits.device)
    probabilities = ((logits - highest) / temperatures[:, None]).softmax(-1)
    numbers = [_number(s.seed, position) for s, position in zip(samplings, positions, strict=True)]
    drawable = highest[:, 0].isfinite().tolist()
    return [token if ok else None for token, ok in zip(_draw(probabilities, numbers), drawable, strict=True)]


def _sample_row(
    logits: Tensor, i: int, most_likely: int, sampling: Sampling, position: int, allowed: Tensor | None
) -> int:
    if sampling.temperature < LEAST_TEMPERATURE and not _is_adjusted(sampling, allowed):
        return most_likely
    wanted = _adjust(logits[i], sampling, allowed)
    # NaN or infinite logits leave nothing to draw from; argmax still gives a token of the vocabulary
    if sampling.temperature >= LEAST_TEMPERATURE and bool(wanted.max().isfinite()):
        return _draw(_probabilities(wanted, sampling)[None], [_number(sampling.seed, position)])[0]
    return _most_likely(wanted[None])[0]


def _is_adjusted(sampling: Sampling, allowed: Tensor | None) -> bool:
    return bool(sampling.context or sampling.logit_bias or sampling.banned) or allowed is not None


def _adjust(logits: Tensor, sampling: Sampling, allowed: Tensor | None) -> Tensor:
    """Penalties, then biases, then bans, on a copy; the same tensor if there are none. logits: [vocab]."""
    if not _is_adjusted(sampling, allowed):
        return logits
    logits = logits.clone()
    if sampling.context and sampling.penalizes:
        context = torch.frombuffer(bytearray(sampling.context), dtype=torch.int32)
        seen = torch.bincount(context, minlength=len(logits)).to(logits.device) > 0
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        counts = torch.bincount(context[sampling.num_prompt :], minlength=len(logits)).to(logits.device)
        logits -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
    if sampling.logit_bias:
        biased = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits[biased] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
    if sampling.banned:
        logits[torch.tensor(sampling.banned, device=logits.device)] = -torch.inf
    return logits if allowed is None else _masked(logits, allowed.to(logits.device))


def _masked(logits: Tensor, allowed: Tensor) -> Tensor:
    """A complete text may be followed by nothing but the stop tokens that min_tokens bans: the grammar wins."""
    masked = logits.masked_fill(~allowed, -torch.inf)
    return masked if bool(masked.max() > -torch.inf) else torch.where(allowed, 0.0, -torch.inf)


def _probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, top_k, top_p, min_p, in this order; equals at a threshold all stay. [vocab] to [vocab]."""
    scores = (logits - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -torch.inf)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        # rarer tokens have less mass than 1 - top_p between them: they are never kept, and need no sorting
        candidates = probabilities[probabilities >= (1 - sampling.top_p) / len(probabilities)]
        ranked = candidates.sort(descending=True).values
        mass_before = ranked.cumsum(-1) - ranked
        num_kept = int((mass_before < sampling.top_p).sum().clamp(min=1))
        probabilities = probabilities.masked_fill(probabilities < ranked[num_kept - 1], 0)
    if sampling.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities.max(), 0)
    return probabilities


def _draw(probabilities: Tensor, numbers: Sequence[float]) -> list[int]:
    """The token of each row [rows, vocab] at a number in [0, 1)."""
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    at = torch.tensor(numbers, dtype=torch.float64, device=probabilities.device)[:, None] * cumulative[:, -1:]
    tokens: list[int] = torch.searchsorted(cumulative, at, right=True)[:, 0].tolist()
    return tokens


def _number(seed: int, position: int) -> float:
    """In [0, 1). It has 32 bits, so that its product with a total stays below the total."""
    key = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    return int.from_bytes(blake2b(key, digest_size=4).digest(), "little") / 2**32


def _with_logprobs(logits: Tensor, token: int, num_top: int) -> Sample:
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(num_top, len(logprobs)))
    top = [TokenLogprob(*pair) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return Sample(token, float(logprobs[token]), top)
