"""Steps are planned and sent while the one before them runs."""

from __future__ import annotations

import pytest

from scheduler.config import SchedulerConfig
from scheduler.request import FinishReason, GenerateRequest
from sp_backend.commands import UNKNOWN, Sampling, SequenceStep
from tests.scheduler.fake_workers import expected_tokens
from tests.scheduler.harness import Harness, make_harness

PROMPT = list(range(10))


def sent(harness: Harness, step: int) -> list[SequenceStep]:
    return [part for group in harness.workers.steps[step].groups for part in group.sequences]


def test_workers_always_have_the_next_step() -> None:
    """The time that a run takes is the time of its steps: none waits for the controller."""
    harness = make_harness(SchedulerConfig(chunked_prefill_size=16), seconds=lambda tokens, pairs: 0.25)
    harness.submit("r", [1] * 60, 5)
    harness.run()
    assert len(harness.workers.steps) == 8
    assert harness.workers.clock.now == 8 * 0.25
    assert harness.times["r"] == [1.0, 1.25, 1.5, 1.75, 2.0]


def test_the_next_step_leaves_before_the_tokens_of_the_last_one_do() -> None:
    """Handing tokens out costs the processor that planning needs, and workers wait for the plan."""
    harness = make_harness()
    sent: list[int] = []
    harness.receive = lambda outputs: sent.append(len(harness.workers.steps))  # type: ignore[method-assign]
    harness.submit("r", PROMPT, 4)
    harness.run()
    assert sent == [3, 4, 4, 4]


def test_a_token_that_is_being_drawn_is_filled_in_by_the_rank_that_draws_it() -> None:
    harness = make_harness()
    harness.submit("r", PROMPT, 4)
    harness.run()
    assert [part.tokens == UNKNOWN for step in range(4) for part in sent(harness, step)] == [False, True, True, True]
    assert harness.tokens["r"] == expected_tokens(PROMPT, 4)


def test_a_token_that_another_rank_needs_is_named() -> None:
    """Pages of a spread request alternate between ranks, so a page's first token was drawn elsewhere."""
    harness = make_harness(SchedulerConfig(sp_threshold=8), sp_size=2)
    harness.submit("r", [1] * 32, 40)
    harness.run()
    moved = [step for step in harness.workers.steps if step.moved]
    assert moved and all(step.moved == [0] for step in moved)
    assert all(sent(harness, harness.workers.steps.index(step))[0].start % 4 == 0 for step in moved)
    assert harness.tokens["r"] == expected_tokens([1] * 32, 40)


def test_penalties_see_the_token_of_the_step_before() -> None:
    harness = make_harness()
    harness.submit("r", PROMPT, 6, repetition_penalty=1.5)
    harness.run()  # the workers compare the context with what they have computed
    assert harness.tokens["r"] == expected_tokens(PROMPT, 6)


def test_a_grammar_sees_the_generated_tokens_alone() -> None:
    """The workers compare them with what they have computed; a long prompt does not travel with every token."""
    harness = make_harness()
    harness.submit("r", PROMPT, 6, grammar="start: /.*/")
    harness.run()
    contexts = [part.sampling.context for step in range(6) for part in sent(harness, step) if part.sampling]
    assert [len(context) // 4 for context in contexts] == [0, 1, 2, 3, 4, 5]
    assert harness.tokens["r"] == expected_tokens(PROMPT, 6)


def test_what_a_stop_token_ends_has_run_one_step_in_vain() -> None:
    harness, expected = make_harness(), expected_tokens(PROMPT, 5)
    harness.controller.submit(GenerateRequest("stops", PROMPT, 50, stop_token_ids=frozenset({expected[3]})))
    harness.submit("goes on", [5] * 10, 8)
    harness.run()
    assert harness.tokens["stops"] == expected[:3]
    assert sum(part.request_id == 0 for step in range(len(harness.workers.steps)) for part in sent(harness, step)) == 5
    assert harness.tokens["goes on"] == expected_tokens([5] * 10, 8)
    assert harness.controller.stats().pages_used == 0


def test_no_step_follows_the_last_token_of_a_request_or_of_the_context() -> None:
    harness = make_harness()
    harness.submit("one", PROMPT, 1)
    harness.run()
    assert len(harness.workers.steps) == 1
    assert harness.ends["one"].finish_reason is FinishReason.LENGTH


def test_an_abort_drops_what_is_in_flight() -> None:
    harness = make_harness()
    harness.submit("gone", PROMPT, 50)
    harness.submit("other", [7] * 10, 50)
    harness.run(6)
    harness.controller.abort("gone")
    told = len(harness.tokens["gone"])
    harness.run()
    assert harness.ends["gone"].finish_reason is FinishReason.ABORT
    assert len(harness.tokens["gone"]) in (told, told + 1)
    assert harness.tokens["other"] == expected_tokens([7] * 10, 50)


def test_nobody_gives_way_while_pages_may_come_back() -> None:
    """The old request's last step is in flight when the young one needs its pages."""
    harness = make_harness(SchedulerConfig(prefix_cache=False), pages_per_rank=20)
    for name, length in (("old", 20), ("young", 40)):
        harness.submit(name, [len(name)] * 19, length)
    harness.run()
    assert harness.controller.stats().num_retractions == 0
    assert harness.tokens["young"] == expected_tokens([5] * 19, 40)


def test_a_long_step_is_followed_by_one_that_late_arrivals_are_in() -> None:
    harness = make_harness(
        SchedulerConfig(chunked_prefill_size=512, sp_threshold=200),
        page_size=16,
        seconds=lambda tokens, pairs: 0.001 * tokens,
    )
    harness.submit("long", [1] * 8192, 1)
    harness.run(6)
    began = harness.workers.clock.now
    harness.submit("short", [2] * 100, 1)
    while "short" not in harness.ends:
        harness.run(1)
    assert harness.workers.clock.now - began == pytest.approx(2 * 0.512, abs=0.02), "the running step and its own"


def test_a_seed_gives_the_same_tokens_however_steps_overlap() -> None:
    harness = make_harness(pages_per_rank=80)
    for n in range(4):
        harness.controller.submit(GenerateRequest(f"r{n}", [n] * 10, 100, Sampling(seed=n)))
    harness.run()
    assert all(harness.tokens[f"r{n}"] == expected_tokens([n] * 10, 100, n) for n in range(4))
