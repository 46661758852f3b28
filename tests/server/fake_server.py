"""`python -m tests.server.fake_server '{"token_seconds": 0.01}' FLAGS`: the real launch over a fake scheduler."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from server.config import ServerConfig
from server.launch import main
from tests.server.fake_client import FakeClient


def run() -> int:
    options = json.loads(sys.argv[1])
    fail_in = options.pop("fail_in", None)
    client = FakeClient(**options)

    def fail() -> None:
        client.unhealthy = "rank 1 was killed by signal 9"
        client.fail_after = 0

    @contextmanager
    def connect(config: ServerConfig) -> Iterator[FakeClient]:
        if fail_in is not None:
            threading.Timer(fail_in, fail).start()
        try:
            yield client
        finally:
            print("workers stopped", flush=True)

    return main(sys.argv[2:], connect)


if __name__ == "__main__":
    sys.exit(run())
