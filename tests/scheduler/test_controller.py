"""What a request is told, and what happens when memory, workers or patience run out."""

from __future__ import annotations

import logging

import pytest

from scheduler.config import CHUNK, SchedulerConfig
from scheduler.controller import Controller
from scheduler.request import FinishReason, GeneratedToken, GenerateRequest, Output, RequestTooLong, Unavailable
from scheduler.worker_pool import WorkerFailed
from sp_backend.commands import Sampling, StepResult
from tests.scheduler.fake_workers import Clock, FakeWorkers, backend_config, expected_tokens
from tests.scheduler.harness import make_harness

PROMPT = list(range(10))


def test_a_request_gets_its_tokens_one_by_one() -> None:
    harness = make_harness()
    harness.submit("r", PROMPT, 5)
    harness.run(3)
    assert harness.tokens["r"] == expected_tokens(PROMPT, 3)
    harness.run()
    assert harness.tokens["r"] == expected_tokens(PROMPT, 5)
    assert harness.ends["r"].finish_reason is FinishReason.LENGTH


def test_a_stop_token_ends_it_and_is_not_among_the_tokens() -> None:
    harness, expected = make_harness(), expected_tokens(PROMPT, 5)
    harness.controller.submit(GenerateRequest("r", PROMPT, 5, stop_token_ids=frozenset({expected[3]})))
    harness.run()
    end = harness.ends["r"]
    assert harness.tokens["r"] == expected[:3]
    assert (end.finish_reason, end.stop_token) == (FinishReason.STOP, GeneratedToken(expected[3]))


def test_no_stop_token_is_sampled_before_min_tokens() -> None:
    harness, expected = make_harness(), expected_tokens(PROMPT, 2)
    stop = frozenset({expected[0], expected[1]})
    harness.controller.submit(GenerateRequest("r", PROMPT, 5, Sampling(banned=[3]), stop_token_ids=stop, min_tokens=2))
    harness.run()
    banned = [
        s.sampling.banned for step in harness.workers.steps for g in step.groups for s in g.sequences if s.sampling
    ]
    assert banned[:2] == [sorted({3, *stop})] * 2 and all(b == [3] for b in banned[2:])
    assert len(harness.tokens["r"]) >= 2 and not stop & set(harness.tokens["r"][:2])


def test_cached_prompt_tokens_are_reported() -> None:
    harness = make_harness()
    harness.submit("a", PROMPT, 7)
    harness.run()
    harness.submit("b", PROMPT, 1)
    harness.submit("c", PROMPT + harness.tokens["a"] + [1], 1)
    harness.submit("d", PROMPT[:8], 1)
    harness.run()
    cached = {name: end.cached_tokens for name, end in harness.ends.items()}
    assert cached == {"a": 0, "b": 8, "c": 16, "d": 4}, "whole pages, and never the last token"
    stats = harness.controller.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (10 + 10 + 18 + 8, 28)


def test_without_prefix_cache_nothing_is_kept() -> None:
    harness = make_harness(SchedulerConfig(prefix_cache=False))
    for name in "ab":
        harness.submit(name, PROMPT)
        harness.run()
    stats = harness.controller.stats()
    assert stats.cached_tokens == stats.pages_cached == stats.pages_used == 0


def test_flush_cache_empties_it() -> None:
    harness = make_harness()
    harness.submit("a", PROMPT)
    harness.run()
    assert harness.controller.stats().pages_cached == 3
    harness.controller.flush_cache()
    harness.run()
    assert harness.controller.stats().pages_cached == 0


def test_the_youngest_stream_gives_way_and_loses_nothing() -> None:
    harness = make_harness(pages_per_rank=80)
    names = ("old", "young")
    for n, name in enumerate(names):
        harness.submit(name, [n] * 10, 300)
    harness.run()
    assert harness.controller.stats().num_retractions > 0
    for n, name in enumerate(names):
        assert harness.tokens[name] == expected_tokens([n] * 10, 300)
    assert harness.times["old"][-1] < harness.times["young"][-1]
    assert harness.ends["young"].cached_tokens == 0, "what it found of its own does not count"


def test_a_retracted_request_is_the_first_to_come_back() -> None:
    harness = make_harness(pages_per_rank=80)
    for n, name in enumerate(("old", "young", "waiting")):
        harness.submit(name, [n] * 10, 300)
    harness.run()
    assert harness.controller.stats().num_retractions > 0
    assert list(harness.ends) == ["old", "young", "waiting"]


def test_a_prompt_rather_waits_than_is_retracted_soon() -> None:
    harness = make_harness(pages_per_rank=40)
    for n in range(10):
        harness.submit(f"r{n}", [n] * 20, 40)
    harness.run()
    assert harness.controller.stats().num_retractions == 0
    assert len(harness.ends) == 10


def test_a_long_prompt_is_admitted_only_with_room_for_all_of_it() -> None:
    harness = make_harness(SchedulerConfig(chunked_prefill_size=16), pages_per_rank=40)
    harness.submit("a", [1] * 120, 1)
    harness.submit("b", [2] * 60, 1)
    harness.run(3)
    assert harness.controller.stats().num_running == 1 and harness.controller.stats().num_waiting == 1
    harness.run()
    assert len(harness.ends) == 2


def test_pages_behind_a_twin_are_found_once_their_request_has_ended() -> None:
    """Two requests generate the same; the one that is slower by a page keeps its own copies."""
    harness = make_harness()
    harness.submit("a", PROMPT, 10)
    harness.submit("b", PROMPT, 40)
    harness.run(30)
    assert "a" in harness.ends and "b" not in harness.ends
    (sequence,) = harness.controller.batcher.running
    assert sequence.has_twins
    harness.run()
    harness.submit("c", [*PROMPT, *harness.tokens["b"], 1, 2, 3, 4], 1)
    harness.run()
    assert harness.ends["c"].cached_tokens == 48


def test_two_half_prefilled_prompts_do_not_block_each_other() -> None:
    harness = make_harness(SchedulerConfig(chunked_prefill_size=16, prefix_cache=False), pages_per_rank=16, sp_size=2)
    for n in range(3):
        harness.submit(f"r{n}", [n] * 110, 10)
    harness.run()
    assert [harness.tokens[f"r{n}"] for n in range(3)] == [expected_tokens([n] * 110, 10) for n in range(3)]


def test_who_waits_for_pages_is_not_overtaken_for_ever() -> None:
    harness = make_harness(SchedulerConfig(sp_threshold=30, prefix_cache=False), pages_per_rank=20)
    harness.submit("small0", [1] * 8, 20)
    harness.run(1)
    harness.submit("big", [2] * 70, 2)
    for n in range(1, 200):
        harness.submit(f"small{n}", [n % 250] * 8, 20)
        harness.run(1)
        if "big" in harness.ends:
            return
    pytest.fail("the big request starved")


@pytest.mark.parametrize("sp_size,layout", [(1, "tokens"), (2, "tokens"), (4, "tokens"), (2, "heads")])
def test_a_request_may_fill_the_whole_cache(sp_size: int, layout: str) -> None:
    harness = make_harness(pages_per_rank=8, sp_size=sp_size, layout=layout)
    capacity = harness.controller.stats().capacity_tokens
    assert capacity == 8 * 4 * sp_size
    prompt = list(range(capacity - 20))
    harness.submit("fits", prompt, 20)
    harness.submit("more than fits", prompt, 1000)
    harness.run()
    assert harness.tokens["fits"] == harness.tokens["more than fits"] == expected_tokens(prompt, 20)
    assert harness.ends["more than fits"].finish_reason is FinishReason.LENGTH
    with pytest.raises(RequestTooLong, match="at most 31 fit in the KV cache|at most 63|at most 127") as refused:
        harness.submit("too long", [0] * capacity, 1)
    assert (refused.value.needs, refused.value.fits) == (capacity, capacity - 1)


def test_beyond_the_context_a_request_is_refused() -> None:
    harness = make_harness(context_length=50)
    harness.submit("fits", [0] * 40, 10)
    with pytest.raises(RequestTooLong, match="exceed the context length of 50"):
        harness.submit("long", [0] * 40, 11)
    for prompt, max_tokens in (([], 1), ([1], -1)):
        with pytest.raises(ValueError):
            harness.submit("malformed", prompt, max_tokens)


def test_an_abort_during_prefill_frees_the_pages_after_the_chunk() -> None:
    harness = make_harness(SchedulerConfig(chunked_prefill_size=64, prefix_cache=False), sp_size=2)
    harness.submit("r", [1] * 1000)
    harness.run(2)
    assert harness.controller.stats().pages_used == 48, "two chunks are done, one is on its way"
    harness.controller.abort("r")
    harness.run()
    assert harness.controller.stats().pages_used == 0
    assert harness.ends["r"].finish_reason is FinishReason.ABORT and harness.tokens["r"] == []
    harness.submit("next", PROMPT, 1)
    harness.run()
    assert harness.workers.steps[-1].release == [0], "the workers forget it with the next step"


def test_an_abort_that_comes_while_requests_are_taken_in_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = make_harness()
    inbox = harness.controller._inbox
    next_request, late = inbox.next_request, ["late"]

    def then_another_comes_and_goes() -> GenerateRequest | None:
        request = next_request()
        if request is None and late:
            harness.submit(late[0], [1, 2, 3], max_tokens=50)
            harness.controller.abort(late.pop())
        return request

    monkeypatch.setattr(inbox, "next_request", then_another_comes_and_goes)
    harness.submit("r", [1, 2, 3])
    harness.run()
    assert {name: end.finish_reason for name, end in harness.ends.items()} == {
        "r": FinishReason.LENGTH,
        "late": FinishReason.ABORT,
    }


def test_tp_ranks_mirror_their_sp_rank() -> None:
    harness = make_harness(sp_size=2, tp_size=2)
    harness.submit("r", PROMPT)
    harness.run()
    ranks = harness.controller.stats().per_rank
    assert [(r.rank, r.tp_rank, r.sp_rank) for r in ranks] == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)]


class FailingWorkers(FakeWorkers):
    """Dies in its fourth step, hangs in it, or forgets a token."""

    def __init__(self, how: str) -> None:
        super().__init__(backend_config(), 100, Clock())
        self._how = how

    def poll(self, timeout: float) -> list[StepResult] | None:
        if len(self.steps) - len(self._results) < 3:
            return super().poll(timeout)
        if self._how == "dies":
            raise WorkerFailed("worker 0 was killed by signal 9")
        if self._how == "hangs":
            self.clock.now += timeout
            return None
        return [StepResult(4, 0, [], 0.0, 0, 0, 0.0)]


@pytest.mark.parametrize(
    "how,why",
    [
        ("dies", "worker 0 was killed by signal 9"),
        ("hangs", "a decode step of 2 tokens took longer than the watchdog's 30 s"),
        ("forgets", "the controller failed: KeyError(0)"),
    ],
)
def test_a_failure_ends_every_request(how: str, why: str) -> None:
    outputs: list[Output] = []
    workers = FailingWorkers(how)
    config = SchedulerConfig(watchdog_timeout=30.0, max_running_requests=2)
    controller = Controller(config, workers.config, workers, 100, outputs.extend, clock=workers.clock)
    for n in range(4):
        controller.submit(GenerateRequest(f"r{n}", PROMPT, 50))
    for _ in range(6):
        controller.step()
    ends = [output for output in outputs if output.finish_reason]
    assert sorted(end.request_id for end in ends) == ["r0", "r1", "r2", "r3"]
    assert all((end.finish_reason, end.error) == (FinishReason.ERROR, why) for end in ends)
    assert controller.healthy() == why
    assert controller.stats().num_running == controller.stats().num_waiting == 0
    with pytest.raises(Unavailable, match="."):
        controller.submit(GenerateRequest("late", PROMPT, 1))


@pytest.mark.parametrize(("seconds", "is_late"), [(55.0, False), (65.0, True)])
def test_the_watchdog_gives_an_uncut_prompt_the_time_of_its_chunks(seconds: float, is_late: bool) -> None:
    """Without a chunk size a client could end the server with a long prompt."""
    config = SchedulerConfig(chunked_prefill_size=-1, watchdog_timeout=30.0)
    harness = make_harness(config, pages_per_rank=4000, seconds=lambda tokens, pairs: seconds)
    harness.submit("r", [1] * 2 * CHUNK, 1)
    harness.controller.step()
    assert (harness.controller.healthy() is not None) == is_late


def test_log_lines_read_like_sglang(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "scheduler")
    harness = make_harness(SchedulerConfig(decode_log_interval=10), seconds=lambda tokens, pairs: 0.1)
    for n in range(2):
        harness.submit(f"r{n}", [n] * 10, 12)
    harness.run()
    assert harness.workers.clock.now == pytest.approx(1.2)
    harness.submit("next", [9] * 10, 1)
    harness.run()
    first, decode, second = [record.message for record in caplog.records]
    assert first == (
        "Prefill batch, #new-seq: 2, #new-token: 20, #cached-token: 0, token usage: 0.01, #running-req: 2, "
        "#queue-req: 0, input throughput (token/s): 0.00"
    )
    assert decode.startswith("Decode batch, #running-req: 2, #token: ") and "gen throughput (token/s): " in decode
    assert second.endswith(f"input throughput (token/s): {20 / 1.2:.2f}")


def test_streams_on_one_prefix_take_turns_rather_than_read_more_than_the_cache_holds() -> None:
    """Eight streams share 40 of 64 pages: read for all of them at once, they would be 320."""
    harness = make_harness(pages_per_rank=64, page_size=4)
    prefix = list(range(160))
    harness.submit("first", prefix, 1)
    harness.run()
    for i in range(8):
        harness.submit(f"r{i}", [*prefix, 1000 + i], 6)
    harness.run()
    assert all(harness.tokens[f"r{i}"] == expected_tokens([*prefix, 1000 + i], 6) for i in range(8))
    for step in harness.workers.steps:
        assert sum(s.start for group in step.groups for s in group.sequences) <= 64 * 4


def test_without_a_prefix_cache_equal_prompts_do_not_wait_for_each_other() -> None:
    harness = make_harness(SchedulerConfig(prefix_cache=False))
    for i in range(8):
        harness.submit(f"r{i}", list(range(100)), 2)
    harness.run()
    assert len(harness.workers.steps) == 2


def test_an_idle_controller_does_not_die_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = make_harness()

    def poll(timeout: float) -> list[StepResult] | None:
        raise AssertionError("unexpected report")

    monkeypatch.setattr(harness.workers, "poll", poll)
    harness.controller._look_after_workers()
    assert "unexpected report" in (harness.controller.healthy() or "")
