"""On which ranks tokens and pages end up, as the workers are told."""

from __future__ import annotations

import pytest

from scheduler.config import SchedulerConfig
from sp_backend.commands import Step
from tests.scheduler.harness import Harness, make_harness


def steps_by_rank(harness: Harness) -> list[list[Step]]:
    seen: list[list[Step]] = []
    submit = harness.workers.submit

    def record(steps: list[Step]) -> None:
        seen.append(steps)
        submit(steps)

    harness.workers.submit = record  # type: ignore[method-assign]
    return seen


def test_each_rank_gets_its_own_pages_and_tokens_only() -> None:
    harness = make_harness(SchedulerConfig(sp_threshold=8), sp_size=2)
    seen = steps_by_rank(harness)
    harness.submit("r", list(range(32)), 2)
    harness.run()
    first, second = (step.groups[0].sequences[0] for step in seen[0])
    assert first.page_owners == second.page_owners == bytes([0, 0, 1, 1, 1, 1, 0, 0])
    assert len(first.pages) == len(second.pages) == 4 * 4
    assert len(first.tokens) == len(second.tokens) == 16 * 4
    assert first.tokens[:16] == b"".join(n.to_bytes(4, "little") for n in range(4))
    decode = [step.groups[0] for step in seen[1]]
    assert [group.plan for group in decode] == ["decode", "decode"]
    assert sorted(len(group.sequences[0].tokens) for group in decode) == [0, 4]


def test_a_short_continuation_of_a_spread_prefix_runs_the_decode_plan() -> None:
    harness = make_harness(SchedulerConfig(sp_threshold=16), sp_size=2)
    prompt = list(range(64))
    harness.submit("a", prompt, 1)
    harness.run()
    harness.submit("b", [*prompt, 1, 2, 3, 4, 5], 1)
    harness.run()
    group = harness.workers.steps[-1].groups[0]
    assert group.plan == "decode" and group.sequences[0].start == 64 and group.sequences[0].degree == 1


def test_a_hot_short_prefix_does_not_tie_everyone_to_one_rank() -> None:
    harness = make_harness(sp_size=4)
    prefix = [7] * 40
    harness.submit("first", prefix, 1)
    harness.run()
    for n in range(32):
        harness.submit(f"r{n}", [*prefix, n], 50)
    harness.run(20)
    homes = [sequence.home for sequence in harness.controller.batcher.running]
    assert len(homes) == 32 and max(homes.count(r) for r in range(4)) <= 16
    assert harness.controller.stats().cached_tokens >= 32 * 40 - 4 * 40


def test_a_home_request_stays_home() -> None:
    harness = make_harness(sp_size=2)
    for n in range(4):
        harness.submit(f"r{n}", [n] * 30, 40)
    harness.run()
    harness.submit("next turn", [*[1] * 30, *harness.tokens["r1"], 1, 2, 3], 10)
    harness.run()
    assert harness.ends["next turn"].cached_tokens > 60
    assert {group.plan for step in harness.workers.steps for group in step.groups} == {"local"}


def test_a_short_prompt_that_fits_no_rank_is_spread() -> None:
    harness = make_harness(sp_size=2, pages_per_rank=10)
    harness.submit("r", [1] * 60, 2)
    harness.run(1)
    assert harness.workers.steps[0].groups[0].plan == "ring_pass_kv"


@pytest.mark.parametrize("layout", ["tokens", "heads"])
def test_what_a_spread_request_generates_is_spread_too(layout: str) -> None:
    harness = make_harness(SchedulerConfig(sp_threshold=20), sp_size=2, layout=layout)
    harness.submit("r", [1] * 40, 401)
    harness.run(400)
    (sequence,) = harness.controller.batcher.running
    assert max(sequence.pages_on) <= 0.55 * len(sequence.pages)
