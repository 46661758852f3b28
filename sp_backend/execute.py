"""Runs one rank's side of a plan: any plan, any transport, any kernel.

A round posts its receives, then its sends, then attends. What arrives is waited for once, at its first use;
an arriving state is folded after the attends of the round that follows, or before its slot is sent on. A
message's memory returns to the pool one round after its last block died, when what was sent from it has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sp_backend.buffers import BufferPool, as_bytes
from sp_backend.counting import Counters
from sp_backend.geometry import Geometry
from sp_backend.kernels import Kernel
from sp_backend.kv_cache import Rows
from sp_backend.layout import KV, STATE, Block, Q
from sp_backend.messages import Arrival, ArrivingState, Leaving, view_of_rows, view_of_state
from sp_backend.operands import Operands
from sp_backend.pieces import MOST_HISTORY, moves_history
from sp_backend.plan import Plan
from sp_backend.schedule import Envelope, KernelCall, Schedule, ScheduleBuilder, Section
from sp_backend.slots import Slots
from sp_backend.state import AttentionState
from sp_backend.transport import Expected, Message, Transport

Keep = Callable[[Block, Tensor], None]


class Executor:
    """One per plan and rank. `schedule` once a step (and window), `run` once a layer."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        kernel: Kernel,
        transport: Transport,
        *,
        head_dim: int,
        dtype: torch.dtype,
        scale: float | None = None,
        device: torch.device | str = "cpu",
        pool: BufferPool | None = None,
        overlap: bool = True,
        most_history: int = MOST_HISTORY,
    ) -> None:
        """overlap: False waits for a round's transfers before its attends, to see what hiding them is worth.
        most_history: cached keys of other ranks that come in one round; equal on all ranks. See pieces.py.
        """
        if head_dim % 2:
            raise ValueError(f"head_dim must be even, not {head_dim}")
        assert (transport.rank, transport.size) == (rank, plan.layout.num_ranks), "transport of another group"
        self.plan, self.rank, self.transport = plan, rank, transport
        self.head_dim, self.dtype, self.device = head_dim, dtype, torch.device(device)
        self.pool, self.overlap = pool or BufferPool(device), overlap
        self.counters = Counters()
        self._builder = ScheduleBuilder(
            plan=plan,
            rank=rank,
            kernel=kernel,
            head_dim=head_dim,
            itemsize=dtype.itemsize,
            scale=head_dim**-0.5 if scale is None else scale,
            device=self.device,
            most_history=most_history if moves_history(plan) else None,
        )
        self.program = self._builder.program(())

    def schedule(
        self, geometry: Geometry, window: int | None = None, places: Mapping[int, Rows] | None = None
    ) -> Schedule:
        """places: chunks of this rank whose keys are in pages when the schedule is run, and where."""
        return self._builder.build(geometry, window, places or {})

    def run(
        self,
        schedule: Schedule,
        q: Mapping[int, Tensor],
        kv: Mapping[int, Tensor],
        pages: Tensor | None = None,
        keep: Keep | None = None,
        results: Mapping[int, AttentionState] | None = None,
    ) -> Mapping[int, AttentionState]:
        """The state of every query chunk that ends on this rank.

        q: chunk -> [rows, heads, head_dim]; kv: chunk -> [rows, 2, kv_heads, head_dim], both in the model's
        dtype, a chunk's rows being its sequences', one after the other. Empty chunks may be absent. In layout
        heads, q has this rank's heads only. Neither may be written to before this returns.
        pages: [slots, 2, kv_heads, head_dim] for a schedule with places. What has a place is attended there, and need
        not be in kv; if it is, it is sent from there.
        keep: is shown every KV block that came, once, as rows like those of kv; it has to copy them.
        results: chunk -> where to write its state, `out` in any precision. None: new ones are made, in fp32.
        """
        run = Run(self, schedule, q, kv, pages, keep, results)
        for i in range(len(schedule.rounds)):
            run.post(i)
            run.attend(i)
        return run.finish()


class Run:
    """One layer on one rank: post(0), attend(0), post(1), ..., then finish(). In lockstep the ranks take turns."""

    def __init__(
        self,
        executor: Executor,
        schedule: Schedule,
        q: Mapping[int, Tensor],
        kv: Mapping[int, Tensor],
        pages: Tensor | None = None,
        keep: Keep | None = None,
        results: Mapping[int, AttentionState] | None = None,
    ) -> None:
        self._executor, self._schedule, self._keep = executor, schedule, keep
        self._results = results
        own = {block: (q if block.operand == Q else kv).get(block.chunk) for block in executor.program.start}
        self._operands = Operands(
            {block: tensor for block, tensor in own.items() if tensor is not None},
            pages,
            head_dim=executor.head_dim,
            dtype=executor.dtype,
            counters=executor.counters,
        )
        self._arriving: list[ArrivingState] = []
        self._slots = Slots(executor.program.slots, schedule.rows, executor.head_dim, executor.pool)
        self._usable: list[ArrivingState] = []  # asked for in an earlier round
        self._leaving = Leaving()
        self._left = Leaving()  # in the round before
        self._receiving: list[Arrival] = []

    def post(self, index: int) -> None:
        """Ask for what comes in a round and send what leaves."""
        r = self._schedule.rounds[index]
        self._left, self._leaving = self._leaving, Leaving()
        expected = [Expected(e.peer, e.num_bytes) for e in r.receives]
        receiving, self._leaving.sending = self._executor.transport.exchange(expected, self._messages(r.sends))
        self._usable, self._arriving = self._arriving, []
        self._receiving = [
            Arrival(envelope, coming, len(envelope.sections))
            for envelope, coming in zip(r.receives, receiving, strict=True)
        ]
        for arrival in self._receiving:
            self._expect(arrival)

    def attend(self, index: int) -> None:
        """Do a round's kernel calls, fold the states that came in the round before, and free what was read."""
        r = self._schedule.rounds[index]
        if not self._executor.overlap:
            for arrival in self._receiving:
                self._operands.wait(arrival)
            for sending in self._leaving.sending:
                self._executor.counters.timed(sending.wait)
        for call in r.calls:
            self._call(call)
        for arriving in self._usable:
            self._fold_arrived(arriving)
        for block in r.dead:
            self._drop(block)
        self._settle(self._left)

    def finish(self) -> Mapping[int, AttentionState]:
        results = self._new_results() if self._results is None else self._results
        for block in self._executor.program.finish:
            last = None
            for arriving in [a for a in self._arriving if a.section.use.block.chunk == block.chunk]:
                if last is not None:
                    self._fold_arrived(last)
                last = arriving
            self._finish(block, last, results[block.chunk])
        for block in self._operands.expected():  # came to be kept alone
            self._drop(block)
        self._settle(self._leaving)
        self._slots.clear()
        counters = self._executor.counters
        counters.query_key_pairs += self._schedule.query_key_pairs
        return results

    def _new_results(self) -> dict[int, AttentionState]:
        ex, blocks = self._executor, self._executor.program.finish
        sizes = {b.chunk: (self._schedule.rows[b.chunk], b.heads[1] - b.heads[0]) for b in blocks}
        return {chunk: AttentionState.empty(*size, ex.head_dim, ex.device) for chunk, size in sizes.items()}

    def _finish(self, block: Block, last: ArrivingState | None, target: AttentionState) -> None:
        """Write a state to its place, merged with the last that came on the way there."""
        if last is not None and last.section.use.block.heads != block.heads:
            self._fold_arrived(last)
            last = None
        if last is None:
            self._slots.finish(block, None, target)
        else:
            self._slots.finish(block, self._came(last), target)
            self._release(last.arrival)

    def _expect(self, arrival: Arrival) -> None:
        """Note the blocks of a message that was asked for."""
        for section in arrival.envelope.sections:
            if section.use.block.operand == STATE:
                self._arriving.append(ArrivingState(section, arrival))
            else:
                self._operands.expect(section.use.block, arrival)

    def _messages(self, envelopes: Sequence[Envelope]) -> Iterator[Message]:
        for envelope in envelopes:
            self._executor.counters.bytes_sent += envelope.num_bytes
            yield Message(envelope.peer, self._pack(envelope))

    def _pack(self, envelope: Envelope) -> Tensor:
        sections, slices, operands = envelope.sections, self._schedule.slices, self._operands
        if not any(s.use.block.operand == STATE or operands.scattered(slices[s.use]) is not None for s in sections):
            whole = as_bytes([operands.read(slices[s.use]) for s in sections])
            if whole is not None:
                return whole
        ex = self._executor
        buffer = ex.transport.take(envelope.num_bytes)
        for section in sections:
            if section.use.block.operand == STATE:
                self._move_state(section, view_of_state(buffer, section, ex.dtype))
            else:
                operands.copy(slices[section.use], view_of_rows(buffer, section, ex.head_dim, ex.dtype))
        return buffer

    def _call(self, call: KernelCall) -> None:
        q = self._operands.queries(call)
        kv = self._operands.keys(call, self._executor.pool, self._leaving.buffers)
        self._slots.attend(call, q, kv)
        self._executor.counters.kernel_calls += 1

    def _came(self, arriving: ArrivingState) -> AttentionState:
        return view_of_state(self._operands.wait(arriving.arrival), arriving.section, self._executor.dtype)

    def _fold_arrived(self, arriving: ArrivingState) -> None:
        self._slots.fold(arriving.section.use.block, self._came(arriving))
        self._release(arriving.arrival)

    def _move_state(self, section: Section, target: AttentionState) -> None:
        """Write a state into a message and empty its slot."""
        block = section.use.block
        for arriving in [a for a in self._arriving if a.section.use.block.chunk == block.chunk]:
            self._fold_arrived(arriving)
            self._arriving.remove(arriving)
        self._slots.move(block, target)

    def _drop(self, block: Block) -> None:
        """Give up a received block, if it came at all."""
        if (arrival := self._operands.arrival(block)) is not None:
            if self._keep is not None and block.operand == KV:
                self._keep(block, self._operands.came(block))
            self._release(arrival)
            self._operands.forget(block)

    def _release(self, arrival: Arrival) -> None:
        """One of a message's blocks will not be read again."""
        arrival.live -= 1
        if arrival.live == 0:
            self._operands.wait(arrival)  # its calls may all have been empty
            self._leaving.read.append(arrival.receiving)

    def _settle(self, leaving: Leaving) -> None:
        for sending in leaving.sending:
            self._executor.counters.timed(sending.wait)
        for receiving in leaving.read:
            receiving.release()
        for buffer in leaving.buffers:
            self._executor.pool.give(buffer)
