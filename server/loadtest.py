"""`python -m server.loadtest`: measures any OpenAI-compatible server with prompts of exact length.

Prompts are random token ids sent to /v1/completions with `ignore_eos`, so that prompt and output have the length
that was asked for whatever the tokenizer does. The exit code is 1 if a request failed or the server's own token
counts differ from that, 130 after Ctrl-C (which still reports what is done).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import orjson
from tqdm import tqdm

from server.loadtest_report import Row, plot, report, summarize, table

UNKNOWN_VOCABULARY = 1000  # ids that every tokenizer in use has
Prompt = npt.NDArray[np.int64]
FIRST_ID = 100  # below are special and single-byte tokens in many vocabularies


@dataclass(frozen=True, slots=True)
class Target:
    """What is known of the server."""

    model: str
    vocab_size: int
    info: dict[str, Any] = field(default_factory=dict)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m server.loadtest", description=__doc__.splitlines()[0])
    add = result.add_argument
    add("--base-url", default="http://127.0.0.1:30000", metavar="URL", help="without /v1")
    add("--model", metavar="NAME", help="default: the first of /v1/models")
    add("--api-key", metavar="KEY")
    add("--prompt-tokens", type=int, default=32768, metavar="N")
    add("--output-tokens", type=int, default=64, metavar="N")
    add("--shared-prefix-tokens", type=int, default=0, metavar="N", help="start of every prompt")
    add("--num-requests", type=int, default=16, metavar="N")
    add("--concurrency", type=int, default=4, metavar="N", help="requests in flight at most")
    add("--rate", type=float, metavar="R", help="arrivals per second, Poisson (default: as soon as there is room)")
    add("--vocab-size", type=int, metavar="N", help="default: asked of the server, else ids below 1000 are used")
    add("--timeout", type=float, default=3600.0, metavar="SECONDS", help="longest wait for the next token")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="all requests, the summary, arguments and versions")
    add("--plot", type=Path, metavar="FILE", help="latency distributions and the timeline as an image")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser()
    args = arguments.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    for name in ("prompt_tokens", "output_tokens", "num_requests", "concurrency"):
        if getattr(args, name) < 1:
            arguments.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.shared_prefix_tokens <= args.prompt_tokens:
        arguments.error("--shared-prefix-tokens must lie between 0 and --prompt-tokens")
    if args.rate is not None and args.rate <= 0:
        arguments.error("--rate must be positive")
    rows: list[Row] = []
    interrupted, target = False, None
    try:
        target = asyncio.run(_measure(args, rows))
    except KeyboardInterrupt:
        interrupted = True
    except (httpx.HTTPError, ValueError) as error:
        print(f"{args.base_url}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    origin = min((row.start for row in rows), default=0.0)
    for row in rows:
        row.shift(-origin)
    summary = summarize(rows)
    print(table(summary))
    if args.json:
        args.json.write_bytes(report(args, target.info if target else {}, summary, rows))
    if args.plot and rows:
        plot(args.plot, args, rows)
    return 130 if interrupted else int(summary["failed"] > 0 or summary["completed"] < args.num_requests)


async def _measure(args: argparse.Namespace, rows: list[Row]) -> Target:
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=None)
    timeout = httpx.Timeout(args.timeout, connect=30, pool=None)  # a prefill may take many minutes
    async with httpx.AsyncClient(base_url=args.base_url, headers=headers, limits=limits, timeout=timeout) as http:
        target = await _discover(http, args)
        await _run_all(http, args, target, rows)
    return target


async def _discover(http: httpx.AsyncClient, args: argparse.Namespace) -> Target:
    info: dict[str, Any] = {}
    with contextlib.suppress(httpx.HTTPStatusError, ValueError):  # not every server has it
        info = (await http.get("/model_info")).raise_for_status().json()
    model = args.model
    if model is None:
        answer = (await http.get("/v1/models")).raise_for_status()
        model = answer.json()["data"][0]["id"]
    return Target(model, args.vocab_size or info.get("vocab_size") or UNKNOWN_VOCABULARY, info)


def make_prompt(args: argparse.Namespace, vocab_size: int, index: int) -> Prompt:
    """The same for the same seed and index. Ids from the end of the vocabulary, often special ones, are left out."""
    low, high = min(FIRST_ID, vocab_size // 4), max(2, vocab_size * 9 // 10)
    shared = np.random.default_rng([args.seed, 0]).integers(low, high, args.shared_prefix_tokens)
    own = args.prompt_tokens - args.shared_prefix_tokens
    return np.concatenate([shared, np.random.default_rng([args.seed, 1 + index]).integers(low, high, own)])


async def _run_all(http: httpx.AsyncClient, args: argparse.Namespace, target: Target, rows: list[Row]) -> None:
    room = asyncio.Semaphore(args.concurrency)
    random = np.random.default_rng(args.seed)
    bar = tqdm(total=args.num_requests, unit="req", desc="Requests")

    async def one(index: int) -> None:
        arrived = time.perf_counter()
        async with room:
            prompt = make_prompt(args, target.vocab_size, index)
            # at a given rate, waiting for room is the server's doing; without one it is not
            row = Row(index, start=arrived if args.rate else time.perf_counter())
            try:
                await _complete(http, args, target.model, prompt, row)
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                row.error = f"{type(error).__name__}: {error}"
            row.check(args.prompt_tokens, args.output_tokens)
            rows.append(row)
            bar.update()
            bar.set_postfix(failed=sum(row.error is not None for row in rows))

    with bar:
        async with asyncio.TaskGroup() as group:
            for index in range(args.num_requests):
                if args.rate:
                    await asyncio.sleep(random.exponential(1 / args.rate) if index else 0)
                group.create_task(one(index))


async def _complete(http: httpx.AsyncClient, args: argparse.Namespace, model: str, prompt: Prompt, row: Row) -> None:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": args.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    content, headers = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), {"Content-Type": "application/json"}
    async with http.stream("POST", "/v1/completions", content=content, headers=headers) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise ValueError(f"HTTP {response.status_code}: {_error_message(text)}")
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue  # comments and blank lines
            data = line[5:].strip()
            if data == "[DONE]":
                row.done = True
                continue
            chunk = orjson.loads(data)
            if "error" in chunk:
                raise ValueError(_error_message(data))
            row.saw(chunk, time.perf_counter())


def _error_message(text: str) -> str:
    try:
        return str(orjson.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:300]


if __name__ == "__main__":
    sys.exit(main())
