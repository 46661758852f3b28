"""Sampling: transformers' definitions of the filters and penalties, and draws that depend on nothing else."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sp_backend.commands import Sampling
from sp_backend.sampling import sample

torch.set_num_threads(1)

VOCAB = 50


def logits_of(seed: int, rows: int = 1, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def ids(*tokens: int) -> bytes:
    return struct.pack(f"<{len(tokens)}i", *tokens)


def draws(logits: torch.Tensor, sampling: Sampling, count: int) -> list[int]:
    """Tokens at positions 0, 1, ... of one distribution [vocab]."""
    rows = logits.expand(count, -1)
    return [drawn.token for drawn in sample(rows, [sampling] * count, list(range(count)))]


def one(logits: torch.Tensor, position: int = 0, **fields: object) -> int:
    return sample(logits, [Sampling(**fields)], [position])[0].token


def test_temperature_zero_is_argmax_whatever_else_is_set():
    logits = logits_of(0, rows=20)
    greedy = [Sampling(temperature=0, top_p=0.1, min_p=0.5, seed=row) for row in range(20)]
    assert [drawn.token for drawn in sample(logits, greedy, range(20))] == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "fields", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-9}]
)
def test_limits_of_every_filter_are_argmax(fields):
    for seed in range(20):
        logits = logits_of(seed)
        assert one(logits, seed=seed, **fields) == int(logits.argmax())


def test_frequencies_follow_the_distribution():
    """Chi-square of 20,000 draws at fixed seeds; 49 degrees of freedom exceed 85 once in 1000."""
    logits, count = logits_of(3)[0], 20_000
    for sampling in (Sampling(seed=7), Sampling(seed=8, temperature=0.7)):
        expected = (logits / sampling.temperature).softmax(-1).double() * count
        seen = torch.bincount(torch.tensor(draws(logits, sampling, count)), minlength=VOCAB)
        common = expected > 5
        chi_square = ((seen - expected).square() / expected)[common].sum()
        assert int(common.sum()) > 20 and chi_square < 85


def test_seeds_are_independent_too():
    logits, count = logits_of(3)[0], 5_000
    tokens = [one(logits[None], position=11, seed=seed) for seed in range(count)]
    expected = logits.softmax(-1) * count
    seen = torch.bincount(torch.tensor(tokens), minlength=VOCAB)
    common = expected > 5
    assert ((seen - expected).square() / expected)[common].sum() < 85


def theirs(logits: torch.Tensor, sampling: Sampling) -> set[int]:
    """The tokens that transformers' chain of filters leaves."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k > 0:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p > 0:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    return set(scores[0].isfinite().nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=5),
        Sampling(top_p=0.6),
        Sampling(min_p=0.1),
        Sampling(top_k=1000, top_p=0.999),
        Sampling(temperature=0.5, top_k=12, top_p=0.9),
        Sampling(temperature=1.7, top_k=20, top_p=0.8, min_p=0.15),
    ],
)
def test_filters_keep_what_transformers_keeps(sampling):
    for seed in range(5):
        logits = logits_of(seed, spread=1.0)
        assert set(draws(logits[0], sampling, 3_000)) == theirs(logits, sampling)


def test_the_filtered_distribution_is_renormalised():
    logits, count = logits_of(4)[0], 10_000
    best = logits.topk(3).indices
    expected = logits[best].softmax(-1) * count
    seen = torch.bincount(torch.tensor(draws(logits, Sampling(top_k=3), count)), minlength=VOCAB)
    assert int(seen.sum()) == int(seen[best].sum())
    assert ((seen[best] - expected).square() / expected).sum() < 14  # 2 degrees of freedom: once in 1000


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.floats(0.01, 1),
    top_k=st.sampled_from([-1, 1, 7, 1000]),
    min_p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**64 - 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.5, 2),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100)),
    banned=st.lists(st.integers(0, VOCAB - 1), max_size=VOCAB - 1),
    logprobs=st.none() | st.integers(0, 20),
    context=st.lists(st.integers(0, VOCAB - 1)).map(lambda tokens: ids(*tokens)),
    num_prompt=st.integers(0, 5),
)
cases = st.lists(st.tuples(samplings, st.integers(0, 2**20), st.integers(0, 1000)), min_size=1, max_size=4)


@given(cases)
@settings(max_examples=150, deadline=None)
def test_a_row_depends_on_itself_alone(rows):
    """Any batch, any order, any neighbour: the same token; never a banned one; the logits are left as they were."""
    logits = torch.cat([logits_of(seed) for _, _, seed in rows])
    before = logits.clone()
    drawn = sample(logits, [sampling for sampling, _, _ in rows], [position for _, position, _ in rows])
    assert torch.equal(logits, before)
    for (sampling, position, seed), result in zip(rows, drawn, strict=True):
        assert sample(logits_of(seed), [sampling], [position]) == [result]
        assert result.token not in sampling.banned


@given(samplings, st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_logprobs_are_of_the_unmodified_distribution(sampling, seed):
    logits = logits_of(seed)
    drawn = sample(logits, [sampling], [0])[0]
    if sampling.logprobs is None:
        assert drawn.logprob is None and drawn.top == []
        return
    expected = logits[0].double().softmax(-1).log()
    assert drawn.logprob == pytest.approx(float(expected[drawn.token]), abs=1e-5)
    values, order = expected.topk(sampling.logprobs)
    assert [entry.token for entry in drawn.top] == order.tolist()
    assert [entry.logprob for entry in drawn.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_more_logprobs_than_tokens():
    assert len(sample(logits_of(0), [Sampling(logprobs=1000)], [0])[0].top) == VOCAB


def test_positions_and_seeds_change_the_draw():
    logits = torch.zeros(1, 50)
    assert len({one(logits, position=position) for position in range(100)}) > 30
    assert len({one(logits, seed=seed) for seed in range(100)}) > 30


def penalised(context: bytes, num_prompt: int, **fields: float) -> int:
    """The greedy token of logits 5, 4.9, 4.8, ... for tokens 0, 1, 2, ..."""
    logits = 5 - 0.1 * torch.arange(VOCAB)[None]
    return one(logits, temperature=0, context=context, num_prompt=num_prompt, **fields)


def test_presence_penalty_counts_output_tokens_once():
    assert penalised(ids(0, 1, 2), num_prompt=3, presence_penalty=2.0) == 0  # prompt only
    assert penalised(ids(9, 0, 1), num_prompt=1, presence_penalty=2.0) == 2
    assert penalised(ids(9, 0, 0, 0, 0), num_prompt=1, presence_penalty=0.05) == 0


def test_frequency_penalty_counts_every_output_token():
    assert penalised(ids(0, 0, 0, 9), num_prompt=3, frequency_penalty=2.0) == 0  # prompt only
    assert penalised(ids(9, 0, 0, 0, 0), num_prompt=1, frequency_penalty=0.05) == 1
    assert penalised(ids(9, 0, 0, 0, 0, 1, 1), num_prompt=1, frequency_penalty=0.06) == 2
    assert penalised(ids(9, 4, 4), num_prompt=1, frequency_penalty=-0.3) == 4


def test_repetition_penalty_counts_prompt_and_output_as_transformers_does():
    logits, context = logits_of(5), [3, 3, 7, 20, 41, 8]
    scores = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([context]), logits)[0]
    sampling = Sampling(repetition_penalty=1.8, context=ids(*context), num_prompt=4, seed=1)
    count = 20_000
    expected = scores.softmax(-1) * count
    seen = torch.bincount(torch.tensor(draws(logits[0], sampling, count)), minlength=VOCAB)
    common = expected > 5
    assert ((seen - expected).square() / expected)[common].sum() < 85


def test_logit_bias_and_bans():
    logits = 5 - 0.1 * torch.arange(VOCAB)[None]
    assert one(logits, temperature=0, logit_bias={30: 100.0}) == 30
    assert one(logits, temperature=0, logit_bias={0: -100.0, 1: -0.05}) == 1
    assert one(logits, temperature=0, logit_bias={0: -100.0, 1: -0.15}) == 2
    assert one(logits, temperature=0, banned=[0, 1, 2]) == 3
    assert one(logits, temperature=0, logit_bias={0: 100.0}, banned=[0]) == 1
    all_but_one = [token for token in range(VOCAB) if token != 44]
    assert {one(logits, position=p, banned=all_but_one) for p in range(20)} == {44}


def test_extreme_logits_stay_numbers():
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 1e35
    drawn = sample(logits, [Sampling(temperature=1e-9, top_p=0.5, logprobs=2)], [0])[0]
    assert drawn.token == 3 and drawn.logprob == 0
    assert math.isfinite(drawn.top[1].logprob) or drawn.top[1].logprob == -math.inf


def test_mixed_batches():
    logits = logits_of(6, rows=3)
    drawn = sample(logits, [Sampling(temperature=0), Sampling(seed=2), Sampling(temperature=0, logprobs=1)], [5, 6, 7])
    assert drawn[0].token == int(logits[0].argmax()) and drawn[0].logprob is None
    assert drawn[2].token == drawn[2].top[0].token


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1e-46),
        Sampling(temperature=1e-46, top_p=0.5, min_p=0.5, top_k=3),
        Sampling(temperature=100.0, repetition_penalty=0.01, context=b"\x01\x00\x00\x00", num_prompt=1),
        Sampling(temperature=1.0, repetition_penalty=1e-40, context=b"\x01\x00\x00\x00", num_prompt=1),
        Sampling(temperature=1.0, banned=list(range(50))),
        Sampling(temperature=1.0, top_p=1e-9, logit_bias={3: -100.0}),
    ],
)
@pytest.mark.parametrize("logits", [torch.linspace(-5, 5, 50), torch.full((50,), torch.nan), torch.full((50,), 1e38)])
def test_no_request_and_no_overflow_gives_an_id_outside_the_vocabulary(
    sampling: Sampling, logits: torch.Tensor
) -> None:
    (drawn,) = sample(logits[None].clone(), [sampling], [7])
    assert 0 <= drawn.token < 50


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9), Sampling(temperature=0.0)])
@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_wins_and_harms_no_other_row(sampling: Sampling, score: float) -> None:
    logits = logits_of(8, rows=20)
    sound = [drawn.token for drawn in sample(logits, [sampling] * 20, range(20))]
    logits[4, 30] = score
    drawn = [drawn.token for drawn in sample(logits, [sampling] * 20, range(20))]
    assert drawn == [*sound[:4], 30, *sound[5:]]
