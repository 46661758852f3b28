"""Where a sequence's tokens live: on one rank (home) or over all (spread). Takes and returns its pages.

A request's home is a run of ranks that share its new tokens. A prompt with few of them whose cached prefix lies on one
rank is at home there and needs no communication; a longer one is cut by the layout over a group of ranks, or all. When
a rank that should take pages has none left, they go to the rank with the most room under the plan "decode", which
works wherever the history lies: so a request that fits the sum of all ranks is never stuck behind one of them. In
layout heads every rank computes a part of the heads of every token, whatever the rank of its page.
"""

from __future__ import annotations

from scheduler.page_pool import PagePool
from scheduler.plans import PlanChooser
from scheduler.prefix_cache import Node, PrefixCache
from scheduler.sequence import Chunk, Sequence
from sp_backend.commands import DECODE, LOCAL
from sp_backend.config import BackendConfig
from sp_backend.layout import Layout

SPREAD_TREE = -1  # of the prefix cache


class Placement:
    def __init__(
        self, backend: BackendConfig, pages_per_rank: int, plans: PlanChooser, prefix_cache: bool = True
    ) -> None:
        self.page_size = backend.page_size
        self.num_ranks = backend.sp_size
        self.heads = backend.layout == "heads" and backend.sp_size > 1
        self.pool = PagePool(backend.sp_size, pages_per_rank)
        self.cache = PrefixCache(self.pool, backend.page_size)
        self._plans = plans
        self.whole_prompts = not backend.causal  # never cut: every token sees those after it
        self._prefix_cache = prefix_cache and backend.causal
        self.all_ranks = range(backend.sp_size)
        self.num_home = [0] * backend.sp_size  # live sequences that are at home on each rank alone

    @property
    def capacity(self) -> int:
        """Tokens that fit when nothing else is live."""
        return self.pool.num_pages * self.page_size

    @property
    def capacity_in_place(self) -> int:
        """Tokens of the longest prompt that fits where the layout puts its pages, as do all shorter ones, when nothing
        else is live. The layout gives a rank up to one page more than others.
        """
        layout = self._layout(self.all_ranks)
        for num_pages in range(self.pool.num_pages - self.num_ranks + 1, self.pool.num_pages + 1):
            ranks = layout.page_ranks(num_pages * self.page_size, self.page_size)
            if max(map(ranks.count, self.all_ranks)) > self.pool.pages_per_rank:
                return (num_pages - 1) * self.page_size
        return self.capacity

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    # Admission

    def reads_cache(self, sequence: Sequence) -> bool:
        """Whether cached pages may stand for its tokens: some answers need the last layer's states of all tokens."""
        request = sequence.request
        return self._prefix_cache and request.pooling != "mean" and request.prompt_logprobs is None

    def find_prefix(self, sequence: Sequence) -> list[Node]:
        """The longest cached prefix. The last token is never matched: it must be computed to sample the next.

        Of equal ones the least busy rank's. A short prompt ignores a rank that is much busier than another: it would
        rather compute a prefix again, once, than decode next to everyone else who shares it.
        """
        if not self.reads_cache(sequence):
            return []
        most = (len(sequence.tokens) - 1) // self.page_size
        short = self._plans.is_short(len(sequence.tokens))
        busy = 2 * min(self.num_home) + 3
        best: list[Node] = []
        for rank in sorted(range(self.num_ranks), key=self.num_home.__getitem__):
            if not (short and self.num_home[rank] > busy):
                path = self.cache.match(self.cache.roots[rank], sequence.tokens, most)
                best = max(best, path, key=len)
        return max(best, self.cache.match(self.cache.roots[SPREAD_TREE], sequence.tokens, most), key=len)

    def admit(self, sequence: Sequence, path: list[Node], spare: int, load: list[float]) -> bool:
        """Gives a sequence its cached pages and a home, if all the pages it then needs are there beyond `spare`.

        load: tokens that each rank already computes in this step.
        """
        assert sequence.node is None and not sequence.pages, "admitted once"
        self.cache.hold(path)
        needed = self.pages_for(len(sequence.tokens)) - len(path)
        if needed > self.pool.total_available() - spare:
            for node in path:
                self.pool.release(node.rank, node.page)
            return False
        sequence.pages_on = [0] * self.num_ranks
        for node in path:
            sequence.add_page(node.rank, node.page)
        sequence.num_computed = len(path) * self.page_size
        sequence.num_cached = len(path)
        sequence.home = self._choose_home(sequence, needed, load)
        home = sequence.home
        tree = home.start if len(home) == 1 else SPREAD_TREE
        sequence.node = path[-1] if path else self.cache.roots[tree]
        if len(home) == 1:
            self.num_home[home.start] += 1
        return True

    def _choose_home(self, sequence: Sequence, needed: int, load: list[float]) -> range:
        """A group of as many ranks as pay: the one with its history if there is one, else with room and little work."""
        degree = self._plans.degree(sequence.num_remaining, sequence.num_computed)
        if degree == self.num_ranks:
            return self.all_ranks
        groups = [range(r, r + degree) for r in range(0, self.num_ranks, degree)]
        if sequence.pages:
            group = groups[sequence.owners[0] // degree]
            if sequence.lies_on(group):
                return group
            if degree > 1:
                return self.all_ranks  # a plan of a group does not see history outside it
        share = -(-needed // degree)
        roomy = [group for group in groups if all(self.pool.available(r) >= share for r in group)]
        if not roomy:
            return self.all_ranks
        return min(
            roomy,
            key=lambda group: (
                max(load[r] for r in group),
                sum(self.num_home[r] for r in group),
                -sum(map(self.pool.available, group)),
            ),
        )

    # Pages

    def place(self, sequence: Sequence, num_new: int) -> Chunk | None:
        """The next chunk of a prompt, with its pages: `num_new` tokens, or fewer where room is short and the prompt may
        be cut; None: no room.
        """
        assert sequence.num_computed == len(sequence.pages) * self.page_size, "prompts are cut between pages"
        home = sequence.home
        fits = self.has_room_as_intended(sequence, num_new)
        if 1 < len(home) < self.num_ranks and ((self.whole_prompts and not fits) or not sequence.lies_on(home)):
            home = sequence.home = self.all_ranks
            fits = self.has_room_as_intended(sequence, num_new)
        if not fits and self.whole_prompts:
            return None
        if fits:
            plan = self._plan_at(sequence, home) if len(home) == 1 else None
            return self._chunk(sequence, num_new, home, plan, self._intended_ranks(sequence, num_new))
        rank = self._roomiest()
        # one rank now does what was meant for several
        num_new = min(num_new, self.pages_for(-(-num_new // len(home))) * self.page_size)
        num_new = min(num_new, self.pool.available(rank) * self.page_size)
        if not num_new:
            return None
        here = range(rank, rank + 1)
        return self._chunk(sequence, num_new, here, self._plan_at(sequence, here), (rank,) * self.pages_for(num_new))

    def has_room_as_intended(self, sequence: Sequence, num_new: int) -> bool:
        """Whether place() can put the pages where the layout, or home, wants them."""
        ranks = self._intended_ranks(sequence, num_new)
        return all(self.pool.available(r) >= ranks.count(r) for r in set(ranks))

    def next_token(self, sequence: Sequence) -> Chunk | None:
        """The decode chunk of a sequence, with a new page if the last is full; None: no room."""
        assert sequence.num_remaining == 1
        if sequence.num_computed == len(sequence.pages) * self.page_size:
            rank = sequence.owners[-1]
            if self.heads or not sequence.lies_on(range(rank, rank + 1)) or not self.pool.available(rank):
                rank = self._roomiest()
            if not self.pool.available(rank):
                return None
            self._add_pages(sequence, (rank,))
        here = range(sequence.owners[-1], sequence.owners[-1] + 1)
        return Chunk.of(sequence, 1, here, self._plan_at(sequence, here))

    def computed(self, chunk: Chunk) -> None:
        """The chunk's step is on its way: whatever is sent later finds its tokens in the KV cache.

        So pages that it fills can be found by other requests at once.
        """
        sequence = chunk.sequence
        sequence.num_computed += chunk.num_new
        if not sequence.has_twins:
            self._cache_pages(sequence, past_twins=False)

    def release(self, sequence: Sequence) -> None:
        """Takes all pages of an admitted sequence back; those in the prefix cache stay there as long as they can."""
        self._cache_pages(sequence, past_twins=True)
        for rank, page in zip(sequence.owners, sequence.pages, strict=True):
            self.pool.release(rank, page)
        if len(sequence.home) == 1:
            self.num_home[sequence.home.start] -= 1
        sequence.forget_pages()

    def _cache_pages(self, sequence: Sequence, past_twins: bool) -> None:
        first, full = sequence.num_cached, min(sequence.num_computed, sequence.num_known) // self.page_size
        if not self._prefix_cache or full == first:
            return
        pages = list(zip(sequence.owners[first:full], sequence.pages[first:full], strict=True))
        assert sequence.node is not None
        node, count = self.cache.insert(sequence.node, sequence.tokens, first, pages, past_twins)
        sequence.node, sequence.num_cached = node, first + count
        sequence.has_twins = sequence.num_cached < full

    def _intended_ranks(self, sequence: Sequence, num_new: int) -> tuple[int, ...]:
        home = sequence.home
        if len(home) == 1:
            return (home.start,) * self.pages_for(num_new)
        return tuple(home[r] for r in self._layout(home).page_ranks(num_new, self.page_size))

    def _layout(self, home: range) -> Layout:
        """A group cuts a sequence as a layout of so many ranks would; the number of heads plays no part in it."""
        return Layout(len(home), "heads" if self.heads else "zigzag", len(home), 1)

    def _chunk(self, sequence: Sequence, num_new: int, home: range, plan: str | None, ranks: tuple[int, ...]) -> Chunk:
        self._add_pages(sequence, ranks)
        return Chunk.of(sequence, num_new, home, plan)

    def _plan_at(self, sequence: Sequence, rank: range) -> str:
        return LOCAL if sequence.lies_on(rank) and not self.heads else DECODE

    def _roomiest(self) -> int:
        return max(range(self.num_ranks), key=self.pool.available)

    def _add_pages(self, sequence: Sequence, ranks: tuple[int, ...]) -> None:
        taken = {}
        for rank in set(ranks):
            count = ranks.count(rank)
            self.cache.make_room(rank, count)
            taken[rank] = iter(self.pool.take(rank, count))
        for rank in ranks:
            sequence.add_page(rank, next(taken[rank]))
