"""What the load test keeps of each request, and what it makes of all of them."""

from __future__ import annotations

import argparse
import datetime
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import orjson

PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Row:
    """Times in seconds since the test began."""

    index: int
    start: float
    first: float | None = None  # the first token's arrival
    end: float | None = None  # the last token's
    prompt_tokens: int | None = None  # as the server counts
    output_tokens: int | None = None
    cached_tokens: int | None = None
    between: list[float] = field(default_factory=list)  # seconds per token after the first one
    done: bool = False  # the stream ended properly
    error: str | None = None
    num_seen: int = 0  # tokens so far; chunks where the server does not count

    def shift(self, seconds: float) -> None:
        self.start += seconds
        self.first = None if self.first is None else self.first + seconds
        self.end = None if self.end is None else self.end + seconds

    def saw(self, chunk: dict[str, Any], now: float) -> None:
        usage = chunk.get("usage")
        if usage:
            self.prompt_tokens, self.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if not chunk.get("choices"):
            return
        num_tokens = usage["completion_tokens"] if usage else self.num_seen + 1
        new = num_tokens - self.num_seen
        if self.first is None:
            self.first = self.end = now
        elif new > 0:
            assert self.end is not None
            self.between += [(now - self.end) / new] * new
            self.end = now
        self.num_seen = max(self.num_seen, num_tokens)

    def check(self, prompt_tokens: int, output_tokens: int) -> None:
        if self.error is not None:
            return
        counted = (self.prompt_tokens, self.output_tokens)
        if not self.done:
            self.error = "the stream ended without [DONE]"
        elif self.first is None:
            self.error = "no token came"
        elif counted not in ((None, None), (prompt_tokens, output_tokens)):
            asked = f"{prompt_tokens} + {output_tokens}"
            self.error = f"asked for {asked} tokens, the server counted {counted[0]} + {counted[1]}"


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    good = [row for row in rows if row.error is None and row.first is not None and row.end is not None]
    first = [(row.first or 0) - row.start for row in good]
    seconds = max((row.end or 0 for row in good), default=0.0) or 1e-9
    prompt_tokens = sum(row.prompt_tokens or 0 for row in good)
    output_tokens = sum(row.output_tokens or row.num_seen for row in good)
    return {
        "completed": len(good),
        "failed": len(rows) - len(good),
        "errors": dict(Counter(row.error for row in rows if row.error is not None)),
        "seconds": seconds,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(row.cached_tokens or 0 for row in good),
        "output_tokens": output_tokens,
        "prefill_tokens_per_second": prompt_tokens / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "requests_per_second": len(good) / seconds,
        "time_to_first_token": _distribution(first),
        "inter_token_latency": _distribution([gap for row in good for gap in row.between]),
        "end_to_end": _distribution([(row.end or 0) - row.start for row in good]),
    }


def _distribution(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    percentiles = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {"mean": float(np.mean(values)), **percentiles, "max": float(np.max(values))}


def table(summary: dict[str, Any]) -> str:
    lines = [
        f"{summary['completed']} completed, {summary['failed']} failed in {summary['seconds']:.2f} s",
        f"prompt tokens {summary['prompt_tokens']} (cached {summary['cached_tokens']}), "
        f"{summary['prefill_tokens_per_second']:.1f}/s;  output tokens {summary['output_tokens']}, "
        f"{summary['output_tokens_per_second']:.1f}/s;  requests {summary['requests_per_second']:.2f}/s",
        f"{'milliseconds':<22}" + "".join(f"{name:>11}" for name in ("mean", "p50", "p90", "p99", "max")),
    ]
    for name in ("time_to_first_token", "inter_token_latency", "end_to_end"):
        if (values := summary[name]) is not None:
            lines.append(
                f"{name.replace('_', ' '):<22}" + "".join(f"{1000 * value:>11.1f}" for value in values.values())
            )
    lines += [f"failed {count} x: {message}" for message, count in summary["errors"].items()]
    return "\n".join(lines)


def report(args: argparse.Namespace, server: dict[str, Any], summary: dict[str, Any], rows: Sequence[Row]) -> bytes:
    arguments = {name: value for name, value in vars(args).items() if name not in ("api_key", "json", "plot")}
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions("sp-serve", "httpx", "numpy")},
        "args": arguments,
        "server": server,
        "summary": summary,
        "requests": [asdict(row) for row in sorted(rows, key=lambda row: row.index)],
    }
    return orjson.dumps(content, option=orjson.OPT_INDENT_2)


def _versions(*names: str) -> dict[str, str]:
    result = {}
    for name in names:
        try:
            result[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            result[name] = "unknown"
    return result


def plot(file: Path, args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Distributions of the three latencies, and when each request waited, prefilled and decoded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [row for row in rows if row.first is not None and row.end is not None]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(
        f"{args.num_requests} requests of {args.prompt_tokens} + {args.output_tokens} tokens, "
        f"concurrency {args.concurrency}"
    )
    series = {
        "time to first token (s)": [(row.first or 0) - row.start for row in good],
        "inter-token latency (ms)": [1000 * gap for row in good for gap in row.between],
        "end to end (s)": [(row.end or 0) - row.start for row in good],
    }
    for axis, (name, values) in zip(axes.flat, series.items(), strict=False):
        axis.ecdf(values) if values else axis.text(0.5, 0.5, "none", ha="center")
        axis.set(xlabel=name, ylabel="share of all", ylim=(0, 1))
        axis.grid(alpha=0.3)
    timeline = axes.flat[3]
    for row in good:
        assert row.first is not None and row.end is not None
        timeline.barh(row.index, row.first - row.start, left=row.start, color="tab:orange")
        timeline.barh(row.index, row.end - row.first, left=row.first, color="tab:blue")
    timeline.set(xlabel="seconds; orange: until the first token, blue: decoding", ylabel="request")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
