"""Who hears of a step: the ranks that have a part in it, and each of what it does not know yet."""

from __future__ import annotations

from scheduler.config import SchedulerConfig
from tests.scheduler.fake_workers import expected_tokens
from tests.scheduler.harness import make_harness


def test_a_short_prompt_wakes_no_other_rank() -> None:
    harness = make_harness(sp_size=4)
    harness.submit("r", [1] * 10, 5)
    harness.run()
    assert harness.workers.ranks == [[0]] * 5


def test_all_ranks_of_a_shared_prompt_take_part() -> None:
    harness = make_harness(SchedulerConfig(sp_threshold=16), sp_size=4)
    harness.submit("shared", [1] * 32, 3)
    harness.submit("short", [2] * 10, 3)
    harness.run()
    assert all(ranks == [0, 1, 2, 3] for ranks in harness.workers.ranks)


def test_a_rank_that_was_left_out_is_told_of_all_pages_once_it_is_needed() -> None:
    """The request outgrows its rank: from then on its history is on two, and both need to know where."""
    harness = make_harness(sp_size=2, pages_per_rank=4)
    harness.submit("r", [1] * 10, 15)
    harness.run()
    alone = harness.workers.ranks.index([0, 1])
    assert harness.workers.ranks == [[0]] * alone + [[0, 1]] * (15 - alone)
    assert harness.workers.steps[alone].groups[0].plan == "decode"
    assert harness.tokens["r"] == expected_tokens([1] * 10, 15)


def test_a_rank_forgets_a_request_with_its_own_next_step() -> None:
    harness = make_harness(sp_size=2)
    harness.submit("on 0", [1] * 10, 2)
    harness.submit("on 1", [2] * 10, 4)
    harness.run()
    assert [step.release for step in harness.workers.steps] == [[]] * 5, "rank 0 had no further step"
    harness.submit("again on 0", [3] * 10, 1)
    harness.run()
    assert harness.workers.ranks[-1] == [0] and harness.workers.steps[-1].release == [0]


def test_idle_time_is_counted_between_steps_in_a_row_of_the_same_rank() -> None:
    harness = make_harness(sp_size=2)
    harness.workers.idle_seconds = 0.5
    harness.submit("on 0", [1] * 10, 3)
    harness.submit("on 1", [2] * 10, 10)
    harness.run(5)
    harness.submit("on 0 again", [3] * 10, 3)
    harness.run()
    assert [len([ranks for ranks in harness.workers.ranks if r in ranks]) for r in range(2)] == [6, 10]
    assert [rank.num_steps for rank in harness.controller.stats().per_rank] == [6, 10]
    in_a_row = 2 + 2, 9  # rank 0 had no request between the two
    assert [rank.idle_seconds for rank in harness.controller.stats().per_rank] == [n * 0.5 for n in in_a_row]
