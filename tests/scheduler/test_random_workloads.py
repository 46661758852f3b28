"""Random arrivals, aborts, lengths and shared prefixes on small page pools, against workers that model the memory."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from scheduler.config import SchedulerConfig
from scheduler.request import FinishReason, GenerateRequest
from sp_backend.commands import Sampling
from tests.scheduler.fake_workers import VOCAB, expected_tokens
from tests.scheduler.harness import Harness, Predicted, make_harness

NUM_REQUESTS = 40
MESHES = [(1, "tokens"), (2, "tokens"), (3, "tokens"), (4, "tokens"), (1, "heads"), (2, "heads"), (4, "heads")]


def check_pages(harness: Harness) -> None:
    """Every page is free, idle or used, and the used ones are those of live requests."""
    batcher = harness.controller.batcher
    homes = [sequence.home for sequence in batcher.running + batcher.lanes.prefilling]
    alone = [home.start for home in homes if len(home) == 1]
    assert batcher.placement.num_home == [alone.count(rank) for rank in range(batcher.placement.num_ranks)]
    pool, cache = batcher.placement.pool, batcher.placement.cache
    held: dict[tuple[int, int], int] = {}
    for sequence in batcher.running + batcher.lanes.prefilling:
        for page in zip(sequence.owners, sequence.pages, strict=True):
            held[page] = held.get(page, 0) + 1
        assert len(sequence.pages) <= -(-len(sequence.tokens) // batcher.placement.page_size)
    cached = [(node.rank, node.page) for node in cache.nodes()]
    assert len(cached) == len(set(cached))
    for page, count in held.items():
        assert pool.holders(*page) == count
    for rank in range(pool.num_ranks):
        used = sum(page[0] == rank for page in held)
        idle = sum(page[0] == rank for page in set(cached) - set(held))
        assert (pool.num_used(rank), pool.num_idle(rank)) == (used, idle)
        assert pool.num_free(rank) == pool.pages_per_rank - used - idle
    assert harness.controller.healthy() is None


def random_config(rng: random.Random) -> SchedulerConfig:
    return SchedulerConfig(
        max_running_requests=rng.choice([3, 8, 64]),
        chunked_prefill_size=rng.choice([8, 16, 64, -1]),
        max_prefill_seconds=rng.choice([0.0005, 0.004, 0.5]),
        sp_threshold=rng.choice([0, 16, 50, None, None]),
        prefix_cache=rng.random() < 0.8,
    )


def random_requests(rng: random.Random, longest: int) -> list[GenerateRequest]:
    """Some share a prefix, some end early at a stop token, some need all the memory."""
    prefixes = [[rng.randrange(VOCAB) for _ in range(n)] for n in (8, 23, 60)]
    requests = []
    for number in range(NUM_REQUESTS):
        prompt = list(rng.choice(prefixes)) if rng.random() < 0.6 else []
        prompt += [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 10, 30, 100]))]
        prompt = prompt[: longest - 12]
        sampling = Sampling(seed=rng.randrange(3), repetition_penalty=rng.choice([1.0, 1.0, 1.1]))
        stops = frozenset(rng.sample(range(VOCAB), 10)) if rng.random() < 0.3 else frozenset()
        requests.append(GenerateRequest(f"r{number}", prompt, rng.randint(0, 12), sampling, stops))
    return requests


def play(rng: random.Random, harness: Harness, requests: list[GenerateRequest], aborted: set[str]) -> None:
    waiting = list(requests)
    burst = rng.choice([0.1, 0.3, 1.0])
    for _ in range(10_000):
        if waiting and rng.random() < burst:
            harness.controller.submit(waiting.pop(0))
        if aborted and rng.random() < 0.1:
            harness.controller.abort(rng.choice(sorted(aborted)))
        if rng.random() < 0.01:
            harness.controller.flush_cache()
        worked = harness.controller.step()
        check_pages(harness)
        if not (worked or waiting):
            return
    pytest.fail("it never ended")


class AnyDegree:
    """A planner whose every answer is possible and none predictable."""

    def __init__(self, rng: random.Random, num_ranks: int) -> None:
        self.rng = rng
        self.degrees = [d for d in range(1, num_ranks + 1) if num_ranks % d == 0]

    def degree_for(self, num_new: int, num_cached: int) -> int:
        return self.rng.choice(self.degrees)

    def choose(self, batch: Sequence[tuple[int, int]], degree: int) -> Predicted:
        return Predicted("ring_pass_kv" if degree == self.degrees[-1] else f"ring_pass_kv@{degree}", "", 0.001)


@pytest.mark.parametrize("sp_size,layout", MESHES)
@pytest.mark.parametrize("seed", range(10))
def test_every_request_ends_once_with_the_tokens_of_an_unconstrained_run(
    sp_size: int, layout: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"{seed} {sp_size} {layout}")
    config = random_config(rng)
    planned = layout == "tokens" and sp_size > 1 and config.sp_threshold is None
    monkeypatch.setattr("scheduler.prefill.GROWTH_TOKENS", rng.choice([0, 0, 4, 128]))  # the less, the more retractions
    pages_per_rank = rng.choice([40 // sp_size, 80 // sp_size, 100])
    harness = make_harness(
        config,
        pages_per_rank,
        lambda tokens, pairs: (1e-4 + 1e-5 * tokens + 1e-7 * pairs) * rng.lognormvariate(0, 0.2),
        planner=AnyDegree(rng, sp_size) if planned else None,
        sp_size=sp_size,
        layout=layout,
    )
    requests = random_requests(rng, harness.controller.batcher.max_length)
    aborted = {r.request_id for r in requests if rng.random() < 0.15}
    play(rng, harness, requests, aborted)
    for request in requests:
        end, tokens = harness.ends[request.request_id], harness.tokens[request.request_id]
        expected = expected_tokens(request.prompt, request.max_tokens, request.sampling.seed)
        stop = next((i for i, token in enumerate(expected) if token in request.stop_token_ids), len(expected))
        assert tokens == expected[:stop] or (tokens == expected[: len(tokens)] and request.request_id in aborted)
        if request.request_id not in aborted:
            assert end.finish_reason is (FinishReason.STOP if stop < len(expected) else FinishReason.LENGTH)
    assert harness.controller.stats().pages_used == 0
    assert harness.controller.stats().num_running == harness.controller.stats().num_waiting == 0
