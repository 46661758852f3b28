"""Local: whole sequences, with their history, on their home rank. Nothing travels."""

from __future__ import annotations

from sp_backend.columns import Draft
from sp_backend.layout import Layout
from sp_backend.plan import Plan


def build(layout: Layout) -> Plan:
    draft = Draft(layout)
    draft.attend(layout.all_q(), layout.all_kv(), round=0, rank=range(layout.num_ranks))
    return Plan("local", layout, draft.rounds())
