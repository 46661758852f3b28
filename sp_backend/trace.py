"""A simulated schedule as a trace for Perfetto or chrome://tracing: a process a rank, microseconds. Pure: no torch.

Format: "Trace Event Format" of the Chromium project, complete events ("X") and names as metadata ("M").
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

from sp_backend.simulate import Event, Simulation

_THREADS: Final = ("compute", "wait", "send", "receive")


def chrome_trace(simulation: Simulation, num_ranks: int, title: str) -> dict[str, Any]:
    """JSON-ready. Messages that are on the wire at once lie on rows of their own: send, send 2 and so on."""
    on_thread: dict[tuple[int, str], list[Event]] = defaultdict(list)
    for event in simulation.timeline:
        on_thread[event.rank, event.kind if event.kind in _THREADS else "compute"].append(event)
        if event.peer is not None:
            on_thread[event.peer, "receive"].append(event)
    shown: list[dict[str, Any]] = []
    for rank in range(num_ranks):
        shown.append(_named("process_name", f"rank {rank}", pid=rank))
        tid = 0
        for thread in _THREADS:
            for i, row in enumerate(_rows(on_thread[rank, thread])):
                shown.append(_named("thread_name", thread if i == 0 else f"{thread} {i + 1}", pid=rank, tid=tid))
                shown += [_complete(event, rank, tid) for event in row]
                tid += 1
    return {"traceEvents": shown, "displayTimeUnit": "ms", "otherData": {"title": title}}


def _rows(events: list[Event]) -> list[list[Event]]:
    """Events that overlap, on rows where none do: each on the first that is free (viewers drop what overlaps)."""
    rows: list[list[Event]] = []
    for event in events:
        free = next((row for row in rows if row[-1].end <= event.start), None)
        if free is None:
            rows.append([event])
        else:
            free.append(event)
    return rows


def _complete(event: Event, rank: int, tid: int) -> dict[str, Any]:
    start, end = event.start * 1e6, event.end * 1e6
    shown = {"ph": "X", "name": event.name, "cat": event.kind, "pid": rank, "tid": tid, "ts": start, "dur": end - start}
    return shown if event.peer is None else shown | {"args": {"from": event.rank, "to": event.peer}}


def _named(what: str, name: str, **of: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "args": {"name": name}, **of}
