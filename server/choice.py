"""One completion on its way to the client: tokens in, certain text with its log-probabilities out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from scheduler.request import GeneratedToken, Output, StepReport
from server.stopping import StopStrings
from server.tokenizer import Detokenizer, Tokenizer


class TokenText(msgspec.Struct, frozen=True, gc=False):
    """A generated token with the offset of its text in the completion."""

    generated: GeneratedToken
    offset: int


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What became certain since the previous one."""

    index: int  # of the choice within the response
    text: str = ""
    tokens: list[TokenText] = []  # with log-probabilities; the last one may be the token that ended it
    num_tokens: int = 0  # generated so far, those without text included
    cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or token that ended it
    steps: list[StepReport] = []  # with the last one, if they were asked for
    prompt: list[GeneratedToken] = []  # all but its first token, once, if asked for


@dataclass(frozen=True, slots=True)
class TextOptions:
    stops: list[str] = field(default_factory=list)
    include_stop: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None  # None: none; k: the k most likely alternatives
    min_tokens: int = 0  # no stop string before that many


class Choice:
    def __init__(self, index: int, tokenizer: Tokenizer, prompt: list[int], options: TextOptions) -> None:
        self._index = index
        self._options = options
        self._detokenizer = Detokenizer(tokenizer, prompt, options.skip_special_tokens)
        self._stops = StopStrings(options.stops, options.include_stop)
        self._waiting: deque[TokenText] = deque()  # log-probabilities of text that is held back
        self._length = 0  # characters decoded
        self._certain = 0  # characters given out
        self._num_tokens = 0
        self._cached_tokens = 0
        self._steps: list[StepReport] = []

    def add(self, output: Output) -> Delta:
        """A delta with `finish_reason` is the last one, whether `output` was or a stop string was found."""
        return msgspec.structs.replace(self._add(output), prompt=output.prompt) if output.prompt else self._add(output)

    def _add(self, output: Output) -> Delta:
        self._cached_tokens = max(self._cached_tokens, output.cached_tokens)
        for step in output.steps:
            self._add_step(step)
        text = ""
        for token in output.tokens:
            text += self._add_token(token)
            if self._stops.found is not None:
                return self._delta(text, "stop", self._stops.found)
        if output.finish_reason is None:
            return self._delta(text)
        stop = output.stop_token
        self._num_tokens += stop is not None
        text += self._add_text(self._detokenizer.finish())
        if self._stops.found is not None:
            return self._delta(text, "stop", self._stops.found)
        if stop is not None and self._options.logprobs is not None:
            self._waiting.append(TokenText(stop, self._length))
        text += self._stops.finish()
        return self._delta(text, output.finish_reason.value, None if stop is None else stop.token)

    def _add_step(self, step: StepReport) -> None:
        joined = self._steps[-1].followed_by(step) if self._steps else None
        self._steps[-1:] = [*self._steps[-1:], step] if joined is None else [joined]

    def _add_token(self, token: GeneratedToken) -> str:
        if self._options.logprobs is not None:
            self._waiting.append(TokenText(token, self._length))
        self._num_tokens += 1
        return self._add_text(self._detokenizer.add(token.token))

    def _add_text(self, text: str) -> str:
        self._length += len(text)
        return self._stops.add(text) if self._num_tokens > self._options.min_tokens else text

    def _delta(self, text: str, finish_reason: str | None = None, stop_reason: str | int | None = None) -> Delta:
        self._certain += len(text)
        cut = self._stops.found is not None
        held = cut or (finish_reason is None and self._certain < self._length)
        tokens = []
        while self._waiting and (not held or self._waiting[0].offset < self._certain):
            tokens.append(self._waiting.popleft())
        steps = self._steps if finish_reason is not None else []
        return Delta(
            self._index, text, tokens, self._num_tokens, self._cached_tokens, finish_reason, stop_reason, steps
        )
