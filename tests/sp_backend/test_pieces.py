"""Other ranks' history comes in pieces: the same attention and bytes, in rounds that a long history makes no larger."""

from collections import Counter

import pytest

from sp_backend.check import check
from sp_backend.geometry import Geometry, predicted_bytes
from sp_backend.kernels import get_kernel
from sp_backend.layout import Kind, Layout
from sp_backend.native import choose_kernel
from sp_backend.pieces import MOST_PIECES, in_pieces, moves_history, num_pieces
from sp_backend.plan import Plan
from sp_backend.strategies import STRATEGIES, plan_for, variants
from tests.lockstep import Batch, Request, error, run_lockstep

KERNEL = get_kernel(choose_kernel()[0])
CACHED = [Request(37, 61), Request(3), Request(1, 50, 1), Request(0, 5), Request(16, 3, 2)]


def moving_plans(num_ranks: int, num_heads: int = 12, num_kv_heads: int = 4) -> list[Plan]:
    """Of every variant and layout whose ranks send each other what they have cached."""
    sizes = {"num_ranks": num_ranks, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    plans = [plan_for(variant, **sizes) for variant in variants(num_ranks, num_heads)]
    others: list[tuple[str, Kind]] = [(n, k) for n, s in STRATEGIES.items() for k in s.kinds[1:]]
    plans += [plan_for(name, kind=kind, **sizes) for name, kind in others]
    plans += [plan_for("sharded_q", redundant_kv=redundant, **sizes) for redundant in (False, True)]
    return [plan for plan in plans if moves_history(plan)]


def test_which_plans_move_history() -> None:
    moving = {plan.name.partition("(")[0] for plan in moving_plans(6)}
    still = {"ring_pass_q", "token_ring", "decode", "local"}
    assert {name.partition("@")[0] for name in moving} == STRATEGIES.keys() - still


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 6])
@pytest.mark.parametrize("pieces", [2, 4, 16])
def test_a_plan_in_pieces_is_proven_and_sends_the_same_bytes_over_the_same_links(num_ranks: int, pieces: int) -> None:
    for plan in moving_plans(num_ranks):
        cut = in_pieces(plan, pieces)
        assert not check(cut).errors, plan.name
        geometry = Batch(plan.layout, CACHED, head_dim=2).geometry
        whole, parts = (
            sum(predicted_bytes(p, geometry, head_dim=2, itemsize=2), Counter[tuple[int, int]]()) for p in (plan, cut)
        )
        assert whole == parts, plan.name
        assert len(cut.rounds) == len(plan.rounds) + pieces - 1


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("paged", [False, True])
def test_attention_is_the_same_and_every_byte_predicted(num_ranks: int, paged: bool) -> None:
    for plan in moving_plans(num_ranks):
        batch = Batch(plan.layout, CACHED)
        most = 5
        pieces = num_pieces(plan.layout, batch.geometry, most)
        assert pieces > 2
        result = run_lockstep(plan, batch, kernel=KERNEL, layers=2, paged=paged, most_history=most)
        assert error(result.outs, batch.expected()) < 1e-5, plan.name
        assert result.links == predicted_bytes(in_pieces(plan, pieces), batch.geometry, batch.head_dim, 4), plan.name


@pytest.mark.parametrize("window", [6, 1000])
def test_under_a_sliding_window(window: int) -> None:
    for plan in moving_plans(3):
        batch = Batch(plan.layout, CACHED)
        outs = run_lockstep(plan, batch, kernel=KERNEL, window=window, most_history=5).outs
        assert error(outs, batch.expected(window)) < 1e-5, plan.name


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_what_comes_in_a_round_does_not_grow_with_history(num_ranks: int) -> None:
    """Beside the history: a round brings a rank its share of the new tokens, and states."""
    most, key, of_new = 50, 2 * 4 * 8 * 4, 40 * 12 * (8 + 1) * 4 * 2
    for plan in moving_plans(num_ranks):
        batch = Batch(plan.layout, [Request(40, 1500)])
        for links in run_lockstep(plan, batch, kernel=KERNEL, paged=True, most_history=most).links:
            for rank in range(num_ranks):
                assert sum(n for (_, dst), n in links.items() if dst == rank) <= most * key + of_new, plan.name


def test_pieces_are_as_few_as_the_limit_allows_and_a_power_of_two() -> None:
    layout = Layout(4, "zigzag", 8, 2)

    def pieces(*history: int) -> int:
        return num_pieces(layout, Geometry([(*[5] * 8, *history)]), 3 * 100)

    assert pieces(0, 0, 0, 0) == pieces(100, 100, 0, 7) == 1  # three others have 100 rows each
    assert pieces(0, 101, 0, 0) == pieces(200, 0, 0, 0) == 2
    assert pieces(201, 0, 0, 0) == 4
    assert pieces(10**6, 0, 0, 0) == MOST_PIECES
