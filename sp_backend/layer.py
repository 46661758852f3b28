"""One step's attention, layer by layer: keep the new keys, run each group's plan, put the outputs in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sp_backend.batch import GroupRows, LocalBatch
from sp_backend.execute import Executor
from sp_backend.kv_cache import KVCache
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
        by_window = {
            window: [executors[group.plan].schedule(group.geometry, window, group.places) for group in batch.groups]
            for window in set(windows)
        }
        self._schedules = [by_window[window] for window in windows]  # [layer][group]
        self._attended: AttentionState | None = None  # of the last layer; its memory serves all

    @property
    def kv_rows(self) -> slice:
        return self._batch.kv_rows

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """q [n, heads, head_dim] and kv [rows, 2, kv_heads, head_dim], rotated; gives [n, heads, head_dim].

        What it gives is overwritten by the next call.
        """
        if self._attended is None:
            self._attended = AttentionState(torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32))
        for group, schedule in zip(self._batch.groups, self._schedules[layer], strict=True):
            self._attend_group(layer, group, schedule, q, kv, self._attended)
        return self._attended.out

    def _attend_group(
        self,
        layer: int,
        group: GroupRows,
        schedule: Schedule,
        q: torch.Tensor,
        kv: torch.Tensor,
        attended: AttentionState,
    ) -> None:
        self._cache.write(layer, group.own_slots, kv[group.own_rows])
        held = {chunk: kv[rows] for chunk, rows in group.kv_rows.items()}
        queries = {chunk: q[rows] for chunk, rows in group.q_rows.items()}
        results = {chunk: attended.rows(rows.start, rows.stop) for chunk, rows in group.q_rows.items()}
        self._executors[group.plan].run(schedule, queries, held, self._cache.pages(layer), results=results)
