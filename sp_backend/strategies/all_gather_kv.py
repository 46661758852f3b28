"""All-gather: every rank sends its own KV to all others, who attend all of it in one round.

All links are busy at once and nothing is passed on, but what a rank receives is all there at the same time: memory
grows with the number of ranks. The own KV is attended while the others' travels.
"""

from __future__ import annotations

import numpy as np

from sp_backend.columns import Draft
from sp_backend.layout import KV, Layout
from sp_backend.plan import Plan


def build(layout: Layout) -> Plan:
    ranks, kv, draft = range(layout.num_ranks), np.array(layout.all_kv()), Draft(layout)
    receiver, sender = np.array([(r, s) for r in ranks for s in ranks if r != s], int).reshape(-1, 2).T
    q = np.array(layout.all_q())
    draft.send(KV, kv[sender], round=0, src=sender, dst=receiver)
    draft.attend(q, kv, round=0, rank=ranks)
    draft.attend(q[receiver], kv[sender], round=1, rank=receiver)
    return Plan("all_gather_kv", layout, draft.rounds())
