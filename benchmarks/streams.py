"""Many token streams over HTTP, read with as little work as it takes: the client shares the machine with the server."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence

CHUNK = b"data: {"  # one of them for each token that has text
SETTLE = 0.15  # of each stream does not count: others are still being prefilled


def inter_token_seconds(port: int, prompts: Sequence[list[int]], num_tokens: int) -> float:
    """The median time between two tokens of a stream, while as many streams run as there are prompts."""
    arrivals = asyncio.run(_all(port, prompts, num_tokens))
    begin = max(times[int(SETTLE * len(times))] for times in arrivals)
    end = min(times[-1] for times in arrivals)
    gaps = [b - a for times in arrivals for a, b in zip(times, times[1:], strict=False) if begin <= a and b <= end]
    if not gaps:
        raise RuntimeError(f"{len(prompts)} streams never ran all at once: more than {num_tokens} tokens are needed")
    return statistics.median(gaps)


async def _all(port: int, prompts: Sequence[list[int]], num_tokens: int) -> list[list[float]]:
    return await asyncio.gather(*(stream(port, prompt, num_tokens) for prompt in prompts))


async def stream(port: int, prompt: list[int], num_tokens: int) -> list[float]:
    """When each token of a greedy completion arrived."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    arrivals: list[float] = []
    seen = b""
    try:
        writer.write(head.encode() + content)
        async with asyncio.timeout(3600):
            while b"[DONE]" not in seen:
                data = await reader.read(1 << 16)
                if not data or b'{"error":' in data:
                    raise RuntimeError(f"the server ended a stream: {(seen + data).decode(errors='replace')[-500:]}")
                arrivals += [time.perf_counter()] * (seen[-len(CHUNK) + 1 :] + data).count(CHUNK)
                seen = data
    finally:
        writer.close()
    return arrivals
