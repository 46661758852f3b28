"""A worker process without a model, for the tests of the pool. Misbehaves as `argv[1]` says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import zmq

from sp_backend.commands import (
    Failure,
    Loading,
    Ready,
    SampledToken,
    Shutdown,
    StepResult,
    decode_command,
    decode_start,
    encode,
)


def main() -> None:
    mode, rank_of_mode = sys.argv[1].split(":") if len(sys.argv) > 1 else ("well", "-1")
    start = decode_start(sys.stdin.buffer.read())
    if int(rank_of_mode) != start.rank:
        mode = "well"
    if mode == "exits-early":
        print("no such model", file=sys.stderr)
        sys.exit(3)
    if mode == "sleeps":
        time.sleep(60)
    socket = zmq.Context().socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, str(start.rank).encode())
    socket.connect(start.address)
    if mode == "fails":
        socket.send(encode(Failure(start.rank, "weights do not fit")))
        time.sleep(0.5)
        sys.exit(1)
    if mode == "ignores-sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "60"])
        print(f"child {child.pid}", flush=True)
    for num_loaded in (1, 2):
        socket.send(encode(Loading(start.rank, num_loaded, 2)))
    plans = {"local": "other" if mode == "other-plan" else "same"}
    socket.send(encode(Ready(start.rank, 100 - start.rank, start.config.page_size, plans, 0)))
    while True:
        command = decode_command(socket.recv())
        if isinstance(command, Shutdown):
            if mode == "ignores-sigterm":
                continue
            return
        if mode == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "hangs":
            time.sleep(60)
        if mode == "slow":
            time.sleep(0.5)
        tokens = [
            SampledToken(sequence.request_id, 7)
            for group in command.groups
            for sequence in group.sequences
            if sequence.sampling and start.rank == 0
        ]
        socket.send(encode(StepResult(command.step_id, start.rank, tokens, 0.001, 0, 0, 0.0)))


main()
