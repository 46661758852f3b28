"""Which rows of the last layer are wanted; that they come out right is shown in tests/e2e."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sp_backend.batch import BatchBuilder
from sp_backend.commands import DECODE, LOCAL, Group, Sampling, Scoring, SequenceStep, Step
from sp_backend.last_layer import FEW, as_decode, only_last_is_wanted
from sp_backend.layout import Layout

PAGE = 64


def sequence(num_new: int, start: int = 0, request_id: int = 1, **fields: Any) -> SequenceStep:
    """On rank 0, in pages of its own."""
    num_pages = -(-num_new // PAGE)
    pages = np.arange(num_pages, dtype="<i4") + 100 * request_id
    tokens = np.arange(num_new, dtype="<i4")
    return SequenceStep(request_id, start, num_new, 0, 1, bytes(num_pages), pages.tobytes(), tokens.tobytes(), **fields)


@pytest.mark.parametrize(
    ("sequences", "wanted"),
    [
        ([sequence(FEW + 1)], True),
        ([sequence(FEW)], False),
        ([sequence(1)] * 2 * FEW, False),
        ([sequence(1), sequence(FEW + 1)], True),
        ([sequence(9 * FEW, pooling="last")], True),
        ([sequence(9 * FEW, pooling="mean")], False),
        ([sequence(9 * FEW), sequence(9 * FEW, scoring=Scoring(b"", 0))], False),
    ],
    ids=["prompt", "few tokens", "decode", "decode beside a prompt", "embedding", "mean embedding", "scored"],
)
def test_when_the_last_tokens_are_enough(sequences, wanted):
    assert only_last_is_wanted(Group(LOCAL, sequences)) is wanted


def test_a_spread_prompt_ends_as_a_decode_step_where_its_last_token_lies():
    """Zigzag over two ranks: chunk 3, the last one, is rank 0's."""
    layout = Layout(2, "zigzag", 4, 4)
    spread = [sequence(100, start=64)]
    (here,) = as_decode(Group("ring_pass_kv", spread), [3], layout, {0, 3}).sequences
    there = as_decode(Group("ring_pass_kv", spread), [3], layout, {1, 2})
    assert (here.start, here.num_new, here.home, here.degree) == (163, 1, 0, 1)
    assert np.frombuffer(here.tokens, "<i4").tolist() == [99]
    assert there.plan == DECODE and there.sequences[0].tokens == b""
    assert as_decode(Group(LOCAL, spread), [0], layout, {0}).plan == LOCAL


def test_rows_of_a_step_in_which_one_group_ends_early():
    """Behind the last tokens of two prompts come all rows of a group of few tokens."""
    layout = Layout(1, "home", 4, 4)
    builder = BatchBuilder(
        layouts={LOCAL: layout, DECODE: layout}, sp_rank=0, page_size=PAGE, windowed=False, device=torch.device("cpu")
    )
    prompts = [sequence(100, sampling=Sampling()), sequence(70, request_id=2, sampling=Sampling())]
    few = [sequence(3, request_id=3, sampling=Sampling())]
    batch = builder.build(Step(0, [Group(LOCAL, prompts), Group(DECODE, few)]))
    assert batch.last is not None and batch.last.rows.tolist() == [99, 169, 170, 171, 172]
    early, whole = batch.last.groups
    assert (early.q_rows, whole.q_rows) == ({0: slice(0, 2)}, {0: slice(2, 5)})
    assert (early.kv_rows, whole.kv_rows) == ({}, {0: slice(170, 173)})
    assert early.geometry.rows == ((1, 99), (1, 69))
    assert [(row.request_id, row.row, row.position) for row in batch.samples] == [(1, 0, 100), (2, 1, 70), (3, 4, 3)]
