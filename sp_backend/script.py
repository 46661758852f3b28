"""What a simulated rank does, step by step: the plan's flow with durations. Pure: no torch.

Shares no timing with cost.py: only what is done (flow.py), how many bytes a block has, and the machine's rates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from sp_backend.columns import Index
from sp_backend.flow import Flow, flow_of
from sp_backend.geometry import Geometry, block_bytes, visible_pairs
from sp_backend.layout import KV, STATE, Block, Q
from sp_backend.plan import Plan
from sp_backend.shape import ModelShape
from sp_backend.topology import Rates

Kind = Literal["dense", "overhead", "pack", "attend", "merge", "send", "wait"]
_WHOLE: Final = (0, 1)


@dataclass(frozen=True, slots=True)
class Work:
    """So many seconds of the rank's own."""

    kind: Kind
    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Post:
    """One end of a message is ready."""

    message: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Until a message is through."""

    message: int


Step = Work | Post | Wait


class Script:
    """Of every rank of a plan, for one batch. Empty messages are neither posted nor waited for."""

    def __init__(self, plan: Plan, rates: Rates, shape: ModelShape, geometry: Geometry) -> None:
        self._layout, self._rates, self._shape, self._geometry = plan.layout, rates, shape, geometry
        flow = self._flow = flow_of(plan)
        t, forms = flow.columns.transfers, flow.forms
        self._blocks = [forms.block(f, c) for f, c in zip(forms.transfer.tolist(), t.chunk.tolist(), strict=True)]
        carried: list[list[Block]] = [[] for _ in flow.messages.round]
        for block, message in zip(self._blocks, flow.message_of.tolist(), strict=True):
            carried[message].append(block)
        self.ends = list(zip(flow.messages.src.tolist(), flow.messages.dst.tolist(), strict=True))  # of messages
        self.names = [_named(blocks) for blocks in carried]
        self.bytes = [sum(map(self._bytes, blocks)) for blocks in carried]
        self._tables = _Tables(flow)
        self._speeds: dict[tuple[int, int, bool], float] = {}  # of the kernel, by block

    def dense(self, rank: int) -> Work:
        """A layer's part of the step's other work, on the tokens whose queries the rank holds."""
        shape, rates = self._shape, self._rates
        tokens = float(sum(row[c] for row in self._geometry.rows for c in self._layout.q_of(rank)))
        tokens *= shape.dense_share(self._layout)
        weights = shape.dense_flops / 2 * shape.itemsize / rates.memory_bytes
        seconds = max(tokens * shape.dense_flops / rates.dense_flops, weights) / shape.num_layers
        return Work("dense", "all but attention", seconds)

    def attention(self, rank: int) -> Iterator[Step]:
        """One layer, in the executor's order."""
        flow, tables = self._flow, self._tables
        for index in range(flow.num_rounds):
            at = index, rank
            calls, folds = tables.calls[at], tables.folds[at]
            if tables.receives[at] or tables.sends[at] or calls:
                yield Work("overhead", f"round {index}", self._rates.round_seconds)
            yield from self._post("receive", tables.receives[at])
            yield from self._wait(flow.waits.message[tables.waits[at]])
            yield from self._merge_arrivals([f for f in folds if flow.folds.before[f]])
            yield from map(self._pack, tables.copies[at])
            yield from self._post("send", tables.sends[at])
            for call in calls:
                yield from self._attend(call)
            yield from self._merge_arrivals([f for f in folds if not flow.folds.before[f]])
            yield from self._wait(tables.sends[index - 1, rank])  # the memory sent from is needed again

    def _post(self, what: str, messages: list[int]) -> Iterator[Step]:
        for message in messages:
            if self.bytes[message]:
                yield Work("overhead", f"{what} {self.names[message]}", self._rates.message_seconds)
                yield Post(message)

    def _wait(self, messages: Iterable[int]) -> Iterator[Wait]:
        return (Wait(int(message)) for message in messages if self.bytes[message])

    def _merge_arrivals(self, folds: list[int]) -> Iterator[Step]:
        table = self._flow.folds
        for fold in folds:
            yield from self._wait([table.message[fold]])
            yield self._merge(int(table.chunk[fold]), int(table.heads[fold]))

    def _attend(self, call: int) -> Iterator[Step]:
        flow, parts = self._flow, self._tables.parts[call]
        yield from self._wait(flow.call_waits.message[self._tables.call_waits[call]])
        seconds = {part: self._kernel_seconds(part) for part in parts}
        if not any(seconds.values()):
            return
        name = "; ".join(map(self._part_name, parts))
        yield Work("attend", name, sum(seconds.values()) + self._rates.call_seconds)
        for part in parts:
            if flow.parts.merges[part] and seconds[part]:
                yield self._merge(int(flow.parts.q[part]), int(flow.parts.heads[part]))

    # Sizes and durations

    def _bytes(self, block: Block) -> int:
        rows = self._geometry.num_rows(block)
        return block_bytes(self._layout, block, rows, self._shape.head_dim, self._shape.itemsize)

    def _pack(self, copy: int) -> Work:
        """A block into its message."""
        copies = self._flow.copies
        block, beside = (self._blocks[rows[copy]] for rows in (copies.transfer, copies.beside))
        num_bytes = self._bytes(block) if self._geometry.num_rows(beside) else 0
        return Work("pack", _named([block]), num_bytes / self._rates.copy_bytes)

    def _merge(self, chunk: int, heads: int) -> Work:
        block, rates = Block(STATE, chunk, (0, heads)), self._rates
        rows = self._geometry.num_rows(block)
        seconds = rows * heads * 4 * (self._shape.head_dim + 1) / rates.merge_bytes + rates.fold_seconds if rows else 0
        return Work("merge", _named([block]), seconds)

    def _kernel_seconds(self, part: int) -> float:
        """Of one query chunk of a call, without what a call costs."""
        flow, geometry = self._flow, self._geometry
        q = Block(Q, int(flow.parts.q[part]), (0, int(flow.parts.heads[part])))
        per_pair = 4 * self._shape.head_dim * q.heads[1]
        spans = [geometry.spans(kv) for kv in self._keys(part)]
        seconds = 0.0
        for s, (lo, hi) in enumerate(geometry.spans(q)):
            queries, others = hi - lo, sum(end - start for start, end in (span[s] for span in spans))
            if queries and others:
                seconds += per_pair * queries * others / self._rate(queries, others, False)
            if queries and flow.parts.causal[part]:
                seconds += per_pair * visible_pairs(queries, queries, True) / self._rate(queries, queries, True)
        return seconds

    def _keys(self, part: int) -> list[Block]:
        """The blocks of keys that a part meets whole."""
        keys = self._flow.keys
        rows = self._tables.keys[part]
        cuts = [self._flow.forms.cuts[cut] for cut in keys.cut[rows]]
        return [Block(KV, int(c), (0, 1), cut) for c, cut in zip(keys.chunk[rows], cuts, strict=True)]

    def _part_name(self, part: int) -> str:
        q, keys = int(self._flow.parts.q[part]), self._keys(part)
        own = [Block(KV, q, (0, 1))] if self._flow.parts.causal[part] else []
        return f"q{q}: {_named([*keys, *own])}{'*' if own else ''}"

    def _rate(self, queries: int, keys: int, causal: bool) -> float:
        kernel, key = self._rates.kernel, (queries, keys, causal)
        if key not in self._speeds:
            self._speeds[key] = float(kernel.causal_rate(queries) if causal else kernel.full_rate(queries, keys))
        return self._speeds[key]


class _Tables:
    """Rows of a flow's tables, by the round and rank, the call or the part that they belong to."""

    def __init__(self, flow: Flow) -> None:
        messages = flow.messages
        self.receives = _rows_by(messages.round, messages.dst)
        self.sends = _rows_by(messages.round, messages.src)
        self.waits, self.folds, self.copies, self.calls = (
            _rows_by(table.round, table.rank) for table in (flow.waits, flow.folds, flow.copies, flow.calls)
        )
        self.call_waits = _rows_by(flow.call_waits.round)
        self.parts = _rows_by(flow.parts.call)
        self.keys = _rows_by(flow.keys.part)


def _rows_by(*columns: Index) -> dict[object, list[int]]:
    """Keys are numbers, or with several columns tuples of them."""
    rows: dict[object, list[int]] = defaultdict(list)
    keys = zip(*(c.tolist() for c in columns), strict=True) if len(columns) > 1 else columns[0].tolist()
    for row, key in enumerate(keys):
        rows[key].append(row)
    return rows


def _named(blocks: Iterable[Block]) -> str:
    """Operands and chunks, as kv0,3(1/2)."""
    by_operand: dict[str, list[str]] = defaultdict(list)
    for b in blocks:
        piece = "" if b.piece == _WHOLE else f"({b.piece[0]}/{b.piece[1]})"
        by_operand[b.operand.lower()].append(f"{b.chunk}{piece}")
    return " ".join(f"{operand}{','.join(chunks)}" for operand, chunks in by_operand.items())
