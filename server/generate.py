"""`/generate`, SGLang's own endpoint: what its load test and some evaluation harnesses call.

Its field names and answers are SGLang's; what they mean is decided where it is for completions (jobs.py).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from scheduler.request import FinishReason, GeneratedToken
from server.choice import Delta
from server.completion import Collected, finite
from server.errors import ApiError, invalid
from server.generation import Job
from server.openai_types import NonNegative, SamplingFields, Seed
from server.prompts import in_thread_if_long
from server.streaming import event
from server.tokenizer import Tokenizer

DEFAULT_MAX_NEW_TOKENS = 128  # SGLang's
PARAMS = "sampling_params"
OTHER_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}


class SamplingParams(SamplingFields, frozen=True, kw_only=True):
    max_new_tokens: NonNegative | None = None
    min_new_tokens: NonNegative | None = None
    sampling_seed: Seed | None = None
    no_stop_trim: bool | None = None

    def fields(self) -> SamplingFields:
        """In the words of the other endpoints; an empty grammar is none."""
        return msgspec.structs.replace(
            self,
            max_tokens=self.max_new_tokens,
            min_tokens=self.min_new_tokens,
            seed=self.sampling_seed,
            include_stop_str_in_output=self.no_stop_trim,
            json_schema=self.json_schema or None,
            regex=self.regex or None,
            ebnf=self.ebnf or None,
            stream_options=None,
        )


def _null() -> msgspec.Raw:
    return msgspec.Raw(b"null")


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True):
    text: msgspec.Raw = msgspec.field(default_factory=_null)  # a string or a list of them: see prompts.py
    input_ids: msgspec.Raw = msgspec.field(default_factory=_null)  # token ids or a list of such lists
    sampling_params: SamplingParams | None = None
    stream: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: Annotated[int, Meta(ge=-1)] | None = None  # of the prompt; -1: of what is generated alone
    top_logprobs_num: Annotated[int, Meta(ge=0, le=20)] | None = None
    return_text_in_logprobs: bool | None = None
    rid: str | None = None

    @property
    def prompt_field(self) -> str:
        given = [name for name in ("text", "input_ids") if bytes(getattr(self, name)) != b"null"]
        if len(given) != 1:
            raise invalid("Exactly one of text and input_ids is needed.", given[0] if given else "text")
        return given[0]

    @property
    def num_top(self) -> int | None:
        """How many alternatives each log-probability has; None: there are none."""
        return (self.top_logprobs_num or 0) if self.return_logprob else None

    @property
    def scored_from(self) -> int | None:
        """The first prompt token whose log-probability is wanted."""
        start = -1 if self.logprob_start_len is None else self.logprob_start_len
        return start if self.return_logprob and start >= 0 else None


def in_its_words(error: ApiError) -> ApiError:
    """An error about sampling, with the names that the client used."""
    message, param = error.message, error.param
    for name, other in OTHER_NAMES.items():
        message = message.replace(name, other)
        param = other if param == name else param
    named = param is not None and param.partition(".")[0] in SamplingParams.__struct_fields__
    return ApiError(error.status, message, param=f"{PARAMS}.{param}" if named else param, code=error.code)


@dataclass(frozen=True, slots=True)
class GenerateWriter:
    """Turns the deltas of a job into one answer, or events that each tell all there is so far."""

    job: Job
    tokenizer: Tokenizer
    with_logprobs: bool
    scored_from: int | None  # position in the prompt; None: the prompt has no log-probabilities
    with_text: bool  # of the tokens, beside their log-probabilities

    async def whole(self, deltas: AsyncGenerator[Delta, None]) -> Any:
        choices = [Collected() for _ in range(self.job.num_choices)]
        async with aclosing(deltas):
            async for delta in deltas:
                choices[delta.index].add(delta)
        work = sum(choice.work for choice in choices)
        answers = await in_thread_if_long(work, lambda: [self._answer(*each) for each in enumerate(choices)])
        return answers if len(answers) > 1 else answers[0]

    async def events(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        choices = [Collected() for _ in range(self.job.num_choices)]
        async with aclosing(deltas):
            async for delta in deltas:
                choices[delta.index].add(delta)
                if delta.tokens or delta.text or delta.finish_reason is not None:
                    index = {"index": delta.index} if len(choices) > 1 else {}
                    yield event({**self._answer(delta.index, choices[delta.index]), **index})

    def _answer(self, index: int, choice: Collected) -> dict[str, Any]:
        last = choice.last
        assert last is not None
        ids = [token.generated.token for token in choice.tokens]
        prompt = self.job.prompts[index // self.job.decoding.n]
        meta: dict[str, Any] = {
            "id": self.job.rid or self.job.id,
            "finish_reason": _finish_reason(last),
            "prompt_tokens": len(prompt),
            "completion_tokens": last.num_tokens,
            "cached_tokens": last.cached_tokens,
        }
        if self.with_logprobs:
            meta |= self._logprobs("output", [token.generated for token in choice.tokens])
        if self.scored_from is not None:
            meta |= self._logprobs("input", self._scored(prompt, choice.prompt))
        if self.job.explain and last.finish_reason is not None:
            meta["sp_explain"] = [asdict(step) for step in last.steps]
        return {"text": choice.text, "output_ids": ids, "meta_info": meta}

    def _scored(self, prompt: list[int], scores: list[GeneratedToken]) -> list[GeneratedToken]:
        """The first one has no log-probability, as in SGLang, wherever it is."""
        tokens = [GeneratedToken(prompt[0]), *scores][self.scored_from :]
        return [GeneratedToken(tokens[0].token), *tokens[1:]] if tokens else []

    def _logprobs(self, side: str, tokens: list[GeneratedToken]) -> dict[str, Any]:
        return {
            f"{side}_token_logprobs": [self._entry(token.logprob, token.token) for token in tokens],
            f"{side}_top_logprobs": [
                [self._entry(top.logprob, top.token) for top in token.top] or None for token in tokens
            ],
        }

    def _entry(self, logprob: float | None, token: int) -> tuple[float | None, int, str | None]:
        return finite(logprob), token, self.tokenizer.token_text(token) if self.with_text else None


def _finish_reason(delta: Delta) -> dict[str, Any] | None:
    match delta.finish_reason:
        case None:
            return None
        case FinishReason.LENGTH.value:
            return {"type": "length", "length": delta.num_tokens}
        case FinishReason.ABORT.value:
            return {"type": "abort", "message": "The request was aborted."}
        case reason:
            return {"type": reason, "matched": delta.stop_reason}
