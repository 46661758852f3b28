"""`python -m tests.server.fake_server '{"token_seconds": 0.01}' FLAGS`: the real launch over a fake scheduler."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from scheduler.request import GenerateRequest
from server.config import ServerConfig
from server.launch import main
from tests.server.fake_client import FakeClient, echo_token


def run() -> int:
    options = json.loads(sys.argv[1])
    fail_at = options.pop("fail_at", None)  # the token of any request at which a worker dies
    client = FakeClient(**options)

    def next_token(request: GenerateRequest, position: int) -> int:
        if position == fail_at:
            client.unhealthy = "rank 1 was killed by signal 9"
            client.fail_after = 0
        return echo_token(request, position)

    client.next_token = next_token

    @contextmanager
    def connect(config: ServerConfig) -> Iterator[FakeClient]:
        try:
            yield client
        finally:
            print("workers stopped", flush=True)

    return main(sys.argv[2:], connect)


if __name__ == "__main__":
    sys.exit(run())
