"""What a completion looks like as JSON, whole and in pieces, for both endpoints."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import msgspec

from scheduler.request import GeneratedToken
from server.choice import Delta, TokenText
from server.generation import Job
from server.prompts import in_thread_if_long
from server.streaming import event
from server.tokenizer import Detokenizer, Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no infinity
TOKEN_WORK = 64  # to name a token and its alternatives takes as long as to read so many bytes of a prompt


@dataclass(slots=True)
class Collected:
    """One choice, gathered from its deltas."""

    parts: list[str] = field(default_factory=list)
    tokens: list[TokenText] = field(default_factory=list)
    prompt: list[GeneratedToken] = field(default_factory=list)  # all but its first token, if asked for
    last: Delta | None = None

    def add(self, delta: Delta) -> None:
        self.parts.append(delta.text)
        self.tokens += delta.tokens
        self.prompt += delta.prompt
        self.last = delta

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def work(self) -> int:
        """Of writing its log-probabilities, in bytes of a prompt: for those of a long one others must not wait."""
        return TOKEN_WORK * (len(self.prompt) + len(self.tokens))


class Usage:
    def __init__(self, job: Job) -> None:
        self._prompt_tokens = sum(map(len, job.prompts))
        self._n = job.decoding.n
        self._generated: dict[int, int] = {}
        self._cached: dict[int, int] = {}

    def add(self, delta: Delta) -> None:
        self._generated[delta.index] = delta.num_tokens
        if delta.index % self._n == 0:  # the other choices of a prompt find its pages through the first one
            self._cached[delta.index] = delta.cached_tokens

    def json(self) -> dict[str, Any]:
        generated = sum(self._generated.values())
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


class Format(Protocol):
    """How one endpoint writes choices."""

    object: str
    chunk_object: str

    def whole(self, index: int, collected: Collected) -> dict[str, Any]: ...
    def first(self, delta: Delta) -> dict[str, Any] | None: ...  # a choice's first chunk, if it needs one
    def piece(self, delta: Delta) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that comes again before its completion."""

    ids: list[int]
    text: str


class CompletionFormat:
    object = chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, echoes: list[Echo], n: int, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._echoes = echoes  # for each prompt; none at all: they are not repeated
        self._n = n
        self._logprobs = logprobs

    def whole(self, index: int, collected: Collected) -> dict[str, Any]:
        assert collected.last is not None
        text = self._echo(index) + collected.text
        tokens = self._of_prompt(index, collected.prompt) + self._after_echo(index, collected.tokens)
        return {"index": index, "text": text, "logprobs": self._logprobs_json(tokens), **_ending(collected.last)}

    def first(self, delta: Delta) -> dict[str, Any] | None:
        if not self._echoes:
            return None
        logprobs = self._logprobs_json(self._of_prompt(delta.index, delta.prompt))
        return {"index": delta.index, "text": self._echo(delta.index), "logprobs": logprobs, "finish_reason": None}

    def piece(self, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs_json(self._after_echo(delta.index, delta.tokens))
        return {"index": delta.index, "text": delta.text, "logprobs": logprobs, **_ending(delta)}

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._n].text if self._echoes else ""

    def _of_prompt(self, index: int, scores: list[GeneratedToken]) -> list[TokenText]:
        """The prompt's tokens, of which the first has nothing before it and so no log-probability."""
        if not self._echoes or not self._logprobs:
            return []
        ids = self._echoes[index // self._n].ids
        text, length, tokens = Detokenizer(self._tokenizer, [], skip_special_tokens=True), 0, []
        for generated in [GeneratedToken(ids[0]), *scores]:
            tokens.append(TokenText(generated, length))
            length += len(text.add(generated.token))
        return tokens

    def _after_echo(self, index: int, tokens: list[TokenText]) -> list[TokenText]:
        """Offsets count from the start of the whole text."""
        shift = len(self._echo(index)) if self._logprobs else 0
        return [msgspec.structs.replace(token, offset=token.offset + shift) for token in tokens] if shift else tokens

    def _logprobs_json(self, tokens: list[TokenText]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        name = self._tokenizer.token_text
        return {
            "tokens": [name(token.generated.token) for token in tokens],
            "token_logprobs": [finite(token.generated.logprob) for token in tokens],
            "top_logprobs": [self._alternatives(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _alternatives(self, token: TokenText) -> dict[str, float] | None:
        """The most likely tokens and the chosen one."""
        name, chosen = self._tokenizer.token_text, token.generated
        if chosen.logprob is None:
            return None
        result = {name(top.token): max(top.logprob, LEAST_LOGPROB) for top in reversed(chosen.top)}
        result.setdefault(name(chosen.token), max(chosen.logprob, LEAST_LOGPROB))
        return dict(sorted(result.items(), key=lambda item: -item[1]))


class ChatFormat:
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def whole(self, index: int, collected: Collected) -> dict[str, Any]:
        assert collected.last is not None
        message = {"role": "assistant", "content": collected.text}
        return {"index": index, "message": message, **self._rest(collected.tokens, collected.last)}

    def first(self, delta: Delta) -> dict[str, Any] | None:
        opening = {"role": "assistant", "content": ""}
        return {"index": delta.index, "delta": opening, "logprobs": None, "finish_reason": None}

    def piece(self, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text else {}
        return {"index": delta.index, "delta": content, **self._rest(delta.tokens, delta)}

    def _rest(self, tokens: list[TokenText], delta: Delta) -> dict[str, Any]:
        text = tokens[:-1] if isinstance(delta.stop_reason, int) else tokens  # the stop token is no part of the message
        logprobs = {"content": [self._entry(token) for token in text]} if self._logprobs else None
        return {"logprobs": logprobs, **_ending(delta)}

    def _entry(self, token: TokenText) -> dict[str, Any]:
        chosen = token.generated
        tops = [self._candidate(top.token, top.logprob) for top in chosen.top]
        return {**self._candidate(chosen.token, chosen.logprob), "top_logprobs": tops}

    def _candidate(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        return {"token": self._tokenizer.token_text(token), "logprob": finite(logprob), "bytes": list(data)}


def _ending(delta: Delta) -> dict[str, Any]:
    if delta.finish_reason is None:
        return {"finish_reason": None}
    reason = delta.stop_reason  # SGLang's and vLLM's names for it
    return {"finish_reason": delta.finish_reason, "matched_stop": reason, "stop_reason": reason}


def _explained(delta: Delta) -> dict[str, Any]:
    """What each step of a choice ran, and why; consecutive decode steps as one."""
    return {"index": delta.index, "steps": [asdict(step) for step in delta.steps]}


def finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


@dataclass(frozen=True, slots=True)
class Writer:
    """Turns the deltas of a job into one response or a stream of events."""

    job: Job
    model: str
    format: Format
    include_usage: bool = False
    usage_in_every_chunk: bool = False

    async def whole(self, deltas: AsyncGenerator[Delta, None]) -> dict[str, Any]:
        usage = Usage(self.job)
        choices = [Collected() for _ in range(self.job.num_choices)]
        async with aclosing(deltas):
            async for delta in deltas:
                usage.add(delta)
                choices[delta.index].add(delta)
        work = sum(choice.work for choice in choices)
        written = await in_thread_if_long(work, lambda: [self.format.whole(*each) for each in enumerate(choices)])
        whole = {**self._head(self.format.object), "choices": written, "usage": usage.json()}
        if self.job.explain:
            whole["sp_explain"] = [_explained(choice.last) for choice in choices if choice.last is not None]
        return whole

    async def events(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        usage, begun = Usage(self.job), set[int]()
        head = self._head(self.format.chunk_object)

        def chunk(choice: dict[str, Any], **extra: Any) -> bytes:
            if self.usage_in_every_chunk:
                extra["usage"] = usage.json()
            elif self.include_usage:
                extra["usage"] = None
            return event({**head, "choices": [choice], **extra})

        async with aclosing(deltas):
            async for delta in deltas:
                usage.add(delta)
                starts = delta.index not in begun
                begun.add(delta.index)
                if starts:
                    work = TOKEN_WORK * len(delta.prompt)
                    opening = await in_thread_if_long(work, partial(self.format.first, delta))
                    if opening is not None:
                        yield chunk(opening)
                        starts = False  # clients take the first chunk for the first token: one is enough
                if starts or delta.text or delta.tokens or delta.finish_reason is not None:
                    last = self.job.explain and delta.finish_reason is not None
                    yield chunk(self.format.piece(delta), **({"sp_explain": [_explained(delta)]} if last else {}))
        if self.include_usage:
            yield event({**head, "choices": [], "usage": usage.json()})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.job.id, "object": kind, "created": int(time.time()), "model": self.model}
