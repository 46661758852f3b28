"""Workers that model the KV memory instead of computing attention.

They keep the token id of every (rank, page, slot) and derive the next token from a request's whole visible history as
they find it there: a wrong prefix hit, a page written while shared, a lost or swapped page changes tokens or trips an
assertion. The "hidden state" of a token is (its id, 1), so that a mean tells which tokens it is of. Time is simulated.
A step is computed when it is submitted, as nothing before it can change it any more, and its results arrive when its
time has passed; the tokens that it draws are put into the next one.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sp_backend.commands import (
    Group,
    PooledStates,
    SampledToken,
    SequenceStep,
    Step,
    StepResult,
    decode_command,
    encode,
    fill_in,
)
from sp_backend.config import BackendConfig
from sp_backend.layout import History, Kind, Layout

VOCAB = 251


def backend_config(**changes: object) -> BackendConfig:
    values: dict[str, object] = {"model_path": "", "dtype": "float32", "context_length": 1 << 20, "page_size": 4}
    if changes.get("layout") == "heads":
        values["strategy"] = "sharded_q"
    return BackendConfig(**{**values, **changes})  # type: ignore[arg-type]


def next_token(history: np.ndarray, banned: list[int], seed: int) -> int:
    token = (zlib.crc32(history.astype("<i4").tobytes()) + seed) % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def expected_tokens(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    """What an unconstrained run generates."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(np.array(tokens), [], seed))
    return tokens[len(prompt) :]


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Table:
    """A request's pages as the workers were told."""

    owners: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class FakeWorkers:
    def __init__(
        self,
        config: BackendConfig,
        pages_per_rank: int,
        clock: Clock | None = None,
        seconds: Callable[[float, float], float] = lambda tokens, pairs: 0.001,
    ) -> None:
        """seconds: time of a step from the tokens and (query, key) pairs of the busiest rank."""
        self.config = config
        self.strategies = {config.strategy}  # that spread prompts may run
        self.clock = clock or Clock()
        self.steps: list[Step] = []  # what rank 0 was told
        self._seconds = seconds
        self._memory = np.full((config.sp_size, pages_per_rank, config.page_size), -1)
        self._tables: dict[int, Table] = {}
        self._results: deque[tuple[float, list[StepResult]]] = deque()  # with the time at which they arrive
        self._drawn: list[dict[int, int]] = [{} for _ in range(config.sp_size)]  # by each rank's previous step

    def submit(self, steps: list[Step]) -> None:
        assert len(self._results) < 2, "one step runs, one waits"
        assert len(steps) == self.config.sp_size
        steps = [decode_command(encode(step)) for step in steps]  # type: ignore[misc]
        self.steps.append(steps[0])
        steps = self._put_drawn_tokens_in(steps)
        for request_id in steps[0].release:
            del self._tables[request_id]
        assert all(step.release == steps[0].release for step in steps)
        sampled: list[SampledToken] = []
        pooled: list[list[PooledStates]] = [[] for _ in steps]
        tokens, pairs = np.zeros(self.config.sp_size), np.zeros(self.config.sp_size)
        assert self.config.layout == "tokens" or len(steps[0].groups) == 1
        for parts in zip(*(step.groups for step in steps), strict=True):
            for sequences in zip(*(group.sequences for group in parts), strict=True):
                sampled += self._run(parts[0], sequences)
                self._pool(sequences, pooled)
                self._count_work(sequences[0], tokens, pairs)
        seconds = self._seconds(tokens.max(), pairs.max())
        begins = max([self.clock.now, *(arrival for arrival, _ in self._results)])
        results = [
            self._result(
                steps[0].step_id,
                rank,
                sampled if rank == 0 else [],
                seconds,
                pooled[rank] if rank < self.config.sp_size else [],  # other TP ranks have the same states
            )
            for rank in range(self.config.world_size)
        ]
        self._results.append((begins + seconds, results))

    def poll(self, timeout: float) -> list[StepResult] | None:
        if not self._results or self._results[0][0] > self.clock.now + timeout:
            self.clock.now += timeout
            return None
        arrival, results = self._results.popleft()
        self.clock.now = max(self.clock.now, arrival)
        return results

    def held_pages(self) -> set[tuple[int, int]]:
        return {page for t in self._tables.values() for page in zip(t.owners, t.pages, strict=True)}

    def _put_drawn_tokens_in(self, steps: list[Step]) -> list[Step]:
        """Each rank knows what it has drawn in the step before, and what it is told with `moved`."""
        assert all(step.moved == steps[0].moved for step in steps)
        moved = {request_id: token for drawn in self._drawn for request_id, token in drawn.items()}
        moved = {request_id: moved[request_id] for request_id in steps[0].moved}
        filled = [fill_in(step, drawn | moved) for step, drawn in zip(steps, self._drawn, strict=True)]
        self._drawn = [{} for _ in steps]
        return filled

    def _run(self, group: Group, parts: tuple[SequenceStep, ...]) -> list[SampledToken]:
        first, ps = parts[0], self.config.page_size
        for part in parts:
            same = ("request_id", "start", "num_new", "home", "degree", "page_owners")
            assert all(getattr(part, name) == getattr(first, name) for name in same)
        table = self._tables.setdefault(first.request_id, Table())
        indices = [list(np.frombuffer(part.pages, "<i4")) for part in parts]
        for owner in first.page_owners:
            table.owners.append(owner)
            table.pages.append(int(indices[owner].pop(0)))
        assert not any(indices), "pages go to their owner only"
        end = first.start + first.num_new
        assert first.num_new > 0 and len(table.pages) == -(-end // ps), "a page for every token, and no more"
        self._check_plan(group.plan, first, table)
        self._write(parts, table)
        history = self._memory[table.owners, table.pages].ravel()[:end]
        if not any(part.sampling for part in parts):
            return []
        sampling = next(part.sampling for part in parts if part.sampling)
        assert sampling is not None
        if sampling.repetition_penalty != 1.0:
            assert np.array_equal(np.frombuffer(sampling.context, "<i4"), history)
        elif sampling.grammar is not None:
            generated = np.frombuffer(sampling.context, "<i4")
            assert np.array_equal(generated, history[len(history) - len(generated) :])
        else:
            assert not sampling.context
        token = next_token(history, sampling.banned, sampling.seed)
        for part, drawn in zip(parts, self._drawn, strict=True):
            if part.sampling:
                drawn[first.request_id] = token
        return [SampledToken(first.request_id, token)]

    def _pool(self, parts: tuple[SequenceStep, ...], pooled: list[list[PooledStates]]) -> None:
        """What each rank tells of an embedding's tokens that it computed."""
        for rank, part in enumerate(parts[:1] if self.config.layout == "heads" else parts):
            ids = np.frombuffer(part.tokens, "<i4")
            if part.pooling == "last":
                holds_last = self.config.layout == "heads" or self._tables[part.request_id].owners[-1] == rank
                ids = ids[-1:] if holds_last else ids[:0]
            if part.pooling is not None and len(ids):
                states = np.array([ids.sum(), len(ids)], "<f4")
                pooled[rank].append(PooledStates(part.request_id, states.tobytes()))

    def _check_plan(self, plan: str, part: SequenceStep, table: Table) -> None:
        ps, heads = self.config.page_size, self.config.layout == "heads" and self.config.sp_size > 1
        assert self.config.causal or part.start == 0, "under a full mask nothing is cached, and nothing is cut"
        new_owners = table.owners[part.start // ps :]
        if part.degree > 1:
            layout = self._layout(part.degree)
            assert plan.partition("@")[0] in self.strategies and part.start % ps == 0
            assert tuple(new_owners) == layout.page_ranks(part.num_new, ps, part.home // part.degree)
            group = range(part.home, part.home + part.degree)
            assert part.degree == self.config.sp_size or set(table.owners) <= set(group), "it sees no other history"
        else:
            assert set(new_owners) == {part.home}
            at_home = set(table.owners) == {part.home} and not heads
            assert plan == ("local" if at_home else "decode")

    def _layout(self, degree: int) -> Layout:
        kind: Kind = "heads" if self.config.layout == "heads" else "zigzag"
        history: History = "all" if degree == self.config.sp_size else "own"
        return Layout(self.config.sp_size, kind, self.config.sp_size, 1, history=history, degree=degree)

    def _write(self, parts: tuple[SequenceStep, ...], table: Table) -> None:
        ps, heads = self.config.page_size, self.config.layout == "heads" and self.config.sp_size > 1
        first = parts[0]
        given = [list(np.frombuffer(part.tokens, "<i4")) for part in parts]
        shared = [
            page
            for request_id, other in self._tables.items()
            if request_id != first.request_id
            for page in zip(other.owners, other.pages, strict=True)
        ]
        for position in range(first.start, first.start + first.num_new):
            owner, page = table.owners[position // ps], table.pages[position // ps]
            token = given[owner].pop(0)
            self._memory[owner, page, position % ps] = token
            if heads:
                assert all(given[r].pop(0) == token for r in range(len(parts)) if r != owner)
            if position % ps == 0 or position == first.start:
                assert (owner, page) not in shared, "a page that others read is never written"
        assert not any(given), "tokens go only to the ranks that compute them"

    def _count_work(self, part: SequenceStep, tokens: np.ndarray, pairs: np.ndarray) -> None:
        ranks = slice(part.home, part.home + part.degree)
        tokens[ranks] += part.num_new / part.degree
        pairs[ranks] += part.num_new * (part.start + part.num_new / 2) / part.degree

    def _result(
        self, step_id: int, rank: int, tokens: list[SampledToken], seconds: float, pooled: list[PooledStates]
    ) -> StepResult:
        return StepResult(step_id, rank, tokens, seconds, 0, 0, 0.0, pooled)
