"""What a request with a grammar may generate next, by llguidance (https://github.com/guidance-ai/llguidance).

Each rank that draws a request's tokens follows its grammar by itself: a matcher consumes the tokens that the step
carries beyond those it has seen, so a request may move to another rank, or be retracted and come back, at any time.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from sp_backend.commands import Sampling

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Progress:
    matcher: LLMatcher
    num_consumed: int = 0  # generated tokens
    complained: bool = False


class Grammars:
    def __init__(self, tokenizer_folder: str, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._file = Path(tokenizer_folder) / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._tokenizer: LLTokenizer | None = None
        self._requests: dict[int, _Progress] = {}

    def allowed(self, request_id: int, sampling: Sampling) -> Tensor | None:
        """Which tokens may follow: bool [vocab]; None: any, there is no grammar. Never all False.

        Once the text is complete only end-of-sequence tokens may, also if one was generated already.
        """
        if sampling.grammar is None:
            return None
        if request_id not in self._requests:
            self._requests[request_id] = _Progress(LLMatcher(self._tokens(), sampling.grammar))
        progress = self._requests[request_id]
        generated = array("i", sampling.context)[sampling.num_prompt + progress.num_consumed :]
        progress.matcher.consume_tokens(generated.tolist())
        progress.num_consumed += len(generated)
        bits = np.frombuffer(progress.matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        if progress.matcher.is_error() and not progress.complained:
            progress.complained = True  # a limit of the parser: the grammar itself was validated
            logger.warning("A grammar cannot be followed any further: %s", progress.matcher.get_error())
        return torch.from_numpy(allowed)

    def forget(self, request_ids: Iterable[int]) -> None:
        """Of requests that ended; one that comes back starts over from its generated tokens."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def _tokens(self) -> LLTokenizer:
        """Made for the first request with a grammar: 1.2 s and 136 MB of every rank for 152,000 tokens."""
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(str(self._file), self._vocab_size, list(self._eos_ids))
        return self._tokenizer
