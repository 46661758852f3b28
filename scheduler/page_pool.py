"""Which KV pages of each SP rank are free, held by requests, or kept for the prefix cache.

A page is in exactly one of three states, so num_free + num_idle + num_used is always the whole rank:
    free   nobody needs it
    used   at least one live request holds it (the prefix cache may know it as well)
    idle   no request holds it, the prefix cache does: given up when a request needs room
"""

from __future__ import annotations


class PagePool:
    def __init__(self, num_ranks: int, pages_per_rank: int) -> None:
        if pages_per_rank < 1:
            raise ValueError(f"every rank needs at least one KV page, not {pages_per_rank}")
        self.num_ranks = num_ranks
        self.pages_per_rank = pages_per_rank
        self._free = [list(range(pages_per_rank - 1, -1, -1)) for _ in range(num_ranks)]
        self._holders = [[0] * pages_per_rank for _ in range(num_ranks)]
        self._cached = [bytearray(pages_per_rank) for _ in range(num_ranks)]
        self._num_idle = [0] * num_ranks

    @property
    def num_pages(self) -> int:
        return self.num_ranks * self.pages_per_rank

    def num_free(self, rank: int) -> int:
        return len(self._free[rank])

    def num_idle(self, rank: int) -> int:
        return self._num_idle[rank]

    def num_used(self, rank: int) -> int:
        return self.pages_per_rank - len(self._free[rank]) - self._num_idle[rank]

    def available(self, rank: int) -> int:
        """Pages a request could get: the free ones and those the prefix cache can give up."""
        return len(self._free[rank]) + self._num_idle[rank]

    def total_available(self) -> int:
        return sum(map(len, self._free)) + sum(self._num_idle)

    def take(self, rank: int, count: int) -> list[int]:
        """Free pages, now held once each."""
        free, holders = self._free[rank], self._holders[rank]
        assert count <= len(free), "the prefix cache gives up pages before they are taken"
        pages = [free.pop() for _ in range(count)]
        for page in pages:
            assert not holders[page] and not self._cached[rank][page], "a free page belongs to nobody"
            holders[page] = 1
        return pages

    def holders(self, rank: int, page: int) -> int:
        return self._holders[rank][page]

    def hold(self, rank: int, page: int) -> None:
        """One more request reads a page that the prefix cache knows."""
        assert self._cached[rank][page], "only cached pages are shared"
        if not self._holders[rank][page]:
            self._num_idle[rank] -= 1
        self._holders[rank][page] += 1

    def release(self, rank: int, page: int) -> None:
        holders = self._holders[rank]
        assert holders[page] > 0, "released more often than held"
        holders[page] -= 1
        if holders[page]:
            return
        if self._cached[rank][page]:
            self._num_idle[rank] += 1
        else:
            self._free[rank].append(page)

    def cache(self, rank: int, page: int) -> None:
        """The prefix cache keeps a page that a request has filled."""
        assert self._holders[rank][page] and not self._cached[rank][page], "cached once, while held"
        self._cached[rank][page] = True

    def uncache(self, rank: int, page: int) -> None:
        """The prefix cache gives an idle page up."""
        assert self._cached[rank][page] and not self._holders[rank][page], "only idle pages are given up"
        self._cached[rank][page] = False
        self._num_idle[rank] -= 1
        self._free[rank].append(page)
