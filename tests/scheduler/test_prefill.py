"""Which prompts share a prefill step, and how long streams wait for it."""

from __future__ import annotations

import random

import pytest

from scheduler.config import SchedulerConfig
from tests.scheduler.harness import Harness, make_harness


def slow(noise: float, seed: int = 0) -> object:
    """A worker of 5000 tokens a second at first, and a fifth of that after 64k tokens."""
    rng = random.Random(seed)
    return lambda tokens, pairs: (0.01 + 2e-4 * tokens + 2.5e-8 * pairs) * rng.lognormvariate(0, noise)


def stream_beside_long_prompt(sp_size: int, noise: float, length: int = 1 << 16, **config: object) -> Harness:
    harness = make_harness(
        SchedulerConfig(**config),  # type: ignore[arg-type]
        pages_per_rank=3000,
        seconds=slow(noise),  # type: ignore[arg-type]
        sp_size=sp_size,
        page_size=64,
    )
    harness.submit("stream", [1, 2, 3], 600)
    harness.run(5)
    harness.submit("long", [n % 250 for n in range(length)], 2)
    return harness


@pytest.mark.parametrize("sp_size", [1, 2, 4])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_64k_prefill_never_delays_a_stream_by_more_than_a_second(sp_size: int, noise: float) -> None:
    harness = stream_beside_long_prompt(sp_size, noise)
    harness.run()
    assert harness.ends.keys() == {"stream", "long"}
    assert harness.longest_gap("stream") < 1.0
    # and the time allowed is used: most of the steps are about as long as they may be
    steps = harness.controller.stats().num_steps["prefill"]
    ideal = (2e-4 * 2**16 + 2.5e-8 * 2**31) / sp_size / 0.5
    assert steps < 2.5 * ideal + 10


def test_the_first_prompts_ever_are_cut_small_beside_a_stream() -> None:
    harness = stream_beside_long_prompt(2, 0.0, length=4096)
    harness.run(1)
    prefill = next(step for step in harness.workers.steps[1:] if step.groups[0].sequences[0].num_new > 1)
    assert prefill.groups[0].sequences[0].num_new == 2 * 64, "one page for each rank"


def test_a_huge_cached_prefix_does_not_surprise_the_prediction() -> None:
    harness = stream_beside_long_prompt(2, 0.0)
    harness.run(10)
    prefix = [n % 250 for n in range(1 << 16)]
    harness.run()
    harness.submit("stream2", [1, 2, 3], 200)
    harness.run(3)
    harness.submit("again", [*prefix, *range(200), *range(3000)], 2)
    harness.run()
    assert harness.ends["again"].cached_tokens >= (1 << 16) - 64
    assert harness.longest_gap("stream2") < 1.0


def test_short_prompts_do_not_wait_for_a_long_one() -> None:
    harness = make_harness(
        SchedulerConfig(chunked_prefill_size=512, sp_threshold=200),
        sp_size=2,
        page_size=16,
        seconds=slow(0.0),  # type: ignore[arg-type]
    )
    harness.submit("long", [1] * 8192, 2)
    harness.run(3)
    for n in range(5):
        harness.submit(f"short{n}", [n] * 100, 1)
    harness.run(2)
    assert {f"short{n}" for n in range(2)} <= harness.ends.keys(), "half of a step is theirs"
    harness.run(3)
    assert "long" not in harness.ends and len(harness.ends) == 5


def test_short_prompts_do_not_starve_a_long_one() -> None:
    """Even when each of them takes all the time that a step may have."""
    harness = make_harness(
        SchedulerConfig(chunked_prefill_size=256, sp_threshold=200, max_prefill_seconds=0.001, prefix_cache=False),
        sp_size=2,
        page_size=16,
        seconds=slow(0.0),  # type: ignore[arg-type]
    )
    harness.submit("stream", [5], 2000)
    harness.submit("long", [1] * 600, 1)
    for n in range(400):
        harness.submit(f"short{n}", [n % 250] * 17, 1)
        harness.run(1)
        if "long" in harness.ends:
            return
    pytest.fail("the long prompt never got on")


def test_home_prompts_of_one_step_are_spread_over_the_ranks() -> None:
    harness = make_harness(SchedulerConfig(), sp_size=4, page_size=16)
    for n in range(8):
        harness.submit(f"r{n}", [n] * 40, 1)
    harness.run(1)
    step = harness.workers.steps[0]
    homes = [sequence.home for group in step.groups for sequence in group.sequences]
    assert [group.plan for group in step.groups] == ["local"]
    assert sorted(homes) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_long_and_short_prompts_share_a_step() -> None:
    harness = make_harness(SchedulerConfig(sp_threshold=64), sp_size=2, page_size=16)
    harness.submit("long", [1] * 1000, 1)
    harness.submit("short", [2] * 20, 1)
    harness.run(1)
    assert [group.plan for group in harness.workers.steps[0].groups] == ["local", "ring_pass_kv"]
    assert harness.ends.keys() == {"long", "short"}


@pytest.mark.parametrize("chunk", [8192, 320, -1])
@pytest.mark.parametrize("sp_size", [2, 3, 4])
def test_a_long_prompt_is_spread_evenly(sp_size: int, chunk: int) -> None:
    harness = make_harness(SchedulerConfig(chunked_prefill_size=chunk), sp_size=sp_size, page_size=64)
    harness.submit("long", [n % 250 for n in range(32_768)], 5)
    while not harness.tokens:
        harness.run(1)
    (sequence,) = harness.controller.batcher.running
    assert max(sequence.pages_on) <= 1.1 * len(sequence.pages) / sp_size


def test_identical_prompts_are_computed_once() -> None:
    harness = make_harness(SchedulerConfig(), page_size=16)
    for n in range(8):
        harness.submit(f"r{n}", list(range(200)), 1)
    harness.run()
    stats = harness.controller.stats()
    assert stats.cached_tokens == 7 * 192
    assert stats.num_steps["prefill"] == 2


def test_a_second_long_prompt_finds_what_the_first_has_finished() -> None:
    harness = make_harness(SchedulerConfig(chunked_prefill_size=512, sp_threshold=64), sp_size=2, page_size=16)
    prefix = [n % 250 for n in range(2048)]
    harness.submit("a", [*prefix, 1, 2, 3], 2)
    harness.run(2)
    harness.submit("b", [*prefix, 4, 5, 6], 2)
    harness.run()
    assert harness.ends["b"].cached_tokens == 2048


def test_a_long_prompt_keeps_half_of_every_step() -> None:
    harness = make_harness(
        SchedulerConfig(chunked_prefill_size=512, sp_threshold=200, prefix_cache=False), sp_size=2, page_size=16
    )
    harness.submit("long", [1] * 5120, 1)
    for n in range(21):
        for m in range(4):  # 448 tokens a step: they would leave it an eighth
            harness.submit(f"short{n}-{m}", [n, m] * 56, 1)
        harness.run(1)
    assert "long" in harness.ends and len(harness.ends) > 40


def test_many_short_prompts_do_not_delay_a_stream_either() -> None:
    harness = stream_beside_long_prompt(2, 0.1)
    for n in range(30):
        harness.submit(f"short{n}", [n] * 1500, 1)
    harness.run()
    assert len(harness.ends) == 32 and harness.longest_gap("stream") < 1.0


def test_short_prompts_go_on_side_by_side_on_their_ranks() -> None:
    harness = stream_beside_long_prompt(2, 0.0, length=1 << 13, max_prefill_seconds=0.2, sp_threshold=2048)
    harness.run(200)
    assert "long" in harness.ends and "stream" not in harness.ends
    for n in range(2):
        harness.submit(f"short{n}", [n] * 2000, 1)
    num_steps = len(harness.workers.steps)
    harness.run(2)
    prefills = [
        s.groups[0].sequences for s in harness.workers.steps[num_steps:] if s.groups[0].sequences[0].num_new > 1
    ]
    assert {sequence.home for sequence in prefills[0]} == {0, 1}
    assert all(sequence.sampling is None for sequence in prefills[0]), "neither fits into one step"


def test_long_prompts_are_first_come_first_served() -> None:
    harness = stream_beside_long_prompt(2, 0.0, length=4000, chunked_prefill_size=320)
    prompts = {"same": [n % 250 for n in range(4000)], "other": [9] * 4000, "more": [8] * 4000}
    for name, prompt in prompts.items():
        harness.submit(name, prompt, 1)
    lanes = harness.controller.batcher.lanes
    while "more" not in harness.ends:
        harness.run(1)
        assert len(lanes.long.prefilling) <= 1
    assert list(harness.ends) == ["long", "same", "other", "more"]


def test_a_chunk_smaller_than_a_page_is_refused() -> None:
    with pytest.raises(ValueError, match="less than a page of 64 tokens"):
        make_harness(SchedulerConfig(chunked_prefill_size=63), page_size=64)
