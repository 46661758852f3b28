"""Double ring: rings of `window_size` neighbouring ranks inside, one ring of windows outside.

KV makes P/w - 1 steps between windows and w - 1 within each, and the step between windows has all the rounds of a
window to arrive in: for nodes whose ranks each have a slow link of their own to the next node. Bytes are those of a
ring. Source: LoongTrain (arXiv 2406.18485) and MindSpeed's --cp-window-size.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

from sp_backend.layout import KV, Block, Layout, Q
from sp_backend.plan import Attend, Plan, Round, Transfer, visible


def build(layout: Layout, window_size: int | None = None) -> Plan:
    """window_size: None is the divisor of the number of ranks nearest to its square root, from below."""
    ranks, heads = layout.num_ranks, layout.all_heads
    fit = [w for w in range(1, ranks + 1) if ranks % w == 0]
    size = max(w for w in fit if w <= isqrt(ranks)) if window_size is None else window_size
    if size not in fit:
        raise ValueError(
            f"window_size (--sp-window-size): {ranks} ranks cannot be divided into windows of {size}; "
            f"sizes that fit: {', '.join(map(str, fit))}"
        )
    windows, rounds = ranks // size, []
    for outer in range(windows):
        for inner in range(size):
            transfers: list[Transfer] = []
            attends: list[Attend] = []
            for r in range(ranks):
                window, i = divmod(r, size)
                source = (window + outer) % windows * size + (i + inner) % size
                q = [Block(Q, c, heads) for c in layout.q_of(r)]
                kv = [Block(KV, c, heads) for c in layout.kv_of(source)]
                attends += visible(layout, r, q, kv)
                if inner < size - 1:
                    transfers += [Transfer(b, r, window * size + (i - 1) % size) for b in kv]
                if inner == 0 and outer < windows - 1:  # needed `size` rounds from now
                    transfers += [Transfer(b, r, (window - 1) % windows * size + i) for b in kv]
            rounds.append(Round(tuple(transfers), tuple(attends)))
    return Plan("double_ring", layout, tuple(rounds))


def windows(num_ranks: int, num_heads: int) -> Iterator[dict[str, int]]:
    """Options that make more than a plain ring."""
    return ({"window_size": w} for w in range(2, num_ranks) if num_ranks % w == 0)
