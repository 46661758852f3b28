"""Ranks whose streams need no other rank decode at their own pace."""

from __future__ import annotations

import pytest

from scheduler.config import SchedulerConfig
from tests.scheduler.fake_workers import expected_tokens
from tests.scheduler.harness import Harness, make_harness


def two_homes(**config: object) -> Harness:
    """A stream of 400 tokens on rank 0, whose steps take ten times as long as those of one of 10 on rank 1."""
    harness = make_harness(
        SchedulerConfig(sp_threshold=1000, **config),  # type: ignore[arg-type]
        seconds=lambda tokens, pairs: 0.010 if pairs > 300 else 0.001,
        sp_size=2,
    )
    harness.submit("slow", [1] * 400, 20)
    harness.submit("fast", [2] * 10, 100)
    return harness


def test_a_slow_rank_holds_up_nobody_else() -> None:
    harness = two_homes()
    harness.run()
    for name, prompt, count in ("slow", [1] * 400, 20), ("fast", [2] * 10, 100):
        assert harness.tokens[name] == expected_tokens(prompt, count)
    assert harness.longest_gap("fast") == pytest.approx(0.001)
    assert harness.longest_gap("slow") == pytest.approx(0.010)


def test_a_short_prompt_on_one_rank_leaves_the_others_to_their_streams() -> None:
    harness = two_homes()
    harness.submit("busy", [4] * 10, 100)
    harness.run(30)
    harness.submit("prompt", [3] * 30, 1)  # 450 pairs: as slow as a step of the slow stream
    harness.run()
    prompt = next(i for i in range(len(harness.workers.steps)) if _requests(harness, i) == [3])
    assert harness.workers.ranks[prompt] == [0], "where fewer streams are"
    assert harness.longest_gap("fast") <= 0.001 + 1e-9


def _requests(harness: Harness, step: int) -> list[int]:
    return [part.request_id for group in harness.workers.steps[step].groups for part in group.sequences]


def test_a_prompt_waits_for_no_more_than_what_the_ranks_have() -> None:
    harness = two_homes()
    harness.run(60)
    began = harness.workers.clock.now
    harness.submit("prompt", [3] * 10, 1)
    while "prompt" not in harness.ends:
        harness.run(1)
    assert harness.workers.clock.now - began < 2.5 * 0.010, "two steps of the slow rank and its own"


def test_one_stream_on_several_ranks_takes_all_along() -> None:
    """Weights are read once for all streams rather than once for each kind."""
    harness = make_harness(SchedulerConfig(sp_threshold=32), sp_size=2)
    harness.submit("own", [1] * 10, 30)
    harness.submit("spread", [2] * 64, 10)
    harness.run()
    decodes = [i for i in range(len(harness.workers.steps)) if all(n == 1 for n in _sizes(harness, i))]
    together = [i for i in decodes if 1 in _requests(harness, i)]
    assert len(together) == 9 and all(_requests(harness, i) == [0, 1] for i in together)
    assert all(harness.workers.ranks[i] == [0, 1] for i in together)
    assert all(harness.workers.ranks[i] == [0] for i in decodes if i not in together)
    assert harness.tokens["own"] == expected_tokens([1] * 10, 30)


def _sizes(harness: Harness, step: int) -> list[int]:
    return [part.num_new for group in harness.workers.steps[step].groups for part in group.sequences]


def test_prompts_and_streams_alternate_on_every_rank() -> None:
    harness = make_harness(SchedulerConfig(chunked_prefill_size=8, sp_threshold=1000), sp_size=2)
    for n in range(2):
        harness.submit(f"stream {n}", [n] * 4, 60)
    harness.run(4)
    for n in range(8):
        harness.submit(f"prompt {n}", [10 + n] * 16, 1)
    harness.run(24)
    kinds = [(tuple(harness.workers.ranks[i]), max(_sizes(harness, i)) > 1) for i in range(len(harness.workers.steps))]
    begin = next(i for i, (_, is_prefill) in enumerate(kinds) if is_prefill and i)
    prefills = [i for i, (_, is_prefill) in enumerate(kinds) if is_prefill and i >= begin]
    assert len(prefills) > 4
    for first, second in zip(prefills, prefills[1:], strict=False):
        tokens = [sum((rank,) == ranks for ranks, _ in kinds[first + 1 : second]) for rank in range(2)]
        assert all(tokens[rank] == 1 for rank in kinds[first][0]), "what prefills then decodes once"
        assert min(tokens) == 1, "and who did not, as often as it can"


def test_where_pages_are_short_all_ranks_stop_until_somebody_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on rank 0 could go on for another 14 tokens, but who came later than the one on rank 1 has to make room."""
    monkeypatch.setattr("scheduler.prefill.GROWTH_TOKENS", 0)
    config = SchedulerConfig(prefix_cache=False, sp_threshold=1000)
    harness = make_harness(config, pages_per_rank=4, page_size=16, sp_size=2)
    prompts = {"first": [1] * 17, "on rank 1": [2] * 63, "last": [3] * 17}
    for name, prompt in prompts.items():
        harness.submit(name, prompt, 20)
    harness.run()
    assert harness.workers.ranks[0] == [0, 1] and harness.controller.stats().num_retractions > 0
    assert harness.longest_gap("on rank 1") <= 0.004
    for name, prompt in prompts.items():
        assert harness.tokens[name] == expected_tokens(prompt, 20)
