"""The load test against a real server: what it asks, counts, reports and returns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scheduler.request import QueueFull
from server.loadtest import main
from tests.server.fake_client import FakeClient
from tests.server.live import Live, live_server


def run(live: Live, *arguments: str) -> int:
    small = ["--prompt-tokens", "300", "--output-tokens", "5", "--num-requests", "6", "--concurrency", "3"]
    return main(["--base-url", live.url, *small, *arguments])


def test_exact_lengths_and_a_full_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with live_server(FakeClient(prefill_seconds=0.02, token_seconds=0.004, cached_tokens=128)) as live:
        file, image = tmp_path / "out.json", tmp_path / "out.png"
        arguments = ["--shared-prefix-tokens", "200", "--api-key", "s3cret", "--json", str(file), "--plot", str(image)]
        assert run(live, *arguments) == 0
        requests = live.client.requests
    assert [len(request.prompt) for request in requests] == [300] * 6
    assert len({tuple(request.prompt[:200]) for request in requests}) == 1
    assert len({tuple(request.prompt[200:]) for request in requests}) == 6
    assert not any(request.prompt[200:] == request.prompt[:100] for request in requests)
    assert all(request.max_tokens == 5 and not request.stop_token_ids for request in requests)
    result: dict[str, Any] = json.loads(file.read_text())
    summary = result["summary"]
    assert (summary["completed"], summary["failed"], summary["output_tokens"]) == (6, 0, 30)
    assert summary["cached_tokens"] == 6 * 128
    assert set(summary["time_to_first_token"]) == {"mean", "p50", "p90", "p99", "max"}
    assert 0.02 <= summary["time_to_first_token"]["p50"] <= summary["end_to_end"]["p50"]
    assert [row["index"] for row in result["requests"]] == list(range(6))
    assert all(len(row["between"]) == 4 for row in result["requests"])
    assert result["args"]["prompt_tokens"] == 300 and result["versions"]["httpx"] and result["date"]
    assert "s3cret" not in file.read_text()
    assert image.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "6 completed, 0 failed" in printed and "time to first token" in printed


def test_the_same_seed_gives_the_same_prompts() -> None:
    with live_server() as live:
        for seed in ("1", "1", "2"):
            assert run(live, "--seed", seed, "--num-requests", "2") == 0
        first, second, third = (sorted(r.prompt for r in live.client.requests[at : at + 2]) for at in (0, 2, 4))
        assert first == second != third


def test_several_tokens_in_one_chunk_count_each() -> None:
    with live_server(FakeClient(tokens_per_output=2)) as live:
        assert run(live, "--output-tokens", "7") == 0


def test_arrivals_at_a_rate_are_those_of_the_seed(tmp_path: Path) -> None:
    """Poisson: the gaps between them are exponential. A busy machine may only be late."""
    file = tmp_path / "out.json"
    with live_server() as live:
        assert run(live, "--rate", "10", "--json", str(file)) == 0
    starts = np.array([row["start"] for row in json.loads(file.read_text())["requests"]])
    drawn = np.random.default_rng(0).exponential(1 / 10, 5).cumsum()
    assert drawn[-1] > 0.2 and np.all(starts[1:] > drawn - 0.05)


def test_failures_are_counted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with live_server(FakeClient(refusal=QueueFull("The request queue is full."))) as live:
        assert run(live) == 1
    printed = capsys.readouterr().out
    assert "0 completed, 6 failed" in printed
    assert "failed 6 x: ValueError: HTTP 429: The request queue is full." in printed


def test_failure_in_mid_stream(capsys: pytest.CaptureFixture[str]) -> None:
    with live_server(FakeClient(fail_after=2)) as live:
        assert run(live) == 1
    assert "rank 1 failed: out of memory" in capsys.readouterr().out


def test_wrong_token_counts_are_failures(capsys: pytest.CaptureFixture[str]) -> None:
    with live_server(FakeClient(), "--served-model-name", "x") as live:
        live.client.next_token = lambda request, position: 3999
        live.client._outputs = lambda request, original=live.client._outputs: original(_shorter(request))  # type: ignore[method-assign,assignment,misc]
        assert run(live, "--model", "x") == 1
    assert "asked for 300 + 5 tokens, the server counted 300 + 4" in capsys.readouterr().out


def _shorter(request: Any) -> Any:
    import dataclasses

    return dataclasses.replace(request, max_tokens=request.max_tokens - 1)


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base-url", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9: " in capsys.readouterr().err


def test_wrong_arguments() -> None:
    for words in ("--num-requests 0", "--shared-prefix-tokens 9 --prompt-tokens 8", "--rate 0"):
        with pytest.raises(SystemExit) as caught:
            main(words.split())
        assert caught.value.code == 2


def test_interrupted_it_reports_what_is_done(tmp_path: Path) -> None:
    with live_server(FakeClient(token_seconds=0.02)) as live:
        file = tmp_path / "out.json"
        small = "--prompt-tokens 10 --output-tokens 5 --num-requests 1000 --concurrency 2".split()
        command = [sys.executable, "-m", "server.loadtest", "--base-url", live.url, *small, "--json", str(file)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        while len(live.client.finished) < 6:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "completed, 0 failed" in output
        assert json.loads(file.read_text())["summary"]["completed"] >= 3
