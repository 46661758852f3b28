"""Start, drain, failure and end of the real launch, in a process of its own over a fake scheduler."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.lifecycle import _Lifecycle
from server.service import Phase
from tests.server.fake_client import FakeClient
from tests.server.live import make_service

CERTIFICATE = Path(__file__).with_name("localhost.pem")  # with its key; for 127.0.0.1, signed by itself
READY = "The server is fired up and ready to roll!"


class Process:
    def __init__(self, folder: Path, client: dict[str, Any], *flags: str) -> None:
        command = [sys.executable, "-m", "tests.server.fake_server", json.dumps(client), "--port", "0", *flags]
        self._files = (folder / "out", folder / "err")
        with self._files[0].open("w") as output, self._files[1].open("w") as errors:
            self.process = subprocess.Popen(command, stdout=output, stderr=errors)
        while "\n" not in self.output and self.process.poll() is None:
            time.sleep(0.02)
        self.url = self.output.partition("\n")[0].rpartition(" ")[2]

    @property
    def output(self) -> str:
        return self._files[0].read_text()

    def post(self, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json={"prompt": "a b c", **fields}, timeout=20)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def drain(self) -> None:
        """Returns when it refuses requests; a second signal before that would be lost."""
        self.signal(signal.SIGTERM)
        while httpx.get(f"{self.url}/health").status_code == 200:
            time.sleep(0.02)

    def end(self, seconds: float = 10) -> tuple[int, str, str]:
        code = self.process.wait(seconds)
        assert self.output.endswith("workers stopped\n")
        return code, self.output, self._files[1].read_text()


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Process] = []

    def run(client: dict[str, Any] | None = None, *flags: str) -> Process:
        started.append(Process(tmp_path, client or {}, *flags))
        return started[-1]

    yield run
    for process in started:
        process.process.kill()
        process.process.wait()


class Background(threading.Thread):
    """One request whose response is looked at later."""

    def __init__(self, server: Process, **fields: Any) -> None:
        super().__init__(daemon=True)
        self._server, self._fields = server, fields
        self.response: httpx.Response | None = None
        self.start()
        while not re.search(r"^sp:num_running_reqs\{.*\} 1", httpx.get(f"{server.url}/metrics").text, re.MULTILINE):
            time.sleep(0.02)

    def run(self) -> None:
        with suppress(httpx.TransportError):
            self.response = self._server.post(**self._fields)

    def result(self) -> httpx.Response:
        self.join(20)
        assert self.response is not None
        return self.response


@pytest.mark.parametrize(("number", "said"), [(signal.SIGTERM, "Draining requests"), (signal.SIGINT, "Interrupted")])
def test_ready_once_then_a_clean_end(start: Start, number: int, said: str) -> None:
    process = start({}, "--api-key", "k3y")
    assert httpx.get(f"{process.url}/health").status_code == 200
    process.signal(number)
    code, output, errors = process.end(5)
    assert code == 0
    ready, curl, stopped = output.splitlines()
    assert ready.startswith(f"{READY} http://127.0.0.1:") and stopped == "workers stopped"
    assert curl.startswith(f"curl {process.url}/v1/completions -H 'Authorization: Bearer ")
    assert "k3y" not in output + errors and "Traceback" not in errors
    assert "max_total_num_tokens=12800" in errors and said in errors


def test_https(start: Start) -> None:
    process = start({}, "--ssl-certfile", str(CERTIFICATE))
    assert process.url.startswith("https://") and f"curl {process.url}/v1/" in process.output
    trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
    answer = httpx.post(f"{process.url}/v1/completions", json={"prompt": "a b c"}, verify=trusting)
    assert answer.json()["usage"]["completion_tokens"] == 16
    with pytest.raises(httpx.TransportError):
        httpx.get(process.url.replace("https", "http"))
    process.signal(signal.SIGTERM)
    assert process.end(5)[0] == 0


def test_a_server_that_only_embeds_warms_up_and_says_how_to_use_it(start: Start) -> None:
    process = start({}, "--sp-mask", "full")
    ready, curl = process.output.splitlines()
    assert ready.startswith(READY)
    assert curl.startswith(f"curl {process.url}/v1/embeddings ") and '"input": ' in curl
    answer = httpx.post(f"{process.url}/v1/embeddings", json=json.loads(curl.rpartition("-d ")[2].strip("'")))
    assert len(answer.json()["data"]) == 1
    process.signal(signal.SIGTERM)
    assert process.end(5)[0] == 0


def test_running_requests_finish_and_new_ones_are_refused(start: Start) -> None:
    process = start({"token_seconds": 0.05})
    running = Background(process, max_tokens=30)
    process.drain()
    refused = process.post()
    assert refused.status_code == 503
    assert refused.headers["retry-after"] and refused.headers["connection"] == "close"
    assert httpx.get(f"{process.url}/health").status_code == 503
    assert running.result().json()["usage"]["completion_tokens"] == 30
    assert process.end()[0] == 0


def test_an_interrupt_does_not_wait_for_running_requests(start: Start) -> None:
    process = start({"token_seconds": 0.05})
    running = Background(process, max_tokens=10_000)
    process.signal(signal.SIGINT)
    assert running.result().json()["choices"][0]["finish_reason"] == "abort"
    assert process.end(5)[0] == 0


def test_draining_has_a_limit(start: Start) -> None:
    process = start({"token_seconds": 0.05}, "--drain-timeout", "0.5")
    running = Background(process, max_tokens=10_000)
    process.signal(signal.SIGTERM)
    assert running.result().json()["choices"][0]["finish_reason"] == "abort"
    assert process.end()[0] == 0


def test_a_second_signal_stops_at_once(start: Start) -> None:
    process = start({"token_seconds": 0.05})
    running = Background(process, max_tokens=10_000)
    process.drain()
    assert process.process.poll() is None
    process.signal(signal.SIGTERM)
    code, _, errors = process.end(3)
    assert code == 0 and "Second signal" in errors and "Traceback" not in errors
    running.join(5)
    assert running.response is None or running.response.status_code == 500


def test_a_failed_worker_ends_the_server(start: Start) -> None:
    process = start({"token_seconds": 0.02, "fail_at": 30})
    response = Background(process, max_tokens=10_000).result()
    assert response.status_code == 500 and "rank 1 failed" in response.json()["error"]["message"]
    code, _, errors = process.end(8)
    assert code == 1 and "Fatal: rank 1 was killed by signal 9" in errors and "Traceback" not in errors


def test_a_failed_warm_up_ends_the_server(start: Start) -> None:
    code, output, errors = start({"fail_after": 0}).end()
    assert code == 1 and READY not in output
    assert "Fatal: the warm-up request failed" in errors and "Traceback" not in errors


def test_a_warm_up_that_a_signal_ends_is_no_failure() -> None:
    service = make_service(FakeClient(draining=True))
    service.phase = Phase.DRAINING
    with socket.create_server(("127.0.0.1", 0)) as listener:
        lifecycle = _Lifecycle(create_app(service), service, listener)
        lifecycle._server.started = True
        asyncio.run(lifecycle._start())
    assert lifecycle._exit_code == 0 and service.phase is Phase.DRAINING


def test_warm_up_can_be_skipped(start: Start) -> None:
    assert start({"prefill_seconds": 60}, "--skip-server-warmup").output.startswith(READY)


def test_a_port_in_use_is_a_usage_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "server.launch", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("sp-serve: error: --host 127.0.0.1 --port ") and "in use" in line


def test_usage_errors_are_one_line() -> None:
    command = [sys.executable, "-m", "server.launch", "--sp-size", "3", "--tp-size", "700"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
