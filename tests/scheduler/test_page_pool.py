from __future__ import annotations

import random

import pytest

from scheduler.page_pool import PagePool


def test_a_rank_needs_pages() -> None:
    with pytest.raises(ValueError):
        PagePool(2, 0)


def test_a_page_is_free_used_or_idle() -> None:
    pool = PagePool(2, 3)
    (page,) = pool.take(1, 1)
    assert (pool.num_free(1), pool.num_used(1), pool.num_idle(1)) == (2, 1, 0)
    pool.cache(1, page)
    pool.hold(1, page)
    pool.release(1, page)
    assert (pool.num_free(1), pool.num_used(1), pool.num_idle(1)) == (2, 1, 0)
    pool.release(1, page)
    assert (pool.num_free(1), pool.num_used(1), pool.num_idle(1)) == (2, 0, 1)
    assert pool.available(1) == 3 and pool.total_available() == 6
    pool.hold(1, page)
    assert pool.num_used(1) == 1
    pool.release(1, page)
    pool.uncache(1, page)
    assert pool.num_free(1) == 3


def test_misuse_is_caught() -> None:
    pool = PagePool(1, 2)
    with pytest.raises(AssertionError):
        pool.take(0, 3)
    (page,) = pool.take(0, 1)
    with pytest.raises(AssertionError):
        pool.hold(0, page)  # not cached: nobody else may read it
    with pytest.raises(AssertionError):
        pool.uncache(0, page)
    pool.release(0, page)
    with pytest.raises(AssertionError):
        pool.release(0, page)
    with pytest.raises(AssertionError):
        pool.cache(0, page)


def test_pages_are_conserved_under_random_use() -> None:
    rng = random.Random(0)
    pool = PagePool(1, 8)
    held: list[int] = []
    cached: set[int] = set()
    for _ in range(5000):
        action = rng.randrange(5)
        if action == 0 and pool.num_free(0):
            held += pool.take(0, 1)
        elif action == 1 and held:
            pool.release(0, held.pop(rng.randrange(len(held))))
        elif action == 2 and set(held) - cached:
            page = rng.choice(sorted(set(held) - cached))
            pool.cache(0, page)
            cached.add(page)
        elif action == 3 and cached:
            page = rng.choice(sorted(cached))
            pool.hold(0, page)
            held.append(page)
        elif action == 4 and cached - set(held):
            page = rng.choice(sorted(cached - set(held)))
            pool.uncache(0, page)
            cached.remove(page)
        assert pool.num_used(0) == len(set(held))
        assert pool.num_idle(0) == len(cached - set(held))
        assert pool.num_free(0) == 8 - len(cached | set(held))
