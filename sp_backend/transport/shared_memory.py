"""Ranks of one host: messages are written once, into memory that the peers map, and read where they lie.

A pair of ranks has a Unix socket. What goes over it are notes of a few bytes: this segment now holds a message, this
one was read, that one is no more. The kernel wakes a rank that waits for a note, orders notes after the writes that
they tell of, and ends the socket with the process, so that a dead peer is seen at once. A segment is memory without a
name (memfd), passed over the socket: nothing of it outlives the ranks, however they end. Linux only.
"""

from __future__ import annotations

import mmap
import os
import secrets
import select
import socket
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sp_backend.transport import Expected, Message, Receiving, Sending, Transport
from sp_backend.transport.gather import gather_bytes

_NOTE = struct.Struct("<BQQ")  # what, segment, bytes
_SENT, _READ, _GONE = range(3)
_SPIN_SECONDS = 50e-6  # of asking for a note before sleeping: what it costs to be woken
GRANULE = 1 << 16  # bytes; segments are multiples


def host_of_this_process() -> str:
    """Equal for processes that can share memory and sockets; empty where that is not possible."""
    if sys.platform != "linux":
        return ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/net')} {os.getuid()}"


def shared_memory(control: Transport, timeout: float) -> SharedMemoryTransport | None:
    """The group of `control` over shared memory; None if its ranks are not all on one host. Collective.

    timeout: seconds that a rank waits for another.
    """
    hosts = gather_bytes(control, host_of_this_process().encode())
    if not hosts[0] or len(set(hosts)) > 1:
        return None
    return SharedMemoryTransport(control.rank, control.size, _connect(control, timeout), timeout)


def _connect(control: Transport, timeout: float) -> dict[int, socket.socket]:
    """A connected socket to every peer: the lower rank of a pair listens, under a name that only the group knows."""
    rank, size = control.rank, control.size
    mine = f"\0sp-backend-{secrets.token_hex(16)}"  # abstract: no file
    sockets: dict[int, socket.socket] = {}
    with _socket(timeout) as listener:
        listener.bind(mine)
        listener.listen(size)
        names = [name.decode() for name in gather_bytes(control, mine.encode())]
        for peer in range(rank):
            sockets[peer] = _socket(timeout)
            sockets[peer].connect(names[peer])
            sockets[peer].send(rank.to_bytes(4, "little"))
        for _ in range(rank + 1, size):
            accepted, _ = listener.accept()
            accepted.settimeout(timeout)
            sockets[int.from_bytes(accepted.recv(4), "little")] = accepted
    for connected in sockets.values():
        connected.setblocking(False)
    return sockets


def _socket(timeout: float) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(timeout)
    return made


class _Segment:
    """This rank's memory for one message, and the descriptor by which peers map it."""

    def __init__(self, number: int, fd: int, num_bytes: int) -> None:
        """Keeps fd."""
        self.number, self.fd = number, fd
        os.ftruncate(fd, num_bytes)
        self.data = _mapped(fd)

    def __del__(self) -> None:
        os.close(self.fd)


def _mapped(fd: int) -> Tensor:
    """[bytes] uint8: all of a segment, for as long as the tensor lives, also after fd is closed."""
    return torch.frombuffer(mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), dtype=torch.uint8)


@dataclass(slots=True)
class _Peer:
    rank: int
    socket: socket.socket
    num_expected: int = 0  # messages, so far
    num_came: int = 0
    came: dict[int, tuple[int, int]] = field(default_factory=dict)  # message -> segment, bytes: not yet waited for
    theirs: dict[int, Tensor] = field(default_factory=dict)  # its segments, by number
    knows: set[int] = field(default_factory=set)  # this rank's segments
    speaks: bool = True  # there may be notes of its to read, also of a peer that is gone
    hears: bool = True


class SharedMemoryTransport:
    """One rank's end. Made by `shared_memory`."""

    name = "shared_memory"

    def __init__(self, rank: int, size: int, sockets: dict[int, socket.socket], timeout: float) -> None:
        self.rank, self.size, self._timeout = rank, size, timeout
        self._peers = {peer: _Peer(peer, connected) for peer, connected in sockets.items()}
        self._segments: dict[int, _Segment] = {}  # all of this rank's
        self._free: list[_Segment] = []
        self._taken: dict[int, _Segment] = {}  # by address: to be sent
        self._num_made = 0
        self._failed = ""  # why, once ranks are out of step

    @property
    def num_bytes(self) -> int:
        """Of this rank's segments."""
        return sum(segment.data.numel() for segment in self._segments.values())

    def take(self, num_bytes: int) -> Tensor:
        segment = self._segment(num_bytes)
        self._taken[segment.data.data_ptr()] = segment
        return segment.data[:num_bytes]

    def exchange(self, receives: Sequence[Expected], sends: Iterable[Message]) -> tuple[list[Receiving], list[Sending]]:
        if self._failed:  # a message of then would be taken for one of now
            raise RuntimeError(f"{self._failed}; after that, connect the ranks anew")
        receiving: list[Receiving] = [_Receive(self, self._peers[e.peer], e.num_bytes) for e in receives]
        return receiving, [self._send(m) for m in sends]

    def _send(self, message: Message) -> Sending:
        """The data has left when this returns."""
        segment = self._taken.pop(message.data.data_ptr(), None)
        if segment is None:
            segment = self._segment(message.data.numel())
            segment.data[: message.data.numel()].copy_(message.data)
        self._tell(self._peers[message.peer], _SENT, segment.number, message.data.numel(), segment)
        return _SENDING

    def _segment(self, num_bytes: int) -> _Segment:
        """The smallest free one that fits; if there is none, a new one in place of the largest free one."""
        for peer in self._peers.values():
            self._read_notes(peer)
        fitting = [segment for segment in self._free if segment.data.numel() >= num_bytes]
        if fitting:
            best = min(fitting, key=lambda segment: segment.data.numel())
            self._free.remove(best)
            return best
        if self._free:
            self._discard(max(self._free, key=lambda segment: segment.data.numel()))
        size = -(-num_bytes // GRANULE) * GRANULE
        self._num_made += 1
        made = self._segments[self._num_made] = _Segment(self._num_made, os.memfd_create("sp_backend"), size)
        return made

    def _discard(self, segment: _Segment) -> None:
        self._free.remove(segment)
        del self._segments[segment.number]
        for peer in self._peers.values():
            if peer.hears and segment.number in peer.knows:
                peer.knows.remove(segment.number)
                self._tell(peer, _GONE, segment.number)

    def _tell(self, peer: _Peer, what: int, number: int, num_bytes: int = 0, segment: _Segment | None = None) -> None:
        """Send a note, and with it the segment that it is about, if that is new to the peer."""
        note = _NOTE.pack(what, number, num_bytes)
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                if segment is None or number in peer.knows:
                    peer.socket.send(note)
                else:
                    socket.send_fds(peer.socket, [note], [segment.fd])
                    peer.knows.add(number)
                return
            except BlockingIOError:  # its notes pile up: it is busy, or waits for this rank to read
                for other in self._peers.values():
                    self._read_notes(other)
                if not self._sleep(peer, select.POLLOUT | select.POLLIN, deadline):
                    raise self._timed_out(f"rank {peer.rank} took nothing") from None
            except (BrokenPipeError, ConnectionResetError):
                peer.hears = False  # what it sent before it left is still to be read
                if what == _SENT:
                    raise self._failure(f"rank {peer.rank} is gone") from None
                return

    def _message(self, peer: _Peer, index: int, num_bytes: int) -> tuple[int, Tensor]:
        """Wait for the peer's message of that number: its segment, and what it says."""
        began = time.monotonic()
        while index not in peer.came:
            read = self._read_notes(peer)
            if not peer.speaks and index not in peer.came:
                raise self._failure(f"rank {peer.rank} is gone")
            spun = time.monotonic() - began > _SPIN_SECONDS
            if not read and spun and not self._sleep(peer, select.POLLIN, began + self._timeout):
                raise self._timed_out(f"nothing came from rank {peer.rank}")
        number, came = peer.came.pop(index)
        if came != num_bytes:
            raise self._failure(f"rank {peer.rank} sent {came} bytes, not {num_bytes}: give all ranks equal arguments")
        return number, peer.theirs[number][:num_bytes]

    def _timed_out(self, what: str) -> RuntimeError:
        return self._failure(f"{what} (time limit {self._timeout:g} s)")

    def _failure(self, what: str) -> RuntimeError:
        self._failed = f"rank {self.rank}: {what}"
        return RuntimeError(self._failed)

    def _sleep(self, peer: _Peer, events: int, deadline: float) -> bool:
        """Until the peer's socket is ready: False, if that takes too long."""
        poll = select.poll()
        poll.register(peer.socket, events)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1e3))

    def _read_notes(self, peer: _Peer) -> bool:
        """Take in what the peer has said. False if that is nothing."""
        read = False
        while peer.speaks:
            try:
                note, fds, flags, _ = socket.recv_fds(peer.socket, _NOTE.size, 1)
            except BlockingIOError:
                return read
            except ConnectionResetError:  # said once of a peer that did not read all; its own notes come next
                continue
            read = True
            if not note:
                peer.speaks = peer.hears = False
                return read
            what, number, num_bytes = _NOTE.unpack(note)
            if what == _SENT:
                if fds or flags & socket.MSG_CTRUNC:
                    peer.theirs[number] = self._new_segment(peer, fds)
                peer.came[peer.num_came] = number, num_bytes
                peer.num_came += 1
            elif what == _READ:
                self._free.append(self._segments[number])
            else:
                del peer.theirs[number]
        return read

    def _new_segment(self, peer: _Peer, fds: Sequence[int]) -> Tensor:
        """What came with a note; nothing, where this process may open no more files."""
        if not fds:
            raise self._failure(f"too many open files to read what rank {peer.rank} sends: raise `ulimit -n`")
        try:
            return _mapped(fds[0])
        except OSError as error:
            raise self._failure(f"what rank {peer.rank} sends cannot be mapped: {error}") from error
        finally:
            os.close(fds[0])


class _Receive:
    def __init__(self, transport: SharedMemoryTransport, peer: _Peer, num_bytes: int) -> None:
        self._transport, self._peer, self._num_bytes = transport, peer, num_bytes
        self._index, peer.num_expected = peer.num_expected, peer.num_expected + 1
        self._came: tuple[int, Tensor] | None = None  # segment, message

    def wait(self) -> Tensor:
        if self._came is None:
            self._came = self._transport._message(self._peer, self._index, self._num_bytes)
        return self._came[1]

    def release(self) -> None:
        assert self._came is not None, "released before it was waited for"
        if self._peer.hears:
            self._transport._tell(self._peer, _READ, self._came[0])


class _Left:
    def wait(self) -> None:
        return


_SENDING = _Left()
