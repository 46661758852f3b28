"""What a plan's instructions take on a machine, each by itself: bytes, and seconds of the rank that does them. Pure: no
torch.

Arrays are [instructions, batches]; instructions that are equal but for their place are worked out once.
"""

from __future__ import annotations

from random import Random

import numpy as np

from sp_backend.columns import Index
from sp_backend.flow import Flow
from sp_backend.geometry import block_bytes, piece_rows
from sp_backend.grouping import run_starts
from sp_backend.layout import Layout
from sp_backend.shape import ModelShape, Sizes
from sp_backend.topology import Floats, Rates


def weights_seconds(shape: ModelShape, rates: Rates) -> float:
    """A step's work beside attention takes at least this: all weights are read."""
    return shape.dense_flops / 2 * shape.itemsize / rates.memory_bytes


class Work:
    def __init__(self, layout: Layout, flow: Flow, shape: ModelShape, rates: Rates, sizes: Sizes) -> None:
        self._layout, self._flow, self._shape, self._rates, self._count = layout, flow, shape, rates, sizes.count
        chunks = sizes.rows.transpose(2, 0, 1)  # [chunk, batch, sequence]
        rows = np.stack([np.subtract(*piece_rows(chunks, cut)[::-1]) for cut in flow.forms.cuts])
        flat = rows.reshape(-1, rows[0, 0].size)
        kinds: dict[bytes, int] = {}
        kind = [kinds.setdefault(row.tobytes(), len(kinds)) for row in flat]
        first = np.unique(kind, return_index=True)[1]
        self._kind = np.array(kind).reshape(len(flow.forms.cuts), -1)  # [cut, chunk]: of blocks with equal rows
        self._sequence_rows = flat[first].reshape(-1, *sizes.count.shape)  # [kind, batch, sequence]
        self._rows = (self._sequence_rows * sizes.count).sum(2).astype(float)  # [kind, batch]
        self._whole = self._kind[flow.forms.cuts.index((0, 1))]  # [chunk]
        t, forms = flow.columns.transfers, flow.forms
        self._sent = self._kind[forms.sent_cut, t.chunk]
        width = [
            block_bytes(layout, forms.block(form, 0), 1, shape.head_dim, shape.itemsize) for form in range(forms.number)
        ]
        self._width = np.array(width)[forms.transfer]  # bytes of a row

    def message_bytes(self) -> Floats:
        message, number = self._flow.message_of, len(self._flow.messages.round)
        if not number:
            return np.zeros((0, self._rows.shape[1]))
        order = np.argsort(message, kind="stable")
        starts = run_starts(message[order])
        return np.asarray(np.add.reduceat(self._rows[self._sent[order]] * self._width[order, None], starts))

    def fold_seconds(self) -> Floats:
        return self._merge_seconds(self._whole[self._flow.folds.chunk], self._flow.folds.heads)

    def copy_seconds(self) -> Floats:
        copies = self._flow.copies
        packed = self._rows[self._sent[copies.transfer]] * self._width[copies.transfer, None]
        return np.asarray(packed * (self._rows[self._sent[copies.beside]] > 0) / self._rates.copy_bytes)

    def call_seconds(self) -> tuple[Floats, Floats]:
        """[calls]: in kernels, and with the merges of what they return."""
        parts, calls = self._flow.parts, self._flow.calls
        if not len(calls.round):
            return np.zeros((0, self._rows.shape[1])), np.zeros((0, self._rows.shape[1]))
        attended = self._attend_seconds()
        merged = self._merge_seconds(self._whole[parts.q], parts.heads) * parts.merges[:, None] * (attended > 0)
        starts = run_starts(parts.call)
        in_kernel = np.add.reduceat(attended, starts)
        in_kernel += (in_kernel > 0) * self._rates.call_seconds
        return in_kernel, in_kernel + np.add.reduceat(merged, starts)

    def busy_seconds(self, num_ranks: int) -> Floats:
        """[ranks, batches]: all that a rank does itself."""
        flow, rates = self._flow, self._rates
        busy = np.zeros((num_ranks, self._rows.shape[1]))
        np.add.at(busy, flow.calls.rank, self.call_seconds()[1])
        np.add.at(busy, flow.folds.rank, self.fold_seconds())
        np.add.at(busy, flow.copies.rank, self.copy_seconds())
        posted = (self.message_bytes() > 0) * rates.message_seconds
        there = np.zeros((flow.num_rounds, num_ranks), bool)
        there[flow.calls.round, flow.calls.rank] = True
        for rank in (flow.messages.src, flow.messages.dst):
            np.add.at(busy, rank, posted)
            there[flow.messages.round, rank] = True
        return np.asarray(busy + there.sum(0)[:, None] * rates.round_seconds)

    def dense_tokens(self) -> Floats:
        """[ranks, batches]: tokens of whose work beside attention a rank does all, or as much."""
        tokens = self._rows[self._whole[self._layout.all_q()]].sum(1)
        return np.asarray(tokens * self._shape.dense_share(self._layout))

    def step_seconds(self, attention: Floats) -> Floats:
        """[batches]: a forward pass, of attention [ranks, batches] and each rank's dense work."""
        shape, rates = self._shape, self._rates
        dense = self.dense_tokens() * shape.dense_flops / rates.dense_flops
        dense = np.maximum(dense, weights_seconds(shape, rates))
        return np.asarray((shape.num_layers * attention + dense).max(0) + rates.step_seconds)

    def _merge_seconds(self, kind: Index, heads: Index) -> Floats:
        rows, rates = self._rows[kind], self._rates
        state_bytes = rows * heads[:, None] * (self._shape.head_dim + 1) * 4
        return np.asarray(state_bytes / rates.merge_bytes + (rows > 0) * rates.fold_seconds)

    def _attend_seconds(self) -> Floats:
        """[parts, batches]. What a part costs depends on the kind of its queries and on how many keys of each kind it
        meets, which one number stands for: a sum of 62 random bits for each kind.
        """
        parts, keys = self._flow.parts, self._flow.keys
        random = Random(0)
        bits = np.array([random.getrandbits(62) for _ in range(len(self._rows))])
        met = self._kind[keys.cut, keys.chunk]
        signature = np.zeros(len(parts.q), np.int64)
        np.add.at(signature, keys.part, bits[met])
        asked = np.stack([self._whole[parts.q], parts.heads, parts.causal, signature], 1)
        one = np.ascontiguousarray(asked, np.int64).view("V32").ravel()
        _, sample, which = np.unique(one, return_index=True, return_inverse=True)
        place = np.full(len(parts.q), -1)
        place[sample] = np.arange(len(sample))
        mine = place[keys.part] >= 0
        num_keys = np.zeros((len(sample), *self._count.shape), np.int64)
        np.add.at(num_keys, place[keys.part[mine]], self._sequence_rows[met[mine]])
        queries = self._sequence_rows[self._whole[parts.q[sample]]]
        kernel, per_pair = self._rates.kernel, 4 * self._shape.head_dim * parts.heads[sample][:, None, None]
        seconds = per_pair * queries * num_keys / kernel.full_rate(queries, num_keys)
        own = np.flatnonzero(parts.causal[sample])
        pairs = queries[own] * (queries[own] + 1) / 2
        seconds[own] += per_pair[own] * pairs / kernel.causal_rate(queries[own])
        return np.asarray((seconds * self._count).sum(2)[which.ravel()])
