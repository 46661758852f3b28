"""Embeddings: what is pooled is exactly the prompt's tokens, whatever is cut, cached, retracted or run beside it."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from scheduler.config import SchedulerConfig
from scheduler.request import FinishReason, GenerateRequest, RequestTooLong
from sp_backend.commands import Pooling
from sp_backend.layout import Layout
from tests.scheduler.fake_workers import VOCAB, expected_tokens
from tests.scheduler.harness import Harness, make_harness
from tests.scheduler.test_random_workloads import AnyDegree, check_pages

PAGE = 4
MESHES = [(1, "tokens"), (2, "tokens"), (3, "tokens"), (4, "tokens"), (2, "heads"), (4, "heads")]


def embed(harness: Harness, name: str, prompt: list[int], pooling: Pooling) -> None:
    harness.controller.submit(GenerateRequest(name, prompt, 0, pooling=pooling))


def expected(prompt: list[int], pooling: Pooling) -> list[float]:
    """Of the fake workers' states: (token id, 1)."""
    return [float(np.float32(np.mean(prompt))) if pooling == "mean" else prompt[-1], 1.0]


def check_embedding(harness: Harness, name: str, prompt: list[int], pooling: Pooling) -> None:
    end = harness.ends[name]
    assert end.finish_reason is FinishReason.STOP and end.embedding is not None and not end.tokens
    assert end.embedding.dtype == np.float32 and end.embedding.tolist() == expected(prompt, pooling)


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(length)]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_chunks_add_up(pooling: Pooling) -> None:
    prompt = random_prompt(random.Random(0), 103)
    it = make_harness(SchedulerConfig(chunked_prefill_size=16, sp_threshold=8), sp_size=2)
    embed(it, "a", prompt, pooling)
    it.run()
    assert len(it.workers.steps) == 7
    check_embedding(it, "a", prompt, pooling)
    assert it.controller.stats().num_finished["stop"] == 1
    assert it.controller.stats().prompt_tokens == 103
    assert it.controller.stats().generated_tokens == 0


@pytest.mark.parametrize(("pooling", "cached"), [("last", 100), ("mean", 0)])
def test_a_mean_bypasses_the_prefix_cache_and_a_last_token_does_not(pooling: Pooling, cached: int) -> None:
    prompt = random_prompt(random.Random(0), 103)
    it = make_harness(SchedulerConfig(chunked_prefill_size=16, sp_threshold=8), sp_size=2)
    it.submit("generated", prompt)
    it.run()
    embed(it, "embedded", prompt, pooling)
    it.run()
    check_embedding(it, "embedded", prompt, pooling)
    assert it.ends["embedded"].cached_tokens == cached


def test_a_mean_fills_the_prefix_cache() -> None:
    prompt = random_prompt(random.Random(0), 103)
    it = make_harness(SchedulerConfig(sp_threshold=8), sp_size=2)
    embed(it, "embedded", prompt, "mean")
    it.run()
    it.submit("generated", prompt)
    it.run()
    assert it.ends["generated"].cached_tokens == 100
    assert it.tokens["generated"] == expected_tokens(prompt, 4)


def test_equal_means_share_a_step() -> None:
    """They do not wait for each other's pages, which they could not use."""
    prompt = random_prompt(random.Random(0), 20)
    it = make_harness(sp_size=1)
    for name in "abc":
        embed(it, name, prompt, "mean")
    it.run()
    assert len(it.workers.steps) == 1


def test_the_longest_that_fits_and_one_more() -> None:
    it = make_harness(pages_per_rank=5, sp_size=2)
    prompt = random_prompt(random.Random(0), 40)
    embed(it, "fits", prompt, "mean")
    it.run()
    check_embedding(it, "fits", prompt, "mean")
    with pytest.raises(RequestTooLong, match="at most 40 fit"):
        embed(it, "too long", [*prompt, 1], "mean")


@pytest.mark.parametrize(
    ("request_", "causal", "message"),
    [
        (GenerateRequest("x", [1], 3, pooling="last"), True, "max_tokens must be 0 for an embedding, not 3"),
        (GenerateRequest("x", [1], -1), True, "max_tokens must not be negative"),
        (GenerateRequest("x", [1], 1), False, "only embeddings can be made"),
        (GenerateRequest("x", [], 0, pooling="last"), True, "the prompt is empty"),
    ],
)
def test_refused(request_: GenerateRequest, causal: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_harness(causal=causal).controller.submit(request_)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_half_way_retracted_it_begins_again(pooling: Pooling, prefix_cache: bool) -> None:
    """Four streams outgrow the room that was left to them, while the embedding of 800 tokens goes 4 at a time."""
    config = SchedulerConfig(chunked_prefill_size=4, prefix_cache=prefix_cache)
    it = make_harness(config, pages_per_rank=340)
    prompts = {f"stream {i}": [i, i, i, i] for i in range(4)}
    for name, prompt in prompts.items():
        it.submit(name, prompt, 220)
    embedded = random_prompt(random.Random(0), 800)
    embed(it, "embedded", embedded, pooling)
    it.run()
    assert it.controller.stats().num_retractions == 1
    check_embedding(it, "embedded", embedded, pooling)
    assert all(it.tokens[name] == expected_tokens(prompt, 220) for name, prompt in prompts.items())


@pytest.mark.parametrize(("sp_size", "layout"), MESHES)
@pytest.mark.parametrize("seed", range(8))
def test_beside_generation_on_small_pools(
    sp_size: int, layout: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retractions, prefix hits and cut prompts change no embedding, and embeddings change no token."""
    rng = random.Random(seed)
    monkeypatch.setattr("scheduler.prefill.GROWTH_TOKENS", rng.choice([0, 4]))  # the less, the more retractions
    config = SchedulerConfig(
        max_running_requests=rng.choice([3, 8, 64]),
        chunked_prefill_size=rng.choice([8, 16, 64, -1]),
        sp_threshold=rng.choice([0, 16, 50]),
        prefix_cache=rng.random() < 0.8,
    )
    it = make_harness(config, pages_per_rank=rng.choice([30, 45]) // sp_size + 1, sp_size=sp_size, layout=layout)
    prefix = random_prompt(rng, 23)
    prompts = {f"r{i}": (prefix if rng.random() < 0.5 else []) + random_prompt(rng, 1 + i) for i in range(40)}
    kinds: dict[str, Pooling | None] = {name: rng.choice(["last", "mean", None]) for name in prompts}
    waiting = list(prompts)
    for _ in range(3000):
        if waiting and rng.random() < 0.5:
            name = waiting.pop(0)
            pooling = kinds[name]
            if pooling is None:
                it.submit(name, prompts[name], 8)
            else:
                embed(it, name, prompts[name], pooling)
        worked = it.controller.step()
        check_pages(it)
        if not (worked or waiting):
            break
    for name, prompt in prompts.items():
        pooling = kinds[name]
        if pooling is None:
            assert it.tokens[name] == expected_tokens(prompt, 8)
        else:
            check_embedding(it, name, prompt, pooling)


# Full mask


def full(pages_per_rank: int, planner: AnyDegree | None = None, **changes: object) -> Harness:
    config = SchedulerConfig(chunked_prefill_size=16, sp_threshold=8 if planner is None else None)
    return make_harness(config, pages_per_rank, planner=planner, causal=False, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("sp_size", "layout"), [*MESHES, (6, "tokens"), (10, "tokens")])
@pytest.mark.parametrize("seed", range(6))
def test_under_a_full_mask_every_prompt_is_one_chunk(sp_size: int, layout: str, seed: int) -> None:
    rng = random.Random(seed)
    planner = AnyDegree(rng, sp_size) if seed % 2 and layout == "tokens" and sp_size > 1 else None
    it = full(rng.choice([3, 4, 7]), planner, sp_size=sp_size, layout=layout)
    longest = it.controller.stats().capacity_tokens
    lengths = [rng.choice([1, 3, 9, 15, 17, 40, longest, longest - 1, longest - PAGE]) for _ in range(40)]
    prompts = {f"r{i}": random_prompt(rng, min(length, longest)) for i, length in enumerate(lengths)}
    kinds: dict[str, Pooling] = {name: rng.choice(["last", "mean"]) for name in prompts}
    waiting = list(prompts)
    for _ in range(1000):
        for name in waiting[: rng.choice([0, 1, 5])]:
            embed(it, name, prompts[name], kinds[name])
            waiting.remove(name)
        if waiting and rng.random() < 0.1:
            it.controller.abort(rng.choice(list(prompts)))
        worked = it.controller.step()
        check_pages(it)
        if not (worked or waiting):
            break
    assert len(it.ends) == len(prompts) and it.controller.stats().num_retractions == 0
    for name, prompt in prompts.items():
        if it.ends[name].finish_reason is not FinishReason.ABORT:
            assert it.ends[name].cached_tokens == 0
            check_embedding(it, name, prompt, kinds[name])


def test_short_ones_share_a_step_up_to_the_chunk_size_and_a_longer_one_is_alone() -> None:
    it = full(100)
    for name, length in (("a", 8), ("b", 8), ("c", 9), ("long", 30), ("d", 8)):
        embed(it, name, [1] * length, "mean")
    it.run()
    told = [[s.num_new for group in step.groups for s in group.sequences] for step in it.workers.steps]
    assert told == [[8, 8], [9], [30], [8]]


@pytest.mark.parametrize(
    ("seconds", "error"), [(100, None), (130, "a prefill step of 64 tokens took longer than .*120 s")]
)
def test_the_watchdog_waits_as_for_the_chunks_that_a_prompt_would_be_cut_into(seconds: int, error: str | None) -> None:
    """A client cannot end the server with a long input that other masks would allow."""
    config = SchedulerConfig(chunked_prefill_size=16, watchdog_timeout=30.0)
    it = make_harness(config, 100, seconds=lambda tokens, pairs: seconds, causal=False)
    embed(it, "long", [1] * 64, "mean")
    it.controller.step()
    failure = it.controller.healthy()
    assert failure is None if error is None else re.fullmatch(f".*{error}", str(failure))


def test_nothing_is_cached_under_a_full_mask() -> None:
    it = full(100)
    for name in ("first", "second"):
        embed(it, name, [1, 2, 3, 4] * 10, "last")
        it.run()
    assert it.ends["second"].cached_tokens == 0 and it.controller.stats().pages_cached == 0


@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize("pages", range(1, 9))
def test_the_longest_that_the_layout_can_place(num_ranks: int, pages: int) -> None:
    """A rank may be given a page more than others, so not every prompt that fits the sum of all ranks is taken."""
    longest = full(pages, sp_size=num_ranks).controller.batcher.placement.capacity_in_place
    layout = Layout(num_ranks, "zigzag", num_ranks, 1)

    def fits(num_pages: int) -> bool:
        ranks = layout.page_ranks(num_pages * PAGE, PAGE)
        return max(map(ranks.count, range(num_ranks)), default=0) <= pages

    assert longest % PAGE == 0 and all(fits(n) for n in range(longest // PAGE + 1))
    assert longest == num_ranks * pages * PAGE or not fits(longest // PAGE + 1)
