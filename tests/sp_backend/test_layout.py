import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sp_backend.layout import CAUSAL, EMPTY, FULL, KINDS, KV, STATE, Block, Kind, Layout, Q

SPREAD: tuple[Kind, ...] = ("zigzag", "contiguous", "heads")


def layout(kind: Kind, num_ranks: int, **options: object) -> Layout:
    return Layout(num_ranks, kind, 2 * num_ranks, num_ranks, **options)  # type: ignore[arg-type]


def test_zigzag_gives_each_rank_an_early_and_a_late_chunk() -> None:
    lay = layout("zigzag", 3)
    assert [lay.q_of(r) for r in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert [lay.kv_of(r) for r in range(3)] == [[0, 5, 6], [1, 4, 7], [2, 3, 8]]


def test_heads_gives_every_rank_all_query_chunks_for_its_own_heads() -> None:
    lay = layout("heads", 3)
    assert [lay.q_of(r) for r in range(3)] == [[0, 1, 2]] * 3
    assert [lay.heads_of(r) for r in range(3)] == [(0, 2), (2, 4), (4, 6)]
    assert [lay.kv_of(r) for r in range(3)] == [[0, 3], [1, 4], [2, 5]]


def test_redundant_kv_puts_new_keys_everywhere_but_leaves_history_where_it_is() -> None:
    lay = layout("heads", 2, redundant_kv=True)
    assert [lay.kv_of(r) for r in range(2)] == [[0, 1, 2], [0, 1, 3]]
    assert [lay.owner(c) for c in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_every_kv_chunk_starts_on_its_owner_and_every_state_ends_once(kind: Kind, num_ranks: int) -> None:
    lay = layout(kind, num_ranks)
    starts = [b for b, r in lay.start() if b.operand == KV and r == lay.owner(b.chunk)]
    assert sorted(b.chunk for b in starts) == list(range(lay.num_chunks))
    heads = {c: [b.heads for b, _ in lay.finish() if b.chunk == c] for c in range(lay.num_new)}
    for ranges in heads.values():
        assert sorted(h for lo, hi in ranges for h in range(lo, hi)) == list(range(lay.num_heads))


def test_masks_follow_chunk_order_and_history_is_seen_by_all() -> None:
    lay = layout("zigzag", 2)
    assert [[lay.mask(q, k) for k in range(6)] for q in range(4)] == [
        [CAUSAL, EMPTY, EMPTY, EMPTY, FULL, FULL],
        [FULL, CAUSAL, EMPTY, EMPTY, FULL, FULL],
        [FULL, FULL, CAUSAL, EMPTY, FULL, FULL],
        [FULL, FULL, FULL, CAUSAL, FULL, FULL],
    ]
    both_ways = layout("contiguous", 2, causal=False)
    assert {both_ways.mask(q, k) for q in range(2) for k in range(4)} == {FULL}


def test_a_home_chunk_sees_itself_and_history() -> None:
    assert [layout("home", 2).mask(1, k) for k in range(4)] == [EMPTY, CAUSAL, FULL, FULL]
    assert [layout("home", 2, history="own").mask(1, k) for k in range(4)] == [EMPTY, CAUSAL, EMPTY, FULL]


def test_kv_heads_of_a_group_that_is_cut() -> None:
    lay = Layout(3, "heads", 12, 4)
    assert [lay.kv_heads(lay.heads_of(r)) for r in range(3)] == [(0, 2), (1, 3), (2, 4)]
    assert Layout(4, "heads", 8, 1).kv_heads((2, 4)) == (0, 1)


def test_groups_of_a_degree_are_layouts_of_their_own() -> None:
    lay = Layout(4, "zigzag", 4, 4, history="own", degree=2)
    assert [lay.q_of(r) for r in range(4)] == [[0, 3], [1, 2], [4, 7], [5, 6]]
    assert [lay.kv_of(r) for r in range(4)] == [[0, 3, 8], [1, 2, 9], [4, 7, 10], [5, 6, 11]]
    assert [lay.mask(6, k) for k in range(12)] == [EMPTY] * 4 + [FULL, FULL, CAUSAL, EMPTY] + [EMPTY] * 2 + [FULL] * 2
    assert lay.cut_pages(8, 2, group=1) == (0, 0, 0, 0, 2, 2, 2, 2)
    assert lay.page_ranks(8, 2, group=1) == (2, 3, 3, 2)
    home = Layout(4, "home", 4, 4, history="own", degree=2)  # decode: a sequence's history is on its group's ranks
    assert [home.mask(2, k) for k in range(4, 8)] == [EMPTY, EMPTY, FULL, FULL]


@given(
    kind=st.sampled_from(SPREAD),
    num_ranks=st.integers(1, 8),
    num_tokens=st.integers(0, 500),
    page_size=st.sampled_from([1, 2, 16]),
)
def test_chunks_are_cut_between_pages(kind: Kind, num_ranks: int, num_tokens: int, page_size: int) -> None:
    lay = layout(kind, num_ranks)
    rows = lay.cut_pages(num_tokens, page_size)
    assert len(rows) == lay.num_new and sum(rows) == num_tokens
    page = 0
    num_pages = -(-num_tokens // page_size)
    ranks = lay.page_ranks(num_tokens, page_size)
    assert len(ranks) == num_pages
    for chunk, n in enumerate(rows):
        last = num_pages * (chunk + 1) // lay.num_new
        assert n == min(last * page_size, num_tokens) - min(page * page_size, num_tokens)
        assert set(ranks[page:last]) <= {lay.owner(chunk)}
        page = last


def test_a_block_holds_its_parts() -> None:
    whole = Block(KV, 1, (0, 8))
    part = Block(KV, 1, (2, 4), (1, 3))
    assert whole.holds(part) and whole.overlaps(part) and not part.holds(whole)
    assert Block(KV, 1, (0, 8), (0, 2)).holds(Block(KV, 1, (0, 8), (1, 4)))
    assert not Block(KV, 1, (0, 8), (0, 2)).overlaps(Block(KV, 1, (0, 8), (1, 2)))
    assert not whole.holds(Block(Q, 1, (0, 8))) and not whole.overlaps(Block(STATE, 1, (0, 8)))


def test_sizes_that_do_not_fit_are_refused_with_those_that_do() -> None:
    message = "12 query heads cannot be divided over 5 ranks; sizes that fit: 1, 2, 3, 4, 6, 12"
    with pytest.raises(ValueError, match=re.escape(message)):
        Layout(5, "heads", 12, 4)
    with pytest.raises(ValueError, match="cannot share"):
        Layout(2, "zigzag", 12, 5)
    with pytest.raises(ValueError, match="redundant_kv needs layout heads"):
        Layout(2, "zigzag", 4, 4, redundant_kv=True)
    with pytest.raises(ValueError, match="needs layout home or a degree"):
        Layout(2, "zigzag", 4, 4, history="own")
    with pytest.raises(ValueError, match="groups of 3; degrees that fit: 1, 2, 4"):
        Layout(4, "zigzag", 4, 4, history="own", degree=3)
    with pytest.raises(ValueError, match="degree 2: history of other groups cannot be seen"):
        Layout(4, "zigzag", 4, 4, degree=2)
    with pytest.raises(ValueError, match="unknown layout"):
        Layout(2, "spiral", 4, 4)  # type: ignore[arg-type]
