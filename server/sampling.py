"""From a request's sampling fields to what the scheduler runs, with the model's defaults filled in."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from server.choice import TextOptions
from server.errors import invalid
from server.openai_types import UNSUPPORTED, SamplingFields
from sp_backend.commands import Sampling


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to run each of the `n` completions of a prompt."""

    sampling: Sampling
    text: TextOptions
    stop_token_ids: frozenset[int]
    max_tokens: int | None  # None: as many as fit
    min_tokens: int
    n: int

    def sampling_of(self, k: int) -> Sampling:
        """Completions of one prompt differ in their seeds, and repeat with the request's."""
        fields = {name: getattr(self.sampling, name) for name in Sampling.__struct_fields__}
        return Sampling(**{**fields, "seed": (self.sampling.seed + k) % 2**63})


class SamplingReader:
    def __init__(self, vocab_size: int, eos_ids: tuple[int, ...], defaults: dict[str, float]) -> None:
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)
        self._defaults = defaults

    def read(
        self, request: SamplingFields, logprobs: int | None, max_tokens: int | None, grammar: str | None
    ) -> Decoding:
        _refuse_unsupported(request)
        if request.stream_options is not None and not request.stream:
            raise invalid("stream_options needs stream: true.", "stream_options")
        min_tokens = request.min_tokens or 0
        if max_tokens is not None and min_tokens > max_tokens:
            raise invalid(f"min_tokens {min_tokens} is more than max_tokens {max_tokens}.", "min_tokens")
        stop_ids = frozenset(request.stop_token_ids or ())
        if any(token >= self._vocab_size for token in stop_ids):
            raise invalid(f"stop_token_ids: out of vocabulary (size {self._vocab_size}).", "stop_token_ids")
        return Decoding(
            sampling=self._sampling(request, logprobs, grammar),
            text=TextOptions(
                stops=_stops(request.stop),
                include_stop=bool(request.include_stop_str_in_output),
                skip_special_tokens=request.skip_special_tokens is not False,
                logprobs=logprobs,
                min_tokens=min_tokens,
            ),
            stop_token_ids=stop_ids if request.ignore_eos else stop_ids | self._eos_ids,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            n=request.n or 1,
        )

    def _sampling(self, request: SamplingFields, logprobs: int | None, grammar: str | None) -> Sampling:
        seed = secrets.randbits(62) if request.seed is None else request.seed % 2**63
        return Sampling(
            temperature=self._default(request.temperature, "temperature", 1.0),
            top_p=self._default(request.top_p, "top_p", 1.0),
            top_k=min(int(self._default(request.top_k, "top_k", -1)), self._vocab_size) or -1,
            min_p=self._default(request.min_p, "min_p", 0.0),
            seed=seed,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repetition_penalty=self._default(request.repetition_penalty, "repetition_penalty", 1.0),
            logit_bias=self._logit_bias(request.logit_bias or {}),
            logprobs=logprobs,
            grammar=grammar,
        )

    def _default(self, given: float | None, name: str, otherwise: float) -> float:
        return self._defaults.get(name, otherwise) if given is None else given

    def _logit_bias(self, given: dict[str, float]) -> dict[int, float]:
        try:
            bias = {int(token): value for token, value in given.items()}
        except ValueError:
            raise invalid("logit_bias: keys must be token ids.", "logit_bias") from None
        if any(not 0 <= token < self._vocab_size for token in bias):
            raise invalid(f"logit_bias: token id out of vocabulary (size {self._vocab_size}).", "logit_bias")
        return bias


def _refuse_unsupported(request: SamplingFields) -> None:
    for name, instead in UNSUPPORTED.items():
        value = getattr(request, name)
        if value is not None and value is not False and value not in ("", [], {}):  # clients send these for "none"
            raise invalid(f"{name} is not supported: {instead}.", name)


def _stops(given: str | list[str] | None) -> list[str]:
    stops = [given] if isinstance(given, str) else given or []
    return [stop for stop in stops if stop]  # clients send "" for "none"
