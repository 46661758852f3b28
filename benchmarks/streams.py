"""Many token streams over HTTP, read with as little work as it takes: the client shares the machine with the server.

It looks for data once a millisecond, all streams together. A client that is woken for every token takes more of the two
cores than the scheduler does, and each wake-up interrupts a worker or the server.
"""

from __future__ import annotations

import json
import selectors
import socket
import statistics
import time
from collections.abc import Callable, Sequence

CHUNK = b"data: {"  # one of them for each token that has text
DONE = b"data: [DONE]"
SETTLE = 0.15  # of each stream does not count: others are still being prefilled
RESOLUTION = 0.001  # seconds
REMEMBERED = 500  # bytes of each stream, for what is cut between two reads, and for the message of a failure
PATIENCE = 3600.0  # seconds that all streams may take together


def inter_token_seconds(port: int, prompts: Sequence[list[int]], num_tokens: int) -> float:
    """The median time between two tokens of a stream, while as many streams run as there are prompts."""
    return statistics.median(gaps(port, prompts, num_tokens))


def gaps(
    port: int, prompts: Sequence[list[int]], num_tokens: int, tell: Callable[[bool], None] = lambda all_run: None
) -> list[float]:
    """Seconds between two tokens of each stream, while as many streams run as there are prompts. tell: see
    read_streams.
    """
    arrivals = read_streams(port, prompts, num_tokens, tell)
    begin = max(times[int(SETTLE * len(times))] for times in arrivals)
    end = min(times[-1] for times in arrivals)
    found = [b - a for times in arrivals for a, b in zip(times, times[1:], strict=False) if begin <= a and b <= end]
    if not found:
        raise RuntimeError(f"{len(prompts)} streams never ran all at once: more than {num_tokens} tokens are needed")
    return found


def read_streams(
    port: int, prompts: Sequence[list[int]], num_tokens: int, tell: Callable[[bool], None] = lambda all_run: None
) -> list[list[float]]:
    """When each token of each greedy completion arrived; all run at once. tell: called with True once every stream has
    a token, with False as soon as one has ended.
    """
    streams = [_Stream(port, prompt, num_tokens) for prompt in prompts]
    deadline = time.perf_counter() + PATIENCE
    all_run: bool | None = None
    with selectors.DefaultSelector() as selector:
        try:
            for stream in streams:
                selector.register(stream.socket, selectors.EVENT_READ, stream)
            while selector.get_map():
                ready = selector.select(deadline - time.perf_counter())
                now = time.perf_counter()
                if now >= deadline:
                    raise TimeoutError(f"{len(selector.get_map())} streams did not end within {PATIENCE:g} s")
                for key, _ in ready:
                    if key.data.read(now):
                        selector.unregister(key.fileobj)
                if all_run is None and all(stream.arrivals for stream in streams):
                    tell(all_run := True)
                if all_run and len(selector.get_map()) < len(streams):
                    tell(all_run := False)
                time.sleep(RESOLUTION)
        finally:
            for stream in streams:
                stream.socket.close()
    return [stream.arrivals for stream in streams]


class _Stream:
    def __init__(self, port: int, prompt: list[int], num_tokens: int) -> None:
        body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        content = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        self.arrivals: list[float] = []
        self._last = b""
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.sendall(head.encode() + content)

    def read(self, now: float) -> bool:
        """Notes the tokens that have come; whether they were the last ones."""
        data = self.socket.recv(1 << 16)
        self.arrivals += [now] * (self._last[-len(CHUNK) + 1 :] + data).count(CHUNK)
        ended = DONE in self._last[-len(DONE) + 1 :] + data
        self._last = (self._last + data)[-REMEMBERED:]
        if not data or b'{"error":' in self._last:
            raise RuntimeError(f"the server ended a stream: {self._last.decode(errors='replace')}")
        return ended
