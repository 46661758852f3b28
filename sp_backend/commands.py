"""What a worker can be told, and what it answers. Pure: no torch; msgpack on the wire (msgspec Structs).

What there is many of in each step is unknown to the garbage collector (gc=False): nothing of it is in a cycle.

The controller sends each worker that takes part its own `Step`: the fields that describe the whole batch are equal on
every rank (so that all ranks derive the same buffer sizes), those marked *this rank's* are not. Token ids and page
indices travel as little-endian int32 bytes, page owners as one byte a page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from sp_backend.config import BackendConfig
from sp_backend.topology import Machine

LOCAL = "local"  # the plan of sequences that lie on one rank: nothing is exchanged
DECODE = "decode"  # the plan of few tokens, each on one rank, over keys on any
TOKEN_BYTES = 4  # int32, on the wire
UNKNOWN = (-1).to_bytes(4, "little", signed=True)  # as a token id: the one drawn for the request one step earlier
Pooling = Literal["last", "mean"]  # of the hidden states of a prompt's last token, or of all its tokens


class WorkerStart(msgspec.Struct, frozen=True):
    """What a worker process reads from its standard input, up to end of file."""

    config: BackendConfig
    rank: int
    address: str  # of the controller's ZMQ ROUTER; the worker's DEALER takes the identity str(rank)
    rendezvous: str  # a file that does not exist yet, for torch.distributed's FileStore
    parent: int  # the controller's process id: the worker does not outlive it


class Sampling(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How to turn the last logits of a sequence into a token. temperature 0 is greedy (argmax)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1: all
    min_p: float = 0.0
    seed: int = 0  # the draw depends on (seed, position) alone: not on batch, rank or retraction
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    banned: list[int] = []  # never sampled (end-of-sequence before min_tokens)
    logprobs: int | None = None  # None: none; k: the sampled token's and the k most likely ones'
    grammar: str | None = None  # llguidance's; what the output must match
    context: bytes = b""  # int32 ids that a penalty (prompt + output) or the grammar needs; the last may be UNKNOWN
    num_prompt: int = 0  # how many of `context` are prompt

    @property
    def penalizes(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


class Scoring(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Asks for the log-probability of each prompt token, given those before it."""

    targets: bytes  # this rank's: the id that follows each of its new tokens (int32)
    num_top: int  # how many of the most likely tokens are wanted beside it


class SequenceStep(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request's part of a step: `num_new` tokens after `start` cached ones."""

    request_id: int
    start: int  # tokens already in the KV cache; page-aligned unless degree is 1
    num_new: int
    home: int  # the first SP rank that holds new tokens ...
    degree: int  # ... and how many ranks share them, cut by the plan's layout; 1: all are on `home`
    page_owners: bytes  # SP rank of each page that this rank does not know of yet (uint8), in order
    pages: bytes  # this rank's: indices of those of them that it owns (int32), in order
    tokens: bytes  # this rank's: ids of the new tokens it computes (int32), in position order; or UNKNOWN alone
    sampling: Sampling | None = None  # set on ranks that hold the last new token: sample the one that follows it
    pooling: Pooling | None = None  # an embedding is made of these new tokens (of the last one, or of all of them)
    scoring: Scoring | None = None  # these new tokens are prompt, and their log-probabilities are wanted


class Group(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Sequences that run under one plan. All groups of a step share one forward pass. LOCAL: those of this rank."""

    plan: str  # a variant's name, DECODE (home tokens, history anywhere) or LOCAL (home tokens, history at home)
    sequences: list[SequenceStep]


class Step(msgspec.Struct, frozen=True, tag=True):
    """Run one forward pass. `release` frees the worker's page tables of ended or retracted requests first.

    A step is sent while the one before it runs. A token that is being drawn there is UNKNOWN here: the rank that draws
    it puts it in. Where the token is needed on another rank, its request is among `moved` (equal on every rank).
    """

    step_id: int
    groups: list[Group]
    release: list[int] = []
    moved: list[int] = []


def fill_in(step: Step, drawn: Mapping[int, int]) -> Step:
    """The step with this rank's UNKNOWN tokens known. drawn: request id -> token."""

    def filled(part: SequenceStep) -> SequenceStep:
        if part.tokens != UNKNOWN:
            return part
        token = drawn[part.request_id].to_bytes(4, "little")
        sampling = part.sampling
        if sampling is not None and sampling.context:
            sampling = msgspec.structs.replace(sampling, context=sampling.context[:-4] + token)
        return msgspec.structs.replace(part, tokens=token, sampling=sampling)

    groups = [Group(group.plan, [filled(part) for part in group.sequences]) for group in step.groups]
    return msgspec.structs.replace(step, groups=groups)


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the process cleanly."""


Command = Step | Shutdown


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    token: int
    logprob: float  # natural log, of the unmodified distribution


class SampledToken(msgspec.Struct, frozen=True, array_like=True, gc=False):
    request_id: int
    token: int
    logprob: float | None = None
    top: list[TokenLogprob] = []


class PooledStates(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The sum of one rank's final hidden states of an embedding's tokens in this step."""

    request_id: int
    states: bytes  # hidden_size float32, little-endian


class Scores(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities of prompt tokens: of those that follow one rank's new tokens."""

    request_id: int
    positions: list[int]  # of the tokens that are scored
    logprobs: list[float]
    top: list[list[TokenLogprob]]  # for each of them


class Loading(msgspec.Struct, frozen=True, tag=True):
    """How far a worker is with its weights."""

    rank: int
    num_loaded: int  # tensors
    num_tensors: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Sent once, after weights are loaded and plans proved; the controller compares the digests."""

    rank: int
    num_pages: int  # KV pages of this rank
    page_size: int
    plan_digests: dict[str, str]
    weight_bytes: int
    machine: Machine | None = None  # its links and rates, if plans are chosen by prediction


class StepResult(msgspec.Struct, frozen=True, tag=True):
    """Counters are totals since the worker started."""

    step_id: int
    rank: int
    tokens: list[SampledToken]  # from the one rank that sampled; empty elsewhere
    seconds: float  # wall time of this step on this rank
    query_key_pairs: int  # total visible (query, key, head-fraction) pairs attended, of a layer on average
    bytes_sent: int  # total, by plans
    wait_seconds: float  # total, blocked on transfers
    pooled: list[PooledStates] = []  # of this rank's rows; the sums of all ranks add up
    idle_seconds: float = 0.0  # between the previous answer and this step's command
    scores: list[Scores] = []  # of this rank's rows


class Failure(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot go on and is about to exit."""

    rank: int
    message: str


Report = Loading | Ready | StepResult | Failure

encode = msgspec.msgpack.Encoder().encode
decode_start = msgspec.msgpack.Decoder(WorkerStart).decode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
