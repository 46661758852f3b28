from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.fake_client import FakeClient
from tests.server.live import Live, live_server


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One server for tests that need nothing special of it."""
    with live_server(FakeClient(cached_tokens=2)) as server:
        yield server
