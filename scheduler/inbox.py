"""What other threads ask of the controller, until it next looks: new requests, aborts, a flush of the cache."""

from __future__ import annotations

import threading
from collections import deque

from scheduler.batching import Batcher
from scheduler.config import SchedulerConfig
from scheduler.request import Draining, GenerateRequest, QueueFull, RequestTooLong, Unavailable
from sp_backend.config import BackendConfig

SHUT_DOWN = "the server is shutting down"


class Inbox:
    """Wakes the controller with each thing that comes in. Refuses what cannot be served."""

    def __init__(self, config: SchedulerConfig, backend: BackendConfig, batcher: Batcher) -> None:
        self.wake = threading.Event()
        self._config = config
        self._backend = backend
        self._batcher = batcher
        self._lock = threading.Lock()  # guards the rest
        self._submitted: deque[GenerateRequest] = deque()
        self._aborted: deque[str] = deque()
        self._flush = False
        self._draining = False
        self._failure: str | None = None

    def submit(self, request: GenerateRequest) -> None:
        """Raises Refused with the reason, or ValueError for a malformed request."""
        self._validate(request)
        with self._lock:
            if self._failure:
                raise Unavailable(self._failure)
            if self._draining:
                raise Draining(SHUT_DOWN)
            if self._queue_is_full():
                raise QueueFull(f"the queue of {self._config.max_queued_requests} waiting requests is full")
            self._submitted.append(request)
        self.wake.set()

    def abort(self, request_id: str) -> None:
        with self._lock:
            self._aborted.append(request_id)
        self.wake.set()

    def flush(self) -> None:
        with self._lock:
            self._flush = True
        self.wake.set()

    def drain(self) -> None:
        """From now on every request is refused."""
        with self._lock:
            self._draining = True

    def fail(self, why: str) -> list[GenerateRequest] | None:
        """Refuses every request for this reason. Those that were not taken out; None if it has failed before."""
        with self._lock:
            if self._failure:
                return None
            self._failure = why
            submitted, self._submitted = self._submitted, deque()
        return list(submitted)

    @property
    def failure(self) -> str | None:
        return self._failure

    @property
    def num_submitted(self) -> int:
        return len(self._submitted)

    def next_request(self) -> GenerateRequest | None:
        """Out of the box. One by one: should the controller fail over one, the others are still there to be told."""
        with self._lock:
            return self._submitted.popleft() if self._submitted else None

    def take_aborted(self) -> deque[str]:
        with self._lock:
            aborted, self._aborted = self._aborted, deque()
        return aborted

    def take_flush(self) -> bool:
        with self._lock:
            flush, self._flush = self._flush, False
        return flush

    def _validate(self, request: GenerateRequest) -> None:
        if not request.prompt:
            raise ValueError("the prompt is empty")
        if request.pooling is not None and request.max_tokens != 0:
            raise ValueError(f"max_tokens must be 0 for an embedding, not {request.max_tokens}")
        if request.max_tokens < 0:
            raise ValueError(f"max_tokens must not be negative, but is {request.max_tokens}")
        if request.pooling is None and not self._backend.causal:
            raise ValueError("under a full mask there is no next token: only embeddings can be made")
        num_prompt, context = len(request.prompt), self._backend.context_length
        if num_prompt + request.max_tokens > context:
            raise RequestTooLong(
                num_prompt + request.max_tokens,
                context,
                f"{num_prompt} prompt tokens and {request.max_tokens} tokens to generate exceed the context "
                f"length of {context} tokens",
            )
        fits = self._batcher.max_length - min(request.max_tokens, 1)  # room for a token to be generated
        if num_prompt > fits:
            message = f"the prompt has {num_prompt} tokens; at most {fits} fit in the KV cache"
            raise RequestTooLong(num_prompt, fits, message)

    def _queue_is_full(self) -> bool:
        if self._config.max_queued_requests is None:
            return False
        lanes = self._batcher.lanes
        num_free = self._config.max_running_requests - len(self._batcher.running) - len(lanes.prefilling)
        return lanes.num_waiting + len(self._submitted) >= self._config.max_queued_requests + max(num_free, 0)
