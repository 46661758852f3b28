"""`python -m benchmarks.interference`: do running streams go on while a long prompt is prefilled?

Short requests stream; then one long prompt arrives. Reported are the gaps between a stream's tokens before and during
the long prefill, and the time to first token of the long prompt.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

import httpx
import numpy as np
from tqdm import tqdm

from benchmarks.command import parser_of, write_results
from benchmarks.launched import LaunchedServer

TOKENS_BEFORE = 100  # that each stream has got when the long prompt arrives


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.interference", __doc__, "flags of the server (default: --sp-size 2)")
    parser.add_argument("--prompt-tokens", type=int, default=65536, help="of the long prompt")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="a prompt of 16384 tokens: under a minute")
    args = parser.parse_args(argv)
    if args.quick:
        args.prompt_tokens = 16384
    with LaunchedServer(*(args.server_args or ["--sp-size", "2"])) as server:
        with tqdm(desc="Streaming beside the long prompt", unit="token", disable=None) as progress:
            result = asyncio.run(measure(server.url, args.prompt_tokens, args.streams, progress))
    for name, value in result.items():
        print(f"{name:>32}: {value:.3f}")
    write_results(args.json, result)
    return 0


async def measure(url: str, prompt_tokens: int, num_streams: int, progress: tqdm[NoReturn]) -> dict[str, float]:
    """progress: counts the tokens that are streamed."""
    arrivals: list[list[float]] = [[] for _ in range(num_streams)]
    random = np.random.default_rng(0)
    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(3600, connect=30)) as http:
        vocab_size = (await http.get("/model_info")).raise_for_status().json()["vocab_size"]
        longest = (await http.get("/v1/models")).raise_for_status().json()["data"][0]["max_model_len"]
        streams = [
            asyncio.create_task(stream(http, [100 + i] * 40, times, longest // num_streams - 100, progress))
            for i, times in enumerate(arrivals)
        ]
        async with asyncio.timeout(120):
            while any(len(times) < TOKENS_BEFORE for times in arrivals) and not any(task.done() for task in streams):
                await asyncio.sleep(0.02)
        began = time.perf_counter()
        first: list[float] = []
        await stream(http, random.integers(100, vocab_size * 9 // 10, prompt_tokens).tolist(), first, 1, progress)
        ended = first[0]
        for task in streams:
            if task.done():
                raise RuntimeError("a stream ended before the long prompt was done") from task.exception()
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    before, during = gaps(arrivals, 0.0, began), gaps(arrivals, began, ended)
    if not (before and during):
        raise RuntimeError(f"the long prompt was done too soon to tell: raise --prompt-tokens {prompt_tokens}")
    return {
        "ttft_of_long_prompt_seconds": ended - began,
        "median_gap_before_seconds": float(np.median(before)),
        "median_gap_during_seconds": float(np.median(during)),
        "p99_gap_during_seconds": float(np.quantile(during, 0.99)),
        "longest_gap_during_seconds": float(max(during)),
        "tokens_during": float(len(during)),
    }


async def stream(
    http: httpx.AsyncClient, prompt: list[int], arrivals: list[float], max_tokens: int, progress: tqdm[NoReturn]
) -> None:
    """Notes when each token arrives."""
    body: dict[str, object] = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    body["logprobs"] = 0  # a chunk for every token, those without text too
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                arrivals.append(time.perf_counter())
                progress.update()


def gaps(arrivals: list[list[float]], start: float, end: float) -> list[float]:
    """Seconds between tokens of a stream where the later one lies in [start, end)."""
    return [b - a for times in arrivals for a, b in zip(times, times[1:], strict=False) if start <= b < end]


if __name__ == "__main__":
    sys.exit(main())
