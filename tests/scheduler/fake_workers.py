"""Workers that model the KV memory instead of computing attention.

They keep the token id of every (rank, page, slot) and derive the next token from a request's whole visible history as
they find it there: a wrong prefix hit, a page written while shared, a lost or swapped page changes tokens or trips an
assertion. The "hidden state" of a token is (its id, 1), so that a mean tells which tokens it is of. Time is simulated.
A step is computed when it is submitted, as nothing before it can change it any more, and its results arrive when its
time has passed; the tokens that it draws are put into the next one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sp_backend.commands import (
    Group,
    PooledStates,
    SampledToken,
    Scores,
    SequenceStep,
    Step,
    StepResult,
    TokenLogprob,
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


def score_of(before: int, token: int) -> float:
    """The log-probability of a prompt token."""
    return -float(VOCAB * before + token)


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
    """A request's pages as one rank was told: the owners of all, the indices of its own."""

    owners: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)


class FakeWorkers:
    """A rank takes its steps in order, as soon as all that take part in the first of them have done theirs before."""

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
        self.steps: list[Step] = []  # with every sequence once, as the first rank was told that has a part in it
        self.ranks: list[list[int]] = []  # that took part in each
        self.idle_seconds = 0.0  # that each worker tells
        self._seconds = seconds
        self._memory = np.full((config.sp_size, pages_per_rank, config.page_size), -1)
        self._tables: list[dict[int, Table]] = [{} for _ in range(config.sp_size)]
        self._results: list[tuple[float, list[StepResult]]] = []  # with the time at which they arrive, sorted
        self._free_at = [0.0] * config.sp_size  # when each rank has done all that it has
        self._drawn: list[dict[int, int]] = [{} for _ in range(config.sp_size)]  # by each rank in its last step

    def submit(self, steps: list[Step | None]) -> None:
        assert len(steps) == self.config.sp_size
        told: dict[int, Step] = {r: decode_command(encode(step)) for r, step in enumerate(steps) if step}  # type: ignore[misc]
        assert all(len(self._arrivals(rank)) < 2 for rank in told), "one step runs, one waits"
        self.ranks.append(list(told))
        self.steps.append(_joined(told))
        for rank, step in told.items():
            for request_id in step.release:
                del self._tables[rank][request_id]
                self._drawn[rank].pop(request_id, None)
        told = self._put_drawn_tokens_in(told)
        sampled: list[SampledToken] = []
        pooled: list[list[PooledStates]] = [[] for _ in steps]
        scores: list[list[Scores]] = [[] for _ in steps]
        tokens, pairs = np.zeros(self.config.sp_size), np.zeros(self.config.sp_size)
        assert self.config.layout == "tokens" or len(self.steps[-1].groups) == 1
        for group in self.steps[-1].groups:
            for sequence in group.sequences:
                parts = _parts(told, group.plan, sequence.request_id)
                assert list(parts) == ([sequence.home] if group.plan == "local" else list(range(self.config.sp_size)))
                sampled += self._run(group.plan, parts)
                self._pool(parts, pooled)
                self._score(parts, scores)
                self._count_work(sequence, tokens, pairs)
        seconds = self._run_for(list(told), tokens, pairs)
        ranks = [rank for rank in range(self.config.world_size) if rank % self.config.sp_size in told]
        results = [
            self._result(
                self.steps[-1].step_id,
                rank,
                sampled if rank == ranks[0] else [],
                seconds,
                pooled[rank] if rank < self.config.sp_size else [],  # other TP ranks have the same states
                scores[rank] if rank < self.config.sp_size else [],
            )
            for rank in ranks
        ]
        # told together, and in order: a rank that is done waits for the others, and so do its next results
        arrivals = [self._free_at[rank] for rank in told] + [a for rank in told for a in self._arrivals(rank)]
        self._results.append((max(arrivals), results))
        self._results.sort(key=lambda result: result[0])

    def poll(self, timeout: float) -> list[StepResult] | None:
        if not self._results or self._results[0][0] > self.clock.now + timeout:
            self.clock.now += timeout
            return None
        arrival, results = self._results.pop(0)
        self.clock.now = max(self.clock.now, arrival)
        return results

    def _run_for(self, ranks: list[int], tokens: np.ndarray, pairs: np.ndarray) -> float:
        """Seconds of the slowest. All wait for each other, unless every sequence is some rank's own."""
        alone = all(group.plan == "local" for group in self.steps[-1].groups)
        begin = max([self.clock.now, *(self._free_at[rank] for rank in ranks)])
        longest = self._seconds(tokens.max(), pairs.max())
        for rank in ranks:
            seconds = self._seconds(tokens[rank], pairs[rank]) if alone else longest
            self._free_at[rank] = (max(self.clock.now, self._free_at[rank]) if alone else begin) + seconds
        return longest

    def _arrivals(self, rank: int) -> list[float]:
        """Of the results of steps that a rank has not done."""
        return [arrival for arrival, results in self._results if any(result.rank == rank for result in results)]

    def _put_drawn_tokens_in(self, steps: dict[int, Step]) -> dict[int, Step]:
        """Each rank knows what it has drawn in its last step, and what it is told with `moved`."""
        first = next(iter(steps.values()))
        assert all(step.moved == first.moved for step in steps.values())
        assert not first.moved or len(steps) == self.config.sp_size, "all ranks tell each other what moves"
        moved: dict[int, int] = {}
        for request_id in first.moved:
            (moved[request_id],) = (drawn[request_id] for drawn in self._drawn if request_id in drawn)
        filled = {rank: fill_in(step, self._drawn[rank] | moved) for rank, step in steps.items()}
        for rank in steps:
            self._drawn[rank] = {}
        return filled

    def _run(self, plan: str, parts: dict[int, SequenceStep]) -> list[SampledToken]:
        first, ps = next(iter(parts.values())), self.config.page_size
        end = first.start + first.num_new
        for rank, part in parts.items():
            same = ("request_id", "start", "num_new", "home", "degree")
            assert all(getattr(part, name) == getattr(first, name) for name in same)
            table = self._tables[rank].setdefault(first.request_id, Table())
            table.owners += part.page_owners
            table.own += np.frombuffer(part.pages, "<i4").tolist()
            assert table.owners.count(rank) == len(table.own), "pages go to their owner only"
            assert len(table.owners) == -(-end // ps), "a page for every token, and no more"
        owners = self._tables[next(iter(parts))][first.request_id].owners
        assert all(self._tables[rank][first.request_id].owners == owners for rank in parts)
        assert first.num_new > 0
        self._check_plan(plan, first, owners)
        pages = self._pages(first.request_id, owners)
        self._write(parts, owners, pages)
        history = self._memory[owners, pages].ravel()[:end]
        if not any(part.sampling for part in parts.values()):
            return []
        sampling = next(part.sampling for part in parts.values() if part.sampling)
        assert sampling is not None
        if sampling.repetition_penalty != 1.0:
            assert np.array_equal(np.frombuffer(sampling.context, "<i4"), history)
        elif sampling.grammar is not None:
            generated = np.frombuffer(sampling.context, "<i4")
            assert np.array_equal(generated, history[len(history) - len(generated) :])
        else:
            assert not sampling.context
        token = next_token(history, sampling.banned, sampling.seed)
        for rank, part in parts.items():
            if part.sampling:
                self._drawn[rank][first.request_id] = token
        return [SampledToken(first.request_id, token)]

    def _pages(self, request_id: int, owners: list[int]) -> list[int]:
        """Their indices, each on the rank that owns it."""
        own = {rank: iter(self._tables[rank][request_id].own) for rank in set(owners)}
        return [next(own[rank]) for rank in owners]

    def _pool(self, parts: dict[int, SequenceStep], pooled: list[list[PooledStates]]) -> None:
        """What each rank tells of an embedding's tokens that it computed."""
        for rank, part in list(parts.items())[: 1 if self.config.layout == "heads" else None]:
            ids = np.frombuffer(part.tokens, "<i4")
            if part.pooling == "last":
                holds_last = self.config.layout == "heads" or self._tables[rank][part.request_id].owners[-1] == rank
                ids = ids[-1:] if holds_last else ids[:0]
            if part.pooling is not None and len(ids):
                states = np.array([ids.sum(), len(ids)], "<f4")
                pooled[rank].append(PooledStates(part.request_id, states.tobytes()))

    def _score(self, parts: dict[int, SequenceStep], scores: list[list[Scores]]) -> None:
        """What each rank tells of the prompt tokens that follow its own."""
        for rank, part in list(parts.items())[:1] if self.config.layout == "heads" else parts.items():
            if part.scoring is None:
                continue
            table, ids = self._tables[rank][part.request_id], np.frombuffer(part.tokens, "<i4").tolist()
            at = [p for p in range(part.start, part.start + part.num_new) if self._computes(rank, part, table, p)]
            targets = np.frombuffer(part.scoring.targets, "<i4").tolist()
            logprobs = [score_of(before, token) for before, token in zip(ids, targets, strict=True)]
            tops = [[TokenLogprob(token, 0.0)] * part.scoring.num_top for token in targets]
            scores[rank].append(Scores(part.request_id, [position + 1 for position in at], logprobs, tops))

    def _computes(self, rank: int, part: SequenceStep, table: Table, position: int) -> bool:
        return self.config.layout == "heads" or table.owners[position // self.config.page_size] == rank

    def _check_plan(self, plan: str, part: SequenceStep, owners: list[int]) -> None:
        ps, heads = self.config.page_size, self.config.layout == "heads" and self.config.sp_size > 1
        assert self.config.causal or part.start == 0, "under a full mask nothing is cached, and nothing is cut"
        new_owners = owners[part.start // ps :]
        if part.degree > 1:
            layout = self._layout(part.degree)
            assert plan.partition("@")[0] in self.strategies and part.start % ps == 0
            assert tuple(new_owners) == layout.page_ranks(part.num_new, ps, part.home // part.degree)
            group = range(part.home, part.home + part.degree)
            assert part.degree == self.config.sp_size or set(owners) <= set(group), "it sees no other history"
        else:
            assert set(new_owners) == {part.home}
            at_home = set(owners) == {part.home} and not heads
            assert plan == ("local" if at_home else "decode")

    def _layout(self, degree: int) -> Layout:
        kind: Kind = "heads" if self.config.layout == "heads" else "zigzag"
        history: History = "all" if degree == self.config.sp_size else "own"
        return Layout(self.config.sp_size, kind, self.config.sp_size, 1, history=history, degree=degree)

    def _write(self, parts: dict[int, SequenceStep], owners: list[int], pages: list[int]) -> None:
        ps, heads = self.config.page_size, self.config.layout == "heads" and self.config.sp_size > 1
        first = next(iter(parts.values()))
        given = {rank: list(np.frombuffer(part.tokens, "<i4")) for rank, part in parts.items()}
        shared = [
            (rank, page)
            for rank in parts
            for request_id, other in self._tables[rank].items()
            if request_id != first.request_id
            for page in other.own
        ]
        for position in range(first.start, first.start + first.num_new):
            owner, page = owners[position // ps], pages[position // ps]
            token = given[owner].pop(0)
            self._memory[owner, page, position % ps] = token
            if heads:
                assert all(given[r].pop(0) == token for r in parts if r != owner)
            if position % ps == 0 or position == first.start:
                assert (owner, page) not in shared, "a page that others read is never written"
        assert not any(given.values()), "tokens go only to the ranks that compute them"

    def _count_work(self, part: SequenceStep, tokens: np.ndarray, pairs: np.ndarray) -> None:
        ranks = slice(part.home, part.home + part.degree)
        tokens[ranks] += part.num_new / part.degree
        pairs[ranks] += part.num_new * (part.start + part.num_new / 2) / part.degree

    def _result(
        self,
        step_id: int,
        rank: int,
        tokens: list[SampledToken],
        seconds: float,
        pooled: list[PooledStates],
        scores: list[Scores],
    ) -> StepResult:
        return StepResult(step_id, rank, tokens, seconds, 0, 0, 0.0, pooled, self.idle_seconds, scores)


def _joined(steps: dict[int, Step]) -> Step:
    """Every sequence once."""
    first = next(iter(steps.values()))
    plans: dict[str, dict[int, SequenceStep]] = {}
    for step in steps.values():
        for group in step.groups:
            for part in group.sequences:
                plans.setdefault(group.plan, {}).setdefault(part.request_id, part)
    return Step(
        first.step_id, [Group(plan, list(parts.values())) for plan, parts in plans.items()], first.release, first.moved
    )


def _parts(steps: dict[int, Step], plan: str, request_id: int) -> dict[int, SequenceStep]:
    """A sequence as each rank is told of it."""
    return {
        rank: part
        for rank, step in steps.items()
        for group in step.groups
        for part in group.sequences
        if group.plan == plan and part.request_id == request_id
    }
