"""Which plan a step runs, why, and what is told about it. The planner is a stand-in with a rule of its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from scheduler.request import GenerateRequest
from scheduler.stats import LastChoice
from tests.scheduler.fake_workers import expected_tokens
from tests.scheduler.harness import Harness, Predicted, make_harness


@dataclass
class Rule:
    """Under 40 tokens one rank, under 200 two, else all; pass-Q behind a cached prefix."""

    num_ranks: int
    asked: list[tuple[list[tuple[int, int]], int]] = field(default_factory=list)

    def degree_for(self, num_new: int, num_cached: int) -> int:
        return 1 if num_new < 40 else min(2, self.num_ranks) if num_new < 200 else self.num_ranks

    def choose(self, batch: Sequence[tuple[int, int]], degree: int) -> Predicted:
        self.asked.append((list(batch), degree))
        cached = sum(cached for _, cached in batch)
        name = "ring_pass_q" if cached else "ring_pass_kv"
        suffix = "" if degree == self.num_ranks else f"@{degree}"
        return Predicted(name + suffix, f"{cached} cached tokens", 0.25)


@pytest.fixture
def harness() -> Harness:
    harness = make_harness(sp_size=4, planner=Rule(4), seconds=lambda tokens, pairs: 0.5)
    harness.workers.strategies = {"ring_pass_kv", "ring_pass_q"}
    return harness


def plans(harness: Harness) -> list[set[str]]:
    return [{group.plan for group in step.groups} for step in harness.workers.steps]


def test_the_plan_is_chosen_anew_for_every_step(harness: Harness) -> None:
    prompt = list(range(1000))
    harness.submit("cold", prompt, 1)
    harness.run()
    harness.submit("warm", [*prompt, *range(500)], 1)
    harness.run()
    assert plans(harness) == [{"ring_pass_kv"}, {"ring_pass_q"}]
    rule = harness.controller.batcher._plans._planner
    assert isinstance(rule, Rule) and rule.asked == [([(1000, 0)], 4), ([(500, 1000)], 4)]


def test_prompts_of_a_group_of_ranks_run_beside_those_of_another(harness: Harness) -> None:
    for name in "ab":
        harness.submit(name, [ord(name)] * 100, 3)
    harness.run()
    (group,) = harness.workers.steps[0].groups
    assert group.plan == "ring_pass_kv@2"
    assert sorted((part.home, part.degree) for part in group.sequences) == [(0, 2), (2, 2)]
    assert all(harness.tokens[name] == expected_tokens([ord(name)] * 100, 3) for name in "ab")


def test_a_group_that_does_not_hold_the_whole_prefix_gives_way_to_all_ranks(harness: Harness) -> None:
    prompt = list(range(600))
    harness.submit("first", prompt, 1)
    harness.run()
    harness.submit("second", [*prompt, *range(100)], 1)
    harness.run()
    part = harness.workers.steps[-1].groups[0].sequences[0]
    assert (part.start, part.home, part.degree) == (600, 0, 4)


def test_a_follow_up_stays_in_the_group_that_holds_its_prefix(harness: Harness) -> None:
    prompt = [5] * 100
    harness.submit("other", [6] * 100, 1)
    harness.submit("first", prompt, 1)
    harness.run()
    home = harness.workers.steps[0].groups[0].sequences[1].home
    harness.submit("second", [*prompt, *range(100)], 1)
    harness.run()
    part = harness.workers.steps[-1].groups[0].sequences[0]
    assert (part.start, part.home, part.degree) == (100, home, 2)


@pytest.mark.parametrize(("num_new", "num_sent"), [(1000, 0), (30, 1)])
def test_a_prediction_that_chooses_nothing_waits_until_workers_have_the_step(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, num_new: int, num_sent: int
) -> None:
    sent: list[int] = []
    choose = Rule.choose

    def spy(*args: Any) -> Predicted:
        sent.append(len(harness.workers.steps))
        return choose(*args)

    monkeypatch.setattr(Rule, "choose", spy)
    harness.submit("it", [7] * num_new, 1)
    harness.run()
    assert sent == [num_sent]


def test_totals_by_plan_and_the_newest_choice(harness: Harness) -> None:
    harness.submit("long", list(range(1000)), 3)
    harness.run()
    stats = harness.controller.stats()
    ring, decode = stats.plans["ring_pass_kv"], stats.plans["decode"]
    assert (ring.num_steps, ring.num_tokens, ring.predicted_seconds, ring.measured_seconds) == (1, 1000, 0.25, 0.5)
    assert (decode.num_steps, decode.seconds, decode.predicted_seconds) == (2, 1.0, 0.0)
    assert stats.last_choice == LastChoice("ring_pass_kv", "0 cached tokens", 0.25, 0.5)


def test_a_debug_line_for_every_choice(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "scheduler")
    harness.submit("long", list(range(1000)), 1)
    harness.run()
    expected = "ring_pass_kv (0 cached tokens); predicted 250.00 ms, measured 500.00 ms"
    assert any(line.endswith(expected) for line in caplog.messages)


def test_a_request_may_ask_for_the_steps_that_it_took(harness: Harness) -> None:
    harness.controller.submit(GenerateRequest("asks", list(range(1000)), 3, explain=True))
    harness.submit("silent", [9] * 30, 3)
    harness.run()
    assert not harness.steps["silent"]
    prefill, *decode = harness.steps["asks"]
    assert (prefill.kind, prefill.plan, prefill.num_new, prefill.num_cached) == ("prefill", "ring_pass_kv", 1000, 0)
    assert (prefill.reason, prefill.predicted_seconds, prefill.measured_seconds) == ("0 cached tokens", 0.25, 0.5)
    assert [(step.kind, step.plan, step.num_cached) for step in decode] == [
        ("decode", "decode", 1000),
        ("decode", "decode", 1001),
    ]
    joined = decode[0].followed_by(decode[1])
    assert joined is not None and (joined.num_steps, joined.num_new, joined.measured_seconds) == (2, 2, 1.0)
    assert prefill.followed_by(decode[0]) is None
