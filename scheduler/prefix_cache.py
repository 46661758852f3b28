"""Full pages whose tokens have been computed, findable by the tokens they continue.

A tree: an edge is one page's exact token ids, so a path is a prefix and two prefixes never collide. Pages that no
request holds are given up leaf first, least recently used first. A live request holds every page on its path, so
below an idle page there are only idle pages, and every idle page can be given up. (Where another request was faster,
a live one does not go on below pages that it does not hold: the rest of its pages follows when it ends.)

There is one tree for each rank, for prefixes that begin at home on it, and one for those that begin spread. A short
prefix that many requests share can thus be cached on several ranks and does not tie them all to one; each copy is a
page of its own, and a request sees only one tree.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator
from itertools import count

from scheduler.page_pool import PagePool


class Node:
    """One cached page. The root of a tree has none (rank -1)."""

    __slots__ = ("tree", "parent", "key", "rank", "page", "children", "last_used", "queued")

    def __init__(self, tree: int, parent: Node | None, key: bytes, rank: int, page: int) -> None:
        self.tree = tree
        self.parent = parent
        self.key = key
        self.rank = rank
        self.page = page
        self.children: dict[bytes, Node] = {}
        self.last_used = 0
        self.queued = False  # has an entry in the eviction queue


class PrefixCache:
    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        num_trees = pool.num_ranks + 1  # one for each rank, then the spread one
        self.roots = [Node(tree, None, b"", -1, -1) for tree in range(num_trees)]
        self._clock = count(1)
        self._ticket = count()
        # of each tree, by age: (last_used when queued, tie-break, leaf), checked when popped
        self._queues: list[list[tuple[int, int, Node]]] = [[] for _ in range(num_trees)]

    def match(self, root: Node, tokens: array[int], max_pages: int) -> list[Node]:
        """The longest cached path from `root` along `tokens`, at most `max_pages` long."""
        path: list[Node] = []
        node = root
        while len(path) < max_pages:
            child = node.children.get(self.key(tokens, len(path)))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def hold(self, path: list[Node]) -> None:
        """A request uses the pages of a path."""
        now = next(self._clock)
        for node in path:
            node.last_used = now
            self._pool.hold(node.rank, node.page)

    def insert(
        self, node: Node, tokens: array[int], first: int, pages: list[tuple[int, int]], past_twins: bool
    ) -> tuple[Node, int]:
        """Adds a request's pages number `first` and following, (rank, page) each, below `node`, which it holds.

        Where another request was faster, its twin of a page is there already: the end, unless `past_twins`, which is
        for a request about to release its pages. Returns the last node reached, and how many pages it is beyond `node`.
        """
        now = next(self._clock)
        for number, (rank, page) in enumerate(pages, first):
            key = self.key(tokens, number)
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(node.tree, node, key, rank, page)
                self._pool.cache(rank, page)
            elif not past_twins:
                break
            child.last_used = now
            node = child
        else:
            number = first + len(pages)
        self._enqueue(node)
        return node, number - first

    def make_room(self, rank: int, num_free: int) -> None:
        """Gives idle pages up until the rank has `num_free` free ones; it must have enough idle ones.

        The trees of other ranks, where few pages of this one can lie, come last.
        """
        likely = [self._queues[rank], self._queues[-1]]
        kept: list[Node] = []
        for queues in (likely, self._queues):
            while self._pool.num_free(rank) < num_free and any(queues):
                self._give_up_oldest(min(filter(None, queues), key=lambda queue: queue[0]), rank, kept)
        assert self._pool.num_free(rank) >= num_free, "every idle page can be given up"
        for node in kept:
            self._enqueue(node)

    def _give_up_oldest(self, queue: list[tuple[int, int, Node]], rank: int, kept: list[Node]) -> None:
        """Gives up the oldest leaf of a queue if that leads to a page of the rank, else adds it to `kept`."""
        queued_at, _, node = heapq.heappop(queue)
        node.queued = False
        if node.children:
            return  # no longer a leaf: queued again once it is one
        if node.last_used > queued_at:
            self._enqueue(node)
        elif self._leads_to(node, rank):
            self._drop(node)
        else:
            kept.append(node)

    def flush(self) -> int:
        """Gives every idle page up; returns how many."""
        before = sum(map(self._pool.num_idle, range(self._pool.num_ranks)))
        for rank in range(self._pool.num_ranks):
            self.make_room(rank, self._pool.available(rank))
        return before

    def key(self, tokens: array[int], number: int) -> bytes:
        """The edge of page `number` of a sequence of tokens."""
        return tokens[number * self._page_size : (number + 1) * self._page_size].tobytes()

    def nodes(self) -> Iterator[Node]:
        """Every cached page."""
        stack = list(self.roots)
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if node.parent is not None:
                yield node

    def _enqueue(self, node: Node) -> None:
        if not node.queued and node.parent is not None:
            node.queued = True
            heapq.heappush(self._queues[node.tree], (node.last_used, next(self._ticket), node))

    def _leads_to(self, leaf: Node, rank: int) -> bool:
        """Whether giving up this leaf, and then its idle ancestors, frees a page of the rank."""
        node = leaf
        while node.parent is not None and not self._pool.holders(node.rank, node.page):
            if node.rank == rank:
                return True
            node = node.parent
        return False

    def _drop(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None and not leaf.children
        del parent.children[leaf.key]
        leaf.parent = None
        self._pool.uncache(leaf.rank, leaf.page)
        if not parent.children:
            self._enqueue(parent)
