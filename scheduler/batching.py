"""Continuous batching: which sequences run in the next step, and what a finished step means for each.

Prefill and decode steps alternate while both have work. A prefill step may need any rank, so it waits for all; a rank
may decode by itself (turns.py). A stream that cannot get a page for its next token makes the
youngest live request give way: it loses its pages (what the prefix cache knows of them stays findable), keeps its
tokens, and is the first of its lane to come back. The oldest live request therefore always gets on, and every request
fits when it is alone, so nobody waits for ever. Half-prefilled prompts cannot block each other: they are admitted only
with room for all of each, and give way to streams like everybody else.

A step is planned while the one before it runs, as if that had been done already: a rank takes its steps in order. Only
its tokens are not known yet (UNDRAWN). A request that they end has run one step in vain, whose outcome is dropped.
Nobody gives way before all tokens are known, for pages may be about to come back.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np

from scheduler.config import SchedulerConfig
from scheduler.placement import Placement
from scheduler.plans import PlanChoice, PlanChooser, StepPlanner
from scheduler.prefill import PrefillLanes
from scheduler.prefill_time import PrefillTime
from scheduler.request import FinishReason, GeneratedToken, GenerateRequest, Output, StepReport
from scheduler.sequence import UNDRAWN, Chunk, Sequence
from scheduler.turns import Ranks, Turns
from sp_backend.commands import LOCAL, SampledToken, StepResult
from sp_backend.config import BackendConfig

StepKind = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class PlannedStep:
    kind: StepKind
    chunks: list[Chunk]
    tokens: float = 0.0  # of the busiest rank, for the prediction of prefill times
    pairs: float = 0.0
    num_cached: int = 0  # tokens of its new sequences found in the prefix cache
    choices: tuple[PlanChoice, ...] = ()  # one for each plan that it runs

    @property
    def num_new(self) -> int:
        return sum(chunk.num_new for chunk in self.chunks)

    @property
    def predicted_seconds(self) -> float | None:
        """None where another plan runs beside the predicted one."""
        return self.choices[0].seconds if len(self.choices) == 1 else None

    def predict(self) -> None:
        """Finds what its plans should take, if that is not known yet."""
        for choice in self.choices:
            _ = choice.prediction  # which keeps it

    @property
    def plan(self) -> str:
        """The plans that run side by side, joined by +."""
        return "+".join(choice.plan for choice in self.choices)


@dataclass(slots=True)
class Counters:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    num_retractions: int = 0
    num_steps: dict[str, int] = field(default_factory=lambda: {"prefill": 0, "decode": 0})
    num_finished: dict[str, int] = field(default_factory=lambda: {reason.value: 0 for reason in FinishReason})


def failed(request_id: str, error: str) -> Output:
    return Output(request_id, finish_reason=FinishReason.ERROR, error=error)


class Batcher:
    def __init__(
        self, config: SchedulerConfig, backend: BackendConfig, pages_per_rank: int, planner: StepPlanner | None = None
    ) -> None:
        self._plans = PlanChooser(backend, config.sp_threshold, planner)
        self.placement = Placement(backend, pages_per_rank, self._plans, config.prefix_cache)
        self.prefill_time = PrefillTime()
        self.lanes = PrefillLanes(config, self.placement, self._plans, self.prefill_time)
        self.running: list[Sequence] = []
        self.counters = Counters()
        room = self.placement.capacity_in_place if self.placement.whole_prompts else self.placement.capacity
        self.max_length = min(backend.context_length, room)
        self._live: dict[str, Sequence] = {}  # waiting ones included
        self._ended: list[int] = []  # sequences whose pages have gone back: the workers are not told yet
        self._num_arrived = 0
        self._num_in_flight = 0  # steps sent and not completed
        self._turns = Turns(self.placement)
        self._short_of_pages = Ranks()  # whose streams need some, which steps in flight may return

    def add(self, request: GenerateRequest) -> None:
        assert len(request.prompt) + min(request.max_tokens, 1) <= self.max_length, "refused when submitted"
        assert request.request_id not in self._live, "request ids are unique among live requests"
        sequence = Sequence(
            id=self._num_arrived,
            request=request,
            # beyond the room that there is, generation ends as it does at max_tokens
            max_length=min(len(request.prompt) + request.max_tokens, self.max_length),
            tokens=array("i", request.prompt),
        )
        self._num_arrived += 1
        self._live[request.request_id] = sequence
        self.lanes.add(sequence)

    def abort(self, request_id: str) -> Output | None:
        """Ends a request between steps; None if it has already ended."""
        sequence = self._live.get(request_id)
        return None if sequence is None else self._finish(sequence, FinishReason.ABORT)

    def fail_all(self, error: str) -> list[Output]:
        """Ends every request; nothing can run after it, so no page goes back."""
        live, self._live = self._live, {}
        self.running.clear()
        self.lanes.clear()
        self.counters.num_finished[FinishReason.ERROR.value] += len(live)
        return [failed(request_id, error) for request_id in live]

    def take_ended(self) -> list[int]:
        """Sequences whose pages have gone back, since the last call: what workers know of them is void."""
        ended, self._ended = self._ended, []
        return ended

    def next_step(self, free: Ranks, idle: Ranks) -> PlannedStep | None:
        """The next step for ranks that can take one, with pages taken; None if there is nothing for them to do, or not
        before steps in flight are completed, or other ranks are free. idle: those that have none.
        """
        everyone = len(free) == self.placement.num_ranks
        while self._live:
            streams = [sequence for sequence in self.running if not sequence.is_complete]
            prompts_wait = bool(self.lanes)
            if prompts_wait and not self._turns.are_owed(streams):
                if not everyone:
                    return self._decode(streams, idle, False)
                draft = self.lanes.select(self.running)
                self._turns.owe()
                if draft.chunks:
                    tokens, pairs = max(draft.tokens), max(draft.pairs)
                    chunks, choices = self._plans.assign(draft.chunks)
                    return PlannedStep("prefill", chunks, tokens, pairs, draft.num_cached, choices)
            # prompts are admitted with room for all of them: without streams, who take more, one can always go on
            assert streams or self._num_in_flight or not everyone, "somebody can go on"
            if (decoded := self._decode(streams, free, prompts_wait)) or self._num_in_flight or not everyone:
                return decoded
        return None

    @property
    def has_requests(self) -> bool:
        return bool(self._live)

    def has_requests_on(self, rank: int) -> bool:
        """Whether the rank takes part in what some request is having computed."""
        live = self.running + self.lanes.prefilling
        return any(len(sequence.home) > 1 or sequence.home.start == rank for sequence in live)

    def sent(self, step: PlannedStep) -> None:
        """The step is on its way to the workers: the next is planned as if it were done."""
        self._num_in_flight += 1
        for chunk in step.chunks:
            self.placement.computed(chunk)
            if chunk.samples:
                if chunk.sequence.request.pooling is None:
                    chunk.sequence.tokens.append(UNDRAWN)
                if step.kind == "prefill":
                    self.lanes.remove(chunk.sequence)
                    self.running.append(chunk.sequence)

    def complete(self, step: PlannedStep, sampled: Mapping[int, SampledToken], seconds: float) -> list[Output]:
        """The workers have run the oldest step in flight, in `seconds`: what its requests are told."""
        self._num_in_flight -= 1
        self.counters.num_steps[step.kind] += 1
        outputs = []
        for chunk in filter(lambda chunk: chunk.is_current, step.chunks):
            if chunk.sequence.request.explain:
                self._report(step, chunk, seconds)
            if chunk.samples and chunk.sequence.request.pooling is not None:
                outputs.append(self._embedded(chunk.sequence))
            elif chunk.samples:
                outputs.append(self._advance(chunk, sampled[chunk.sequence.id]))
        return outputs

    def pool(self, step: PlannedStep, results: Iterable[StepResult]) -> None:
        """Gathers what the ranks tell of embeddings and of prompts; called before complete()."""
        sequences = {chunk.sequence.id: chunk.sequence for chunk in step.chunks if chunk.is_current}
        for part in (part for result in results for part in result.pooled):
            if part.request_id in sequences:
                sequences[part.request_id].pooled += np.frombuffer(part.states, "<f4").astype(np.float64)
        for scores in (scores for result in results for scores in result.scores):
            if (sequence := sequences.get(scores.request_id)) is not None:
                for position, logprob, top in zip(scores.positions, scores.logprobs, scores.top, strict=True):
                    if position < sequence.num_prompt:
                        token = sequence.tokens[position]
                        sequence.scores[position] = GeneratedToken(token, logprob, top)

    def _report(self, step: PlannedStep, chunk: Chunk, seconds: float) -> None:
        choice = next(choice for choice in step.choices if choice.plan == chunk.plan)
        report = StepReport(
            kind=step.kind,
            plan=choice.plan,
            reason=choice.reason,
            num_new=chunk.num_new,
            num_cached=chunk.start,
            batch_tokens=step.num_new,
            predicted_seconds=choice.seconds,
            measured_seconds=seconds,
        )
        chunk.sequence.reports.append(report)

    def _decode(self, streams: list[Sequence], free: Ranks, prompts_wait: bool) -> PlannedStep | None:
        """The next token of all streams, or of those of one rank; None if no step's ranks are free, or prompts come
        first, or pages are short and steps in flight may return some.
        """
        steps = self._turns.next(streams, free, prompts_wait)
        for ranks, own in sorted(steps, key=lambda step: not self._short_of_pages <= step[0]):
            if self._num_in_flight and not self._short_of_pages <= ranks:
                break  # the others stop, too: else those who came later would not have to give way for long
            chunks = self._next_tokens(self._turns.take(ranks, own))
            self._short_of_pages = Ranks() if chunks or not self._num_in_flight else ranks
            alone = len(ranks) < self.placement.num_ranks
            if not chunks or (alone and any(chunk.plan != LOCAL for chunk in chunks)):
                return None  # in the latter case a page is now elsewhere: they need all ranks from here on
            self._turns.taken(ranks)
            chunks, choices = self._plans.assign(chunks)
            return PlannedStep("decode", chunks, choices=choices)
        return None

    def _next_tokens(self, streams: list[Sequence]) -> list[Chunk]:
        """A chunk for each stream; none if pages are short and steps in flight may return some."""
        chunks: list[Chunk] = []
        for sequence in streams:
            # the youngest give way, so whoever has a chunk keeps it
            while sequence.node is not None:
                chunk = self.placement.next_token(sequence)
                if chunk is not None:
                    chunks.append(chunk)
                    break
                if self._num_in_flight:
                    return []
                self._retract_youngest()
        return chunks

    def _retract_youngest(self) -> None:
        youngest = max(self.running + self.lanes.prefilling, key=lambda s: s.id)
        self.counters.num_retractions += 1
        self._leave(youngest)
        self.lanes.add_first(youngest)

    def _advance(self, chunk: Chunk, sampled: SampledToken) -> Output:
        sequence, request = chunk.sequence, chunk.sequence.request
        if chunk.end == sequence.num_prompt:
            self.counters.prompt_tokens += sequence.num_prompt
            self.counters.cached_tokens += sequence.cached_tokens
            if not request.max_tokens:  # nothing but the prompt was asked for: the token drawn is dropped
                return self._finish(sequence, FinishReason.LENGTH)
        self.counters.generated_tokens += 1
        token = GeneratedToken(sampled.token, sampled.logprob, sampled.top)
        if sampled.token in request.stop_token_ids:  # banned before min_tokens
            return self._finish(sequence, FinishReason.STOP, stop_token=token)
        sequence.tokens[chunk.end] = sampled.token
        if chunk.end + 1 >= sequence.max_length:
            return self._finish(sequence, FinishReason.LENGTH, tokens=[token])
        steps = sequence.take_reports()
        prompt = sequence.take_scores()
        return Output(request.request_id, [token], cached_tokens=sequence.cached_tokens, steps=steps, prompt=prompt)

    def _embedded(self, sequence: Sequence) -> Output:
        """The end of a sequence whose prompt is all that is computed."""
        self.counters.prompt_tokens += sequence.num_prompt
        self.counters.cached_tokens += sequence.cached_tokens
        num_states = sequence.num_prompt if sequence.request.pooling == "mean" else 1
        embedding = np.asarray(sequence.pooled / num_states, np.float32)
        return msgspec.structs.replace(self._finish(sequence, FinishReason.STOP), embedding=embedding)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        tokens: list[GeneratedToken] | None = None,
        stop_token: GeneratedToken | None = None,
    ) -> Output:
        self._leave(sequence)
        del self._live[sequence.request.request_id]
        self.counters.num_finished[reason.value] += 1
        return Output(
            sequence.request.request_id,
            tokens or [],
            reason,
            stop_token,
            sequence.cached_tokens,
            steps=sequence.take_reports(),
            prompt=sequence.take_scores(),
        )

    def _leave(self, sequence: Sequence) -> None:
        """Out of the batch: its pages go back."""
        if sequence in self.running:
            self.running.remove(sequence)
        self.lanes.remove(sequence)
        if sequence.node is not None:
            self._ended.append(sequence.id)
            self.placement.release(sequence)
