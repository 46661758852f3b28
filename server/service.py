"""What the routes share: the scheduler's client, the tokenizer, and whether requests are taken."""

from __future__ import annotations

import enum
import time

from starlette.requests import Request

from server.chat_template import ChatTemplate
from server.config import ServerConfig
from server.embeddings import Embedder
from server.errors import unavailable
from server.generation import Client, Generator
from server.jobs import JobReader
from server.metrics import Metrics
from server.tokenizer import Tokenizer


class Phase(enum.Enum):
    STARTING = "starting"  # warming up
    READY = "ready"
    DRAINING = "draining"  # running requests finish, new ones are refused
    FAILED = "failed"


class Service:
    def __init__(self, config: ServerConfig, client: Client, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.config = config
        self.client = client
        self.phase = Phase.STARTING
        self.started = time.time()
        self.model_name = config.http.served_model_names[0]
        self.tokenizer = tokenizer
        self.template = template
        self.metrics = Metrics(self.model_name, client.stats)
        self.generator = Generator(client, tokenizer, self.metrics, config.http.queue_full_status)
        # prompt and completion together: the model's window, or less if the KV cache is smaller
        self.max_request_tokens = min(config.backend.context_length, client.stats().capacity_tokens)
        self.embedder = Embedder(config, tokenizer, self.generator, self.max_request_tokens)
        self.jobs = JobReader(config, tokenizer, template, self.max_request_tokens)

    def why_not_serving(self) -> str | None:
        """None: all is well. Cheap, because probes ask every second, also during a prefill of minutes."""
        return self.client.healthy() if self.phase is Phase.READY else self.phase.value

    def check_taking_requests(self) -> None:
        if self.phase is Phase.DRAINING:
            raise unavailable("The server is draining and takes no new requests.")
        if self.phase is Phase.FAILED:
            raise unavailable("A worker failed; the server is about to exit.")


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
