"""One step's attention, layer by layer: keep the new keys, run each group's plan, put the outputs in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sp_backend.execute import Executor
from sp_backend.kv_cache import KVCache
from sp_backend.local_batch import GroupRows, LocalBatch
from sp_backend.schedule import Schedule
from sp_backend.state import AttentionState


class StepAttention:
    """What a decoder sees of sequence parallelism during one forward pass."""

    def __init__(
        self,
        batch: LocalBatch,
        cache: KVCache,
        executors: Mapping[str, Executor],
        windows: Sequence[int | None],
    ) -> None:
        self._batch = batch
        self._cache = cache
        self._executors = executors
        by_window = {window: self._scheduled(batch.groups, window) for window in set(windows)}
        self._layers = [by_window[window] for window in windows]  # [layer][group]
        if batch.last is not None:
            self._layers[-1] = self._scheduled(batch.last.groups, windows[-1])
        self._attended: AttentionState | None = None  # of the last call; its memory serves all

    @property
    def kv_rows(self) -> slice:
        return self._batch.kv_rows

    @property
    def last_rows(self) -> torch.Tensor | None:
        return None if self._batch.last is None else self._batch.last.rows

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """q [n, heads, head_dim] and kv [rows, 2, kv_heads, head_dim], rotated; gives [n, heads, head_dim].

        What it gives is overwritten by the next call.
        """
        if self._attended is None:
            self._attended = AttentionState(torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32))
        attended = self._attended.rows(0, len(q))
        for group in self._batch.groups:
            self._cache.write(layer, group.own_slots, kv[group.own_rows])
        for group, schedule in self._layers[layer]:
            self._attend_group(layer, group, schedule, q, kv, attended)
        return attended.out

    def _scheduled(self, groups: Sequence[GroupRows], window: int | None) -> list[tuple[GroupRows, Schedule]]:
        return [(group, self._executors[group.plan].schedule(group.geometry, window, group.places)) for group in groups]

    def _attend_group(
        self,
        layer: int,
        group: GroupRows,
        schedule: Schedule,
        q: torch.Tensor,
        kv: torch.Tensor,
        attended: AttentionState,
    ) -> None:
        held = {chunk: kv[rows] for chunk, rows in group.kv_rows.items()}
        queries = {chunk: q[rows] for chunk, rows in group.q_rows.items()}
        results = {chunk: attended.rows(rows.start, rows.stop) for chunk, rows in group.q_rows.items()}
        self._executors[group.plan].run(schedule, queries, held, self._cache.pages(layer), results=results)
