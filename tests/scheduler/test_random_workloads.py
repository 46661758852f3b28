"""Random arrivals, aborts, lengths and shared prefixes on small page pools, against workers that model the memory."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.request import FinishReason, GenerateRequest, Output
from sp_backend.commands import Sampling
from tests.scheduler.fake_workers import VOCAB, Clock, FakeWorkers, backend_config, expected_tokens


@dataclass
class Server:
    """A controller on fake workers, and what its requests were told."""

    controller: Controller
    workers: FakeWorkers
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, Output] = field(default_factory=dict)

    def receive(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert output.request_id not in self.ends, "nothing after the last output"
            self.tokens.setdefault(output.request_id, []).extend(t.token for t in output.tokens)
            if output.finish_reason:
                self.ends[output.request_id] = output


def make_server(config: SchedulerConfig, pages_per_rank: int, **backend: object) -> Server:
    clock = Clock()
    resolved = backend_config(**backend)
    workers = FakeWorkers(resolved, pages_per_rank, clock)
    received: list[Server] = []
    controller = Controller(
        config, resolved, workers, pages_per_rank, lambda outputs: received[0].receive(outputs), clock=clock
    )
    received.append(Server(controller, workers))
    return received[0]


def check_pages(server: Server) -> None:
    """Every page is free, idle or used, and the used ones are those of live requests."""
    batcher = server.controller.batcher
    pool, cache = batcher.placement.pool, batcher.placement.cache
    held: dict[tuple[int, int], int] = {}
    for sequence in batcher.running + batcher.lanes.prefilling:
        for page in zip(sequence.owners, sequence.pages, strict=True):
            held[page] = held.get(page, 0) + 1
    cached = [(node.rank, node.page) for node in cache.nodes()]
    assert len(cached) == len(set(cached))
    for page, count in held.items():
        assert pool.holders(*page) == count
    for rank in range(pool.num_ranks):
        used = sum(page[0] == rank for page in held)
        idle = sum(page[0] == rank for page in set(cached) - set(held))
        assert (pool.num_used(rank), pool.num_idle(rank)) == (used, idle)
        assert pool.num_free(rank) == pool.pages_per_rank - used - idle
    assert server.controller.healthy() is None


def random_request(rng: random.Random, number: int, prefixes: list[list[int]], longest: int) -> GenerateRequest:
    prompt = list(rng.choice(prefixes)) if rng.random() < 0.6 else []
    prompt += [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 10, 30]))]
    prompt = prompt[: longest - 12]
    sampling = Sampling(seed=rng.randrange(3), repetition_penalty=rng.choice([1.0, 1.0, 1.1]))
    return GenerateRequest(f"r{number}", prompt, rng.randint(1, 12), sampling)


MESHES = [(1, "tokens"), (2, "tokens"), (3, "tokens"), (4, "tokens"), (1, "heads"), (2, "heads"), (4, "heads")]


@pytest.mark.parametrize("sp_size,layout", MESHES)
@pytest.mark.parametrize("seed", range(8))
def test_every_request_ends_once_with_the_tokens_of_an_unconstrained_run(sp_size: int, layout: str, seed: int) -> None:
    rng = random.Random(seed)
    pages_per_rank = rng.choice([40 // sp_size, 80 // sp_size, 100])
    config = SchedulerConfig(
        max_running_requests=rng.choice([3, 8, 64]),
        chunked_prefill_size=rng.choice([8, 16, 64, -1]),
        max_prefill_seconds=rng.choice([0.0005, 0.5]),
        sp_threshold=rng.choice([0, 16, 50]),
        prefix_cache=rng.random() < 0.8,
    )
    server = make_server(config, pages_per_rank, sp_size=sp_size, layout=layout)
    longest = server.controller.batcher.max_length
    prefixes = [[rng.randrange(VOCAB) for _ in range(n)] for n in (8, 23, 60)]
    requests = [random_request(rng, n, prefixes, longest) for n in range(40)]
    aborted = {r.request_id for r in requests if rng.random() < 0.15}
    waiting = list(requests)
    for _ in range(10_000):
        if waiting and rng.random() < 0.3:
            server.controller.submit(waiting.pop(0))
        if rng.random() < 0.1 and aborted:
            server.controller.abort(rng.choice(sorted(aborted)))
        if rng.random() < 0.01:
            server.controller.flush_cache()
        worked = server.controller.step()
        check_pages(server)
        if not (worked or waiting):
            break
    for request in requests:
        end = server.ends[request.request_id]
        expected = expected_tokens(request.prompt, request.max_tokens, request.sampling.seed)
        tokens = server.tokens[request.request_id]
        if end.finish_reason is FinishReason.ABORT:
            assert request.request_id in aborted and tokens == expected[: len(tokens)]
        else:
            assert end.finish_reason is FinishReason.LENGTH and tokens == expected
    pool = server.controller.batcher.placement.pool
    assert sum(map(pool.num_used, range(pool.num_ranks))) == 0
