"""A scheduler client that makes up deterministic tokens. It records what it was asked and what was aborted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scheduler.request import Draining, FinishReason, GeneratedToken, GenerateRequest, Output, StepReport
from scheduler.stats import LastChoice, PlanStats, RankStats, Stats
from sp_backend.commands import TokenLogprob, encode

NextToken = Callable[[GenerateRequest, int], int]


def echo_token(request: GenerateRequest, position: int) -> int:
    """Repeats the prompt."""
    return request.prompt[position % len(request.prompt)]


def states_of(request: GenerateRequest, size: int) -> NDArray[np.float32]:
    """An embedding that tells the prompt: its tokens + 1, over and over."""
    return np.resize(np.array(request.prompt, np.float32) + 1, size)


@dataclass
class FakeClient:
    next_token: NextToken = echo_token
    prefill_seconds: float = 0.0
    token_seconds: float = 0.0
    capacity_tokens: int = 1_000_000
    cached_tokens: int = 0
    refusal: Exception | None = None  # raised before the first output
    fail_after: int | None = None  # tokens, then an error output
    unhealthy: str | None = None
    tokens_per_output: int = 1
    embedding_size: int = 256  # the embedded model's
    embedding_scale: float = 1.0
    requests: list[GenerateRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    flushed: int = 0
    draining: bool = False

    def __post_init__(self) -> None:
        self._asked_to_abort: set[str] = set()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        self.requests.append(request)
        encode(request.sampling)  # the workers get it
        if self.refusal is not None:
            raise self.refusal
        if self.draining:
            raise Draining("draining")
        self.running.add(request.request_id)
        ended = False
        try:
            await self._prefill(request.request_id)
            async for output in self._outputs(request):
                ended = output.finish_reason is not None
                yield output
        finally:
            self.running.discard(request.request_id)
            (self.finished if ended else self.aborted).append(request.request_id)

    async def _prefill(self, name: str) -> None:
        """An abort ends it early."""
        ends = asyncio.get_running_loop().time() + self.prefill_seconds
        await self._wait(0)
        while name not in self._asked_to_abort and (left := ends - asyncio.get_running_loop().time()) > 0:
            await self._wait(min(left, 0.01))

    async def _outputs(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        made, name = 0, request.request_id
        if request.pooling is not None:
            yield self._embedded(request)
        elif not request.max_tokens:
            yield Output(name, [], FinishReason.LENGTH, prompt=self._scored(request))
        while made < request.max_tokens:
            tokens = []
            prompt = [] if made else self._scored(request)
            for _ in range(self.tokens_per_output):
                if self.fail_after is not None and made >= self.fail_after:
                    yield Output(name, finish_reason=FinishReason.ERROR, error="rank 1 failed: out of memory")
                    return
                token = self.next_token(request, made)
                if token in request.stop_token_ids and made >= request.min_tokens:
                    stop = self._generated(request, token)
                    yield Output(name, tokens, FinishReason.STOP, stop, self.cached_tokens, prompt=prompt)
                    return
                tokens.append(self._generated(request, token))
                made += 1
                if made == request.max_tokens:
                    break
            if name in self._asked_to_abort:
                yield Output(name, finish_reason=FinishReason.ABORT)
                return
            last = FinishReason.LENGTH if made == request.max_tokens else None
            steps = self._steps(request, made) if request.explain else []
            yield Output(name, tokens, last, cached_tokens=self.cached_tokens, steps=steps, prompt=prompt)
            await self._wait(self.token_seconds)

    def _embedded(self, request: GenerateRequest) -> Output:
        if self.fail_after is not None:
            return Output(request.request_id, finish_reason=FinishReason.ERROR, error="rank 1 failed: out of memory")
        if request.request_id in self._asked_to_abort:
            return Output(request.request_id, finish_reason=FinishReason.ABORT)
        return Output(
            request.request_id,
            finish_reason=FinishReason.STOP,
            cached_tokens=self.cached_tokens,
            steps=self._steps(request, 1) if request.explain else [],
            embedding=self.embedding_scale * states_of(request, self.embedding_size),
        )

    @staticmethod
    def _steps(request: GenerateRequest, made: int) -> list[StepReport]:
        """The prompt in one step with its first token, then a step for each token."""
        length = len(request.prompt)
        if made == 1:
            return [StepReport("prefill", "ring_pass_q", "as this test says", length, 0, length, 0.5, 0.25)]
        return [StepReport("decode", "decode", "few tokens", 1, length + made - 1, 1, None, 0.125)]

    @staticmethod
    async def _wait(seconds: float) -> None:
        await asyncio.sleep(seconds)

    @staticmethod
    def _generated(request: GenerateRequest, token: int) -> GeneratedToken:
        asked = request.sampling.logprobs
        if asked is None:
            return GeneratedToken(token)
        top = [TokenLogprob(token + k, -0.5 - k) for k in range(asked)]
        return GeneratedToken(token, -0.5, top)

    @staticmethod
    def _scored(request: GenerateRequest) -> list[GeneratedToken]:
        """The n-th token of a prompt has the log-probability -n, and is the likeliest."""
        num_top, ids = request.prompt_logprobs, enumerate(request.prompt)
        if num_top is None:
            return []
        return [
            GeneratedToken(token, float(-n), [TokenLogprob(token + k, -n - k) for k in range(num_top)])
            for n, token in ids
            if n > 0
        ]

    def abort(self, request_id: str) -> None:
        self._asked_to_abort.add(request_id)

    def stats(self) -> Stats:
        ranks = [self._rank_stats(rank) for rank in range(2)]
        return Stats(
            page_size=64,
            num_running=len(self.running),
            num_waiting=0,
            num_pages=200,
            pages_used=7,
            pages_cached=2,
            per_rank=ranks,
            prompt_tokens=sum(len(request.prompt) for request in self.requests),
            cached_tokens=0,
            generated_tokens=0,
            num_finished={"stop": len(self.finished)},
            num_retractions=0,
            num_steps={"prefill": 3, "decode": 4},
            capacity_tokens=self.capacity_tokens,
            plans={"ring_pass_q": PlanStats(2, 600, 1.5, 1.0, 1.25), "decode": PlanStats(4, 4, 0.5)},
            last_choice=LastChoice("ring_pass_q", "as this test says", 0.5, 0.625),
        )

    @staticmethod
    def _rank_stats(rank: int) -> RankStats:
        return RankStats(
            rank=rank,
            sp_rank=rank,
            tp_rank=0,
            num_pages=100,
            pages_used=3 + rank,
            pages_cached=rank,
            num_steps=7,
            query_key_pairs=1000,
            bytes_sent=64,
            wait_seconds=0.25,
            busy_seconds=1.5,
            idle_seconds=0.125,
        )

    def healthy(self) -> str | None:
        return self.unhealthy

    def flush_cache(self) -> None:
        self.flushed += 1

    async def drain(self, timeout: float) -> bool:
        self.draining = True
        deadline = asyncio.get_running_loop().time() + timeout
        while self.running and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        return not self.running
