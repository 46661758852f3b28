"""What a rank remembers of the tokens that it drew, for its next step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from sp_backend.answers import Answers
from sp_backend.commands import Sampling
from sp_backend.local_batch import SampleRow


class OneHot:
    """A decoder whose hidden states are its logits."""

    shard = SimpleNamespace(group_rank=0)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def drawing(*request_ids: int) -> Any:
    greedy = Sampling(temperature=0.0)
    return SimpleNamespace(samples=[SampleRow(request, i, 5, greedy) for i, request in enumerate(request_ids)])


def test_the_tokens_of_the_last_step_are_known_but_for_requests_that_left() -> None:
    """One that left may have come back on another rank, and this one must not be taken for the token drawn there."""
    grammars: Any = SimpleNamespace(forget=lambda requests: None, allowed=lambda request, sampling: None)
    decoder: Any = OneHot()
    answers = Answers(decoder, grammars)
    answers.tokens(drawing(7, 8), torch.eye(4)[[2, 3]])
    assert answers.drawn == {7: 2, 8: 3}
    answers.forget([7, 9])
    assert answers.drawn == {8: 3}
    answers.tokens(drawing(9), torch.eye(4)[[1]])
    assert answers.drawn == {9: 1}, "of the last step alone"
