"""From the controller's `Step` to this rank's rows: which tokens, in what order, at which cache rows.

A rank's hidden states lie group by group, inside a group chunk by chunk (those it holds queries of, ascending),
inside a chunk sequence by sequence: so every chunk is one slice, and so is all that the rank projects keys for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from sp_backend.commands import TOKEN_BYTES, Group, SequenceStep, Step
from sp_backend.geometry import Geometry
from sp_backend.kv_cache import Ints, PageTable, Rows
from sp_backend.last_layer import as_decode, only_last_is_wanted
from sp_backend.layout import Layout
from sp_backend.local_batch import GroupRows, LastLayer, LocalBatch, PooledRows, SampleRow, ScoredRows

NO_INTS = np.empty(0, np.int64)
Laid = tuple[Group, GroupRows]  # a group, and where its rows lie


class BatchBuilder:
    """Keeps the page tables of live requests and lays out each step."""

    def __init__(
        self,
        *,
        layouts: Mapping[str, Layout],
        sp_rank: int,
        page_size: int,
        windowed: bool,
        device: torch.device,
    ) -> None:
        self._layouts = layouts
        self._sp_rank = sp_rank
        self._page_size = page_size
        self._windowed = windowed
        self._device = device
        self._tables: dict[int, PageTable] = {}

    def build(self, step: Step) -> LocalBatch:
        for request_id in step.release:
            self._tables.pop(request_id, None)
        groups: list[GroupRows] = []
        tokens, positions = [NO_INTS], [NO_INTS]
        num_rows = 0
        for group in step.groups:
            self._take_pages(group)
            laid, group_tokens, group_positions = self._lay_out(group, num_rows)
            groups.append(laid)
            tokens += group_tokens
            positions += group_positions
            num_rows += sum(map(len, group_tokens))
        last, ends = None, list(zip(step.groups, groups, strict=True))
        if any(map(only_last_is_wanted, step.groups)):
            last, ends = self._last_layer(ends)
        return LocalBatch(
            tokens=self._tensor(np.concatenate(tokens)),
            positions=self._tensor(np.concatenate(positions)),
            kv_rows=self._projected(groups, num_rows),
            groups=groups,
            last=last,
            samples=[row for end in ends for row in self._samples(*end)],
            pooled=[row for end in ends for row in self._pooled(*end)],
            scored=[row for end in ends for row in self._scored(*end)],
        )

    def _last_layer(self, groups: list[Laid]) -> tuple[LastLayer, list[Laid]]:
        """The groups as the last layer runs them, and which rows of the other layers' these have."""
        ends: list[Laid] = []
        rows = [NO_INTS]
        num_rows = 0
        for group, laid in groups:
            if only_last_is_wanted(group):
                group, laid, own = self._last_tokens(group, laid, num_rows)
            else:
                parts = laid.q_rows.values()  # one after the other
                own = np.arange(min(part.start for part in parts), max(part.stop for part in parts))
                laid = _moved(laid, num_rows - min(part.start for part in parts))
            ends.append((group, laid))
            rows.append(own)
            num_rows += len(own)
        return LastLayer(self._tensor(np.concatenate(rows)), [laid for _, laid in ends]), ends

    def _last_tokens(self, group: Group, laid: GroupRows, first_row: int) -> tuple[Group, GroupRows, Ints]:
        """The last new token of each sequence as a group of its own, and which rows of the group these are."""
        layout = self._layouts[group.plan]
        chunks = [self._last_chunk(group, laid, i) for i in range(len(group.sequences))]
        in_order = sorted((layout.owner(chunk), i, chunk) for i, chunk in enumerate(chunks) if chunk in laid.q_rows)
        rows = [laid.rows_of(i, chunk).stop - 1 for _, i, chunk in in_order]
        group = as_decode(group, chunks, layout, laid.q_rows)
        last, _, _ = self._lay_out(group, first_row)
        return group, replace(last, kv_rows={}), np.array(rows, np.int64)

    def _lay_out(self, group: Group, first_row: int) -> tuple[GroupRows, list[Ints], list[Ints]]:
        layout = self._layouts[group.plan]
        new = [self._new_rows(layout, sequence) for sequence in group.sequences]  # [sequence][chunk]
        tables = [self._tables[sequence.request_id] for sequence in group.sequences]
        tokens, positions, q_rows = [], [], {}
        taken = [0] * len(group.sequences)  # bytes
        row = first_row
        for chunk in layout.q_of(self._sp_rank):
            counts = [rows[chunk] for rows in new]
            ends = [done + TOKEN_BYTES * n for done, n in zip(taken, counts, strict=True)]
            parts = [s.tokens[a:b] for s, a, b in zip(group.sequences, taken, ends, strict=True)]
            tokens.append(np.frombuffer(b"".join(parts), "<i4").astype(np.int64))
            firsts = [s.start + sum(rows[:chunk]) for s, rows in zip(group.sequences, new, strict=True)]
            positions.append(_ranges(firsts, counts))
            taken = ends
            q_rows[chunk] = slice(row, row + sum(counts))
            row = q_rows[chunk].stop
        assert taken == [len(s.tokens) for s in group.sequences], "tokens sent are the tokens of this rank's chunks"

        own_chunks = [c for c in layout.kv_of(self._sp_rank) if c < layout.num_new and layout.owner(c) == self._sp_rank]
        own = slice(
            min((q_rows[c].start for c in own_chunks), default=first_row),
            max((q_rows[c].stop for c in own_chunks), default=first_row),
        )
        if layout.kind == "heads" and not layout.redundant_kv:  # keys are projected for own chunks only
            kv_rows = {c: slice(q_rows[c].start - own.start, q_rows[c].stop - own.start) for c in own_chunks}
            own_kv = slice(0, own.stop - own.start)
        else:
            kv_rows, own_kv = dict(q_rows), own
        history = [table.slots(0, sequence.start) for table, sequence in zip(tables, group.sequences, strict=True)]
        own_slots = [
            np.concatenate(
                [NO_INTS]
                + [
                    table.slots(at, at + rows[chunk])
                    for table, sequence, rows in zip(tables, group.sequences, new, strict=True)
                    for at in [sequence.start + sum(rows[:chunk])]
                ]
            )
            for chunk in own_chunks
        ]
        places = {
            layout.history_of(self._sp_rank): Rows(np.concatenate([NO_INTS, *history]), self._device),
            **{chunk: Rows(slots, self._device) for chunk, slots in zip(own_chunks, own_slots, strict=True)},
        }
        laid = GroupRows(
            plan=group.plan,
            geometry=self._geometry(layout, group.sequences, tables, new),
            q_rows=q_rows,
            kv_rows=kv_rows,
            own_rows=own_kv,
            own_slots=Rows(np.concatenate([NO_INTS, *own_slots]), self._device),
            places=places,
        )
        return laid, tokens, positions

    def _take_pages(self, group: Group) -> None:
        for sequence in group.sequences:
            if sequence.request_id not in self._tables:
                self._tables[sequence.request_id] = PageTable(self._sp_rank, self._page_size)
            if sequence.page_owners:
                self._tables[sequence.request_id].append(sequence.page_owners, sequence.pages)

    def _new_rows(self, layout: Layout, sequence: SequenceStep) -> tuple[int, ...]:
        if sequence.degree > 1:
            return layout.cut_pages(sequence.num_new, self._page_size, sequence.home // sequence.degree)
        return _at_home(sequence.home, sequence.num_new, layout.num_new)

    def _geometry(
        self,
        layout: Layout,
        sequences: list[SequenceStep],
        tables: list[PageTable],
        new: list[tuple[int, ...]],
    ) -> Geometry:
        rows = [
            (*counts, *table.history_rows(sequence.start, layout.num_ranks))
            for sequence, table, counts in zip(sequences, tables, new, strict=True)
        ]
        if not self._windowed:
            return Geometry(tuple(rows))
        positions = [
            [
                *(np.arange(n) + sequence.start + sum(counts[:chunk]) for chunk, n in enumerate(counts)),
                *(table.history_positions(sequence.start, rank) for rank in range(layout.num_ranks)),
            ]
            for sequence, table, counts in zip(sequences, tables, new, strict=True)
        ]
        return Geometry(tuple(rows), positions)

    def _projected(self, groups: list[GroupRows], num_rows: int) -> slice:
        layouts = [self._layouts[group.plan] for group in groups]
        if not any(layout.kind == "heads" and not layout.redundant_kv for layout in layouts):
            return slice(0, num_rows)
        assert len(groups) == 1, "layout heads runs one group a step"
        return groups[0].q_rows[self._sp_rank]

    def _samples(self, group: Group, laid: GroupRows) -> list[SampleRow]:
        """Sequences whose last new token is among this rank's rows."""
        found = []
        for i, sequence in enumerate(group.sequences):
            if sequence.sampling is None:
                continue
            chunk = self._last_chunk(group, laid, i)
            if chunk in laid.q_rows:
                row = laid.rows_of(i, chunk).stop - 1
                position = sequence.start + sequence.num_new
                found.append(SampleRow(sequence.request_id, row, position, sequence.sampling))
        return found

    def _pooled(self, group: Group, laid: GroupRows) -> list[PooledRows]:
        """What this rank adds to embeddings: nothing, where it has none of a sequence's rows."""
        found = []
        for i, sequence in enumerate(group.sequences):
            if sequence.pooling is None:
                continue
            if sequence.pooling == "mean":
                rows = [laid.rows_of(i, chunk) for chunk in laid.q_rows]
            else:
                chunk = self._last_chunk(group, laid, i)
                last = [laid.rows_of(i, chunk)] if chunk in laid.q_rows else []
                rows = [slice(part.stop - 1, part.stop) for part in last]
            if any(part.start < part.stop for part in rows):
                found.append(PooledRows(sequence.request_id, rows))
        return found

    def _scored(self, group: Group, laid: GroupRows) -> list[ScoredRows]:
        """A rank's tokens, and so the targets, lie chunk by chunk, as its rows do."""
        return [
            ScoredRows(
                sequence.request_id,
                [laid.rows_of(i, chunk) for chunk in laid.q_rows],
                self._tensor(np.frombuffer(sequence.scoring.targets, "<i4").astype(np.int64)),
                sequence.scoring.num_top,
            )
            for i, sequence in enumerate(group.sequences)
            if sequence.scoring is not None and sequence.scoring.targets
        ]

    def _last_chunk(self, group: Group, laid: GroupRows, i: int) -> int:
        """The chunk that holds the last new token of the i-th sequence."""
        if group.sequences[i].degree == 1:
            return group.sequences[i].home
        return max(c for c in range(self._layouts[group.plan].num_new) if laid.geometry.rows[i][c])

    def _tensor(self, values: Ints) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)


def _moved(laid: GroupRows, by: int) -> GroupRows:
    """The queries' rows lie elsewhere; the keys' do not."""
    return replace(laid, q_rows={c: slice(rows.start + by, rows.stop + by) for c, rows in laid.q_rows.items()})


@lru_cache(1024)  # all streams of a rank have the same, in every step
def _at_home(home: int, num_new: int, num_chunks: int) -> tuple[int, ...]:
    return tuple(num_new if chunk == home else 0 for chunk in range(num_chunks))


def _ranges(firsts: list[int], counts: list[int]) -> Ints:
    """[first, first + count) of each, one after the other."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(np.array(firsts, np.int64) - ends + counts, counts)
