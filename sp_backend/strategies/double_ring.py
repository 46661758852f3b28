"""Double ring: rings of `window_size` neighbouring ranks inside, one ring of windows outside.

KV makes P/w - 1 steps between windows and w - 1 within each, and the step between windows has all the rounds of a
window to arrive in: for nodes whose ranks each have a slow link of their own to the next node. Bytes are those of a
ring. Source: LoongTrain (arXiv 2406.18485) and MindSpeed's --cp-window-size.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import numpy as np

from sp_backend.columns import Draft
from sp_backend.layout import KV, Layout
from sp_backend.plan import Plan


def build(layout: Layout, window_size: int | None = None) -> Plan:
    """window_size: None is the divisor of the number of ranks nearest to its square root, from below."""
    ranks = layout.num_ranks
    fit = [w for w in range(1, ranks + 1) if ranks % w == 0]
    size = max(w for w in fit if w <= isqrt(ranks)) if window_size is None else window_size
    if size not in fit:
        raise ValueError(
            f"window_size (--sp-window-size): {ranks} ranks cannot be divided into windows of {size}; "
            f"sizes that fit: {', '.join(map(str, fit))}"
        )
    windows, draft = ranks // size, Draft(layout)
    outer, inner, r = np.indices((windows, size, ranks))
    window, i = np.divmod(r, size)
    source, when = (window + outer) % windows * size + (i + inner) % size, outer * size + inner
    kv = np.array(layout.all_kv())[source]
    draft.attend(np.array(layout.all_q())[r], kv, round=when, rank=r)
    within, between = inner < size - 1, (inner == 0) & (outer < windows - 1)
    draft.send(KV, kv[within], round=when[within], src=r[within], dst=(window * size + (i - 1) % size)[within])
    following = (window - 1) % windows * size + i  # where it is needed `size` rounds from now
    draft.send(KV, kv[between], round=when[between], src=r[between], dst=following[between])
    return Plan("double_ring", layout, draft.rounds())


def windows(num_ranks: int, num_heads: int) -> Iterator[dict[str, int]]:
    """Options that make more than a plain ring."""
    return ({"window_size": w} for w in range(2, num_ranks) if num_ranks % w == 0)
