"""Which rows of the last layer are wanted; that they come out right is shown in tests/e2e."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sp_backend.commands import DECODE, LOCAL, Group, Scoring, SequenceStep
from sp_backend.last_layer import FEW, as_decode, only_last_is_wanted
from sp_backend.layout import Layout


def sequence(num_new: int, start: int = 0, **fields: Any) -> SequenceStep:
    return SequenceStep(1, start, num_new, 0, 1, b"", b"", np.arange(num_new, dtype="<i4").tobytes(), **fields)


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
