"""A real uvicorn on a free port over a fake scheduler: an in-process client would hide streaming and disconnects."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import uvicorn

from server.app import create_app
from server.chat_template import ChatTemplate
from server.config import ServerConfig, load
from server.service import Phase, Service
from server.tokenizer import Tokenizer
from tests.server.fake_client import FakeClient


@dataclass
class Live:
    url: str
    client: FakeClient
    service: Service
    loop: asyncio.AbstractEventLoop

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20)


def make_service(client: FakeClient, *arguments: str) -> Service:
    config: ServerConfig = load(["--port", "0", *arguments])
    folder = config.text.tokenizer_path
    service = Service(config, client, Tokenizer(folder), ChatTemplate.load(folder, config.text.chat_template))
    service.phase = Phase.READY
    return service


@contextmanager
def live_server(client: FakeClient | None = None, *arguments: str) -> Iterator[Live]:
    client = client or FakeClient()
    service = make_service(client, *arguments)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning", timeout_graceful_shutdown=1))
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    while not server.started:
        threading.Event().wait(0.005)
    try:
        yield Live(f"http://127.0.0.1:{listener.getsockname()[1]}", client, service, loops[0])
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
