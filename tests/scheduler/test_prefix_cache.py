from __future__ import annotations

from array import array

from scheduler.page_pool import PagePool
from scheduler.prefix_cache import Node, PrefixCache

PAGE_SIZE = 2


def make_cache(num_ranks: int = 1, pages_per_rank: int = 8) -> tuple[PagePool, PrefixCache]:
    pool = PagePool(num_ranks, pages_per_rank)
    return pool, PrefixCache(pool, PAGE_SIZE)


def tokens_of(text: str) -> array[int]:
    return array("i", list(text.encode()))


def add(cache: PrefixCache, pool: PagePool, text: str, ranks: list[int], root: int = 0) -> list[tuple[int, int]]:
    """A request computes `text` on pages of the given ranks and ends."""
    for rank in set(ranks):
        cache.make_room(rank, ranks.count(rank))
    pages = [(rank, pool.take(rank, 1)[0]) for rank in ranks]
    cache.insert(cache.roots[root], tokens_of(text), 0, pages, past_twins=True)
    for rank, page in pages:
        pool.release(rank, page)
    return pages


def found(cache: PrefixCache, text: str, root: int = 0, most: int = 99) -> list[tuple[int, int]]:
    return [(node.rank, node.page) for node in path_of(cache, text, root, most)]


def path_of(cache: PrefixCache, text: str, root: int = 0, most: int = 99) -> list[Node]:
    return cache.match(cache.roots[root], tokens_of(text), most)


def test_the_longest_prefix_of_full_pages_is_found() -> None:
    pool, cache = make_cache(num_ranks=2)
    pages = add(cache, pool, "abcdef", [0, 1, 0])
    assert found(cache, "abcdef") == pages
    assert found(cache, "abcdeX") == pages[:2]
    assert found(cache, "abXdef") == pages[:1]
    assert found(cache, "abcdef", most=1) == pages[:1]
    assert found(cache, "cdef") == [], "the same tokens after another prefix are another page"
    assert found(cache, "abc") == pages[:1], "part of a page is none"
    assert found(cache, "abcdef", root=1) == [], "trees are apart"


def test_prefixes_branch() -> None:
    pool, cache = make_cache()
    first, second = add(cache, pool, "abcd", [0, 0]), add(cache, pool, "abXY", [0, 0])
    assert found(cache, "abcd") == first
    assert found(cache, "abXY") == [first[0], second[1]], "the second copy of ab is free again"
    assert (pool.num_idle(0), pool.num_free(0)) == (3, 5)


def test_the_least_recently_used_leaf_goes_first() -> None:
    pool, cache = make_cache(pages_per_rank=6)
    add(cache, pool, "abcd", [0, 0])
    add(cache, pool, "efgh", [0, 0])
    add(cache, pool, "ijkl", [0, 0])
    path = path_of(cache, "abcd")
    cache.hold(path)
    for node in path:
        pool.release(node.rank, node.page)
    cache.make_room(0, 1)
    assert [len(found(cache, t)) for t in ("abcd", "efgh", "ijkl")] == [2, 1, 2]
    cache.make_room(0, 3)
    assert [len(found(cache, t)) for t in ("abcd", "efgh", "ijkl")] == [2, 0, 1]


def test_a_prefix_is_as_recent_as_what_continues_it() -> None:
    pool, cache = make_cache(pages_per_rank=6)
    add(cache, pool, "ab", [0])
    add(cache, pool, "xy", [0])
    held = path_of(cache, "ab")
    cache.hold(held)  # used before xy ...
    add(cache, pool, "xy", [0])
    pages = [(0, pool.take(0, 1)[0])]
    cache.insert(held[-1], tokens_of("abcd"), 1, pages, past_twins=False)  # ... and continued after it
    for _, page in [(held[0].rank, held[0].page), *pages]:
        pool.release(0, page)
    cache.make_room(0, 5)
    assert found(cache, "xy") == [] and len(found(cache, "abcd")) == 1


def test_held_pages_stay() -> None:
    pool, cache = make_cache(pages_per_rank=4)
    add(cache, pool, "abcd", [0, 0])
    add(cache, pool, "abXY", [0, 0])
    path = path_of(cache, "abcd")
    cache.hold(path)
    assert pool.available(0) == 2
    cache.make_room(0, 2)
    assert len(found(cache, "abcd")) == 2 and len(found(cache, "abXY")) == 1


def test_room_on_one_rank_costs_little_on_others() -> None:
    pool, cache = make_cache(num_ranks=2, pages_per_rank=4)
    add(cache, pool, "abcd", [0, 0])
    add(cache, pool, "efgh", [1, 1])
    add(cache, pool, "ijkl", [1, 0])
    cache.make_room(1, 2)
    assert found(cache, "abcd"), "giving it up would free nothing on rank 1"
    assert len(found(cache, "efgh")) == 1
    cache.make_room(1, 4)
    assert found(cache, "ijkl") == found(cache, "efgh") == [], "leaves go before the pages they continue"
    assert found(cache, "abcd")


def test_a_live_request_stops_at_a_twin_and_goes_on_when_it_ends() -> None:
    pool, cache = make_cache()
    mine = [(0, page) for page in pool.take(0, 3)]
    twins = add(cache, pool, "abcd", [0, 0])
    node, count = cache.insert(cache.roots[0], tokens_of("abcdef"), 0, mine, past_twins=False)
    assert (node, count) == (cache.roots[0], 0)
    _, count = cache.insert(node, tokens_of("abcdef"), 0, mine, past_twins=True)
    assert count == 3
    for rank, page in mine:
        pool.release(rank, page)
    assert found(cache, "abcdef") == [*twins, mine[2]]
    assert (pool.num_idle(0), pool.num_used(0)) == (3, 0)


def test_flush_forgets_what_nobody_holds() -> None:
    pool, cache = make_cache(num_ranks=2)
    add(cache, pool, "abcd", [0, 1])
    add(cache, pool, "abXY", [0, 1])
    cache.hold(path_of(cache, "ab"))
    assert cache.flush() == 2
    assert len(list(cache.nodes())) == 1 and len(found(cache, "abcd")) == 1
