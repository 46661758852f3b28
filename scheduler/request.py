"""What the HTTP side asks of the controller, and what it gets back. Torch-free."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from sp_backend.commands import Pooling, Sampling, TokenLogprob


class Refused(Exception):
    """A request that is not taken in; the message is for the client."""

    @property
    def message(self) -> str:
        return str(self)


class QueueFull(Refused):
    """Worth trying again later."""


class Draining(Refused):
    """The server ends after the requests that it already has."""


class Unavailable(Refused):
    """The workers or the controller have failed."""


class RequestTooLong(Refused):
    def __init__(self, needs: int, fits: int, message: str) -> None:
        super().__init__(message)
        self.needs = needs  # tokens
        self.fits = fits


class FinishReason(enum.Enum):
    STOP = "stop"  # an end-of-sequence or stop token, a stop string (found by the server), or an embedding is made
    LENGTH = "length"  # max_tokens or the context length reached
    ABORT = "abort"  # the client went away or asked for it
    ERROR = "error"  # the controller or a worker failed


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to complete, or to embed. `n` completions of one prompt are n of these."""

    request_id: str
    prompt: list[int]
    max_tokens: int  # 0: the prompt alone is computed, for its log-probabilities or an embedding
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: frozenset[int] = frozenset()  # end-of-sequence ids included unless ignore_eos
    min_tokens: int = 0  # no stop token before that many
    explain: bool = False  # its outputs tell the steps that it ran in
    prompt_logprobs: int | None = None  # with the first token come those of the prompt, and of as many alternatives
    pooling: Pooling | None = None  # the answer is one output with an embedding, pooled so


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step that a request took part in ran, and why; or several decode steps in a row."""

    kind: str  # prefill | decode
    plan: str
    reason: str  # why this plan
    num_new: int  # tokens of this request ...
    num_cached: int  # ... after so many in the KV cache
    batch_tokens: int  # new tokens of all requests of the step
    predicted_seconds: float | None  # None: not predicted
    measured_seconds: float  # from the command to the last worker's answer
    num_steps: int = 1

    def followed_by(self, other: StepReport) -> StepReport | None:
        """Both as one report, if they are decode steps of one plan."""
        if (self.kind, self.plan, self.reason) != ("decode", other.plan, other.reason) or other.kind != "decode":
            return None
        return replace(
            self,
            num_new=self.num_new + other.num_new,
            batch_tokens=self.batch_tokens + other.batch_tokens,
            predicted_seconds=None,
            measured_seconds=self.measured_seconds + other.measured_seconds,
            num_steps=self.num_steps + other.num_steps,
        )


class GeneratedToken(msgspec.Struct, frozen=True, gc=False):
    token: int
    logprob: float | None = None  # natural log, of the unmodified distribution
    top: list[TokenLogprob] = []


class Output(msgspec.Struct, frozen=True, gc=False):
    """One event of a request's stream. The last one has `finish_reason`.

    A struct, as is whatever else is made for each token: made at a tenth of a dataclass's cost, unknown to the
    garbage collector.
    """

    request_id: str
    tokens: list[GeneratedToken] = []
    finish_reason: FinishReason | None = None
    stop_token: GeneratedToken | None = None  # that ended it (not among `tokens`)
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    error: str | None = None  # with FinishReason.ERROR
    steps: list[StepReport] = []  # since the previous output, of a request with `explain`
    prompt: list[GeneratedToken] = []  # all but its first token, with `prompt_logprobs`
    embedding: NDArray[np.float32] | None = None  # [hidden_size], not normalised; of a request with `pooling`
