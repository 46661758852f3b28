"""From the controller's `Step` to this rank's rows: which tokens, in what order, at which cache rows.

A rank's hidden states lie group by group, inside a group chunk by chunk (those it holds queries of, ascending),
inside a chunk sequence by sequence: so every chunk is one slice, and so is all that the rank projects keys for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        """Where a group's rows lie, the first of them at `first_row`; their tokens and positions, chunk by chunk."""
        layout, sequences = self._layouts[group.plan], group.sequences
        new = [self._new_rows(layout, sequence) for sequence in sequences]  # [sequence][chunk]
        tables = [self._tables[sequence.request_id] for sequence in sequences]
        tokens, positions, q_rows = _queries(sequences, new, layout.q_of(self._sp_rank), first_row)
        own_chunks = [c for c in layout.kv_of(self._sp_rank) if c < layout.num_new and layout.owner(c) == self._sp_rank]
        kv_rows, own_rows = _keys(layout, own_chunks, q_rows, first_row)
        history = [table.slots(0, sequence.start) for table, sequence in zip(tables, sequences, strict=True)]
        slots = {chunk: _slots(sequences, tables, new, chunk) for chunk in own_chunks}
        places = {layout.history_of(self._sp_rank): np.concatenate([NO_INTS, *history]), **slots}
        laid = GroupRows(
            plan=group.plan,
            geometry=self._geometry(layout, sequences, tables, new),
            q_rows=q_rows,
            kv_rows=kv_rows,
            own_rows=own_rows,
            own_slots=Rows(np.concatenate([NO_INTS, *slots.values()]), self._device),
            places={chunk: Rows(rows, self._device) for chunk, rows in places.items()},
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
        if not any(map(_projects_own_alone, layouts)):
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


def _queries(
    sequences: Sequence[SequenceStep], new: Sequence[tuple[int, ...]], chunks: Sequence[int], first_row: int
) -> tuple[list[Ints], list[Ints], dict[int, slice]]:
    """Tokens and positions of a rank's query chunks, and the rows of each."""
    tokens, positions, q_rows = [], [], {}
    taken = [0] * len(sequences)  # bytes
    row = first_row
    for chunk in chunks:
        counts = [rows[chunk] for rows in new]
        ends = [done + TOKEN_BYTES * n for done, n in zip(taken, counts, strict=True)]
        parts = [s.tokens[a:b] for s, a, b in zip(sequences, taken, ends, strict=True)]
        tokens.append(np.frombuffer(b"".join(parts), "<i4").astype(np.int64))
        positions.append(_ranges(_firsts(sequences, new, chunk), counts))
        taken = ends
        q_rows[chunk] = slice(row, row + sum(counts))
        row = q_rows[chunk].stop
    assert taken == [len(s.tokens) for s in sequences], "tokens sent are the tokens of this rank's chunks"
    return tokens, positions, q_rows


def _keys(
    layout: Layout, own_chunks: Sequence[int], q_rows: Mapping[int, slice], first_row: int
) -> tuple[dict[int, slice], slice]:
    """The rows of chunks among the keys that are projected, and those of them that this rank keeps."""
    first = min((q_rows[c].start for c in own_chunks), default=first_row)
    stop = max((q_rows[c].stop for c in own_chunks), default=first_row)
    if not _projects_own_alone(layout):
        return dict(q_rows), slice(first, stop)
    return {c: slice(q_rows[c].start - first, q_rows[c].stop - first) for c in own_chunks}, slice(0, stop - first)


def _projects_own_alone(layout: Layout) -> bool:
    """Whether a rank has the hidden states of all tokens, and projects the keys of its own chunks alone."""
    return layout.kind == "heads" and not layout.redundant_kv


def _slots(
    sequences: Sequence[SequenceStep], tables: Sequence[PageTable], new: Sequence[tuple[int, ...]], chunk: int
) -> Ints:
    """Cache rows of a chunk that this rank owns, sequence by sequence."""
    firsts = _firsts(sequences, new, chunk)
    parts = [table.slots(at, at + rows[chunk]) for table, at, rows in zip(tables, firsts, new, strict=True)]
    return np.concatenate([NO_INTS, *parts])


def _firsts(sequences: Sequence[SequenceStep], new: Sequence[tuple[int, ...]], chunk: int) -> list[int]:
    """Each sequence's first position in a chunk."""
    return [s.start + sum(rows[:chunk]) for s, rows in zip(sequences, new, strict=True)]


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
