"""Log-probabilities of prompts: each token's once, whatever is cut, cached, shared, retracted or run beside it."""

from __future__ import annotations

import pytest

from scheduler.config import SchedulerConfig
from scheduler.request import FinishReason, GeneratedToken, GenerateRequest
from tests.scheduler.fake_workers import expected_tokens, score_of
from tests.scheduler.harness import Harness, make_harness

PROMPT = [7 * i % 50 for i in range(61)]


def submit(harness: Harness, name: str, prompt: list[int], max_tokens: int = 3) -> None:
    harness.controller.submit(GenerateRequest(name, prompt, max_tokens, prompt_logprobs=1))


def told(harness: Harness, name: str) -> list[GeneratedToken]:
    return harness.prompts.get(name, [])


def check(harness: Harness, name: str, prompt: list[int]) -> None:
    assert [token.token for token in told(harness, name)] == prompt[1:]
    pairs = zip(prompt, prompt[1:], strict=False)
    assert [token.logprob for token in told(harness, name)] == [score_of(before, token) for before, token in pairs]
    assert [[top.token for top in token.top] for token in told(harness, name)] == [[token] for token in prompt[1:]]


@pytest.mark.parametrize(
    "backend", [{}, {"sp_size": 2}, {"sp_size": 3}, {"sp_size": 2, "layout": "heads", "strategy": "sharded_q"}]
)
@pytest.mark.parametrize("chunk", [8, -1])
def test_of_every_token_in_order(backend: dict[str, object], chunk: int) -> None:
    harness = make_harness(SchedulerConfig(sp_threshold=8, chunked_prefill_size=chunk), **backend)
    harness.submit("before", PROMPT, 2)
    harness.run()  # what is cached of it must not be read
    for name, prompt in (("long", PROMPT), ("short", PROMPT[:3]), ("one", PROMPT[:1])):
        submit(harness, name, prompt)
    harness.submit("silent", PROMPT[5:], 3)
    harness.run()
    for name, prompt in (("long", PROMPT), ("short", PROMPT[:3]), ("one", PROMPT[:1])):
        check(harness, name, prompt)
        assert harness.tokens[name] == expected_tokens(prompt, 3)
    assert not told(harness, "silent") and harness.ends["long"].cached_tokens == 0


@pytest.mark.parametrize("sp_size", [1, 2])
def test_of_a_prompt_that_fills_the_cache_and_generates_nothing(sp_size: int) -> None:
    harness = make_harness(pages_per_rank=8, sp_size=sp_size)
    prompt = [7 * i % 50 for i in range(harness.controller.stats().capacity_tokens)]
    submit(harness, "r", prompt, max_tokens=0)
    harness.submit("behind", prompt[:9], 2)
    harness.run()
    check(harness, "r", prompt)
    assert harness.ends["r"].finish_reason is FinishReason.LENGTH and harness.tokens["r"] == []
    assert harness.tokens["behind"] == expected_tokens(prompt[:9], 2)
    stats = harness.controller.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.pages_used) == (len(prompt) + 9, 2, 0)


def test_a_retracted_request_tells_them_once() -> None:
    harness = make_harness(pages_per_rank=80)
    for n, name in enumerate(("old", "young")):
        submit(harness, name, [n] * 10, 300)
    harness.run()
    assert harness.controller.stats().num_retractions > 0
    for n, name in enumerate(("old", "young")):
        check(harness, name, [n] * 10)
        assert harness.tokens[name] == expected_tokens([n] * 10, 300)
