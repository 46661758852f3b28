"""`python -m server.launch`: check, start workers, open the port, warm up, serve, drain, stop.

Order matters to operators: mistakes are found before workers start, the port is reserved before they load, requests
are taken once they are ready, and no child outlives this process.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import NoReturn

from tqdm import tqdm

from scheduler.client import Client as SchedulerClient
from scheduler.worker_pool import WorkerFailed, WorkerPool
from server.app import create_app
from server.arguments import UsageError
from server.chat_template import ChatTemplate
from server.config import HttpConfig, ServerConfig, load
from server.generation import Client
from server.lifecycle import run
from server.service import Service
from server.tokenizer import Tokenizer
from sp_backend.catalog import ITEMSIZE, planner_for
from sp_backend.planner import OFF, Planner

log = logging.getLogger("server.launch")
SWITCH_SECONDS = 0.0005  # how long the controller's thread waits for the interpreter while the HTTP thread works
Connect = Callable[[ServerConfig], AbstractContextManager[Client]]


def main(argv: Sequence[str] | None = None, connect: Connect | None = None) -> int:
    try:
        config = load(argv)
        tokenizer, template = _load_text(config)
        listener = _bind(config.http)
    except UsageError as error:
        print(f"sp-serve: error: {error}", file=sys.stderr)
        return 2
    _configure_logging(config.http.log_level)
    for warning in config.warnings:
        log.warning(warning)
    log.info("Configuration: %s", config.summary())
    if config.why_no_generation is not None:
        log.info("Embeddings only. %s", config.why_no_generation)
    sys.setswitchinterval(SWITCH_SECONDS)
    signal.signal(signal.SIGTERM, _exit_on_signal)  # so that the workers are ended while they load, too
    try:
        with (connect or run_workers)(config) as client:
            _log_capacity(config, client)
            service = Service(config, client, tokenizer, template)
            return run(create_app(service), service, listener)
    except WorkerFailed as error:
        log.error("The workers did not start: %s", error)
        return 1
    except KeyboardInterrupt:
        return 130


@contextmanager
def run_workers(config: ServerConfig) -> Iterator[Client]:
    """The real ones. Nothing of them is left when the block ends."""
    pool = WorkerPool(config.backend)
    with tqdm(desc="Loading weights", unit="tensor", disable=None) as bar:

        def show(num_loaded: int, num_tensors: int) -> None:
            bar.total = num_tensors
            bar.update(num_loaded - bar.n)

        pool.start(progress=show)
    log.info("Weights: %.2f GB in each rank", max(ready.weight_bytes for ready in pool.ready) / 1e9)
    try:
        planner = planner_for(config.backend, config.model, pool.ready[0].machine)
        if planner is not None:
            _log_plans(planner)
        client = SchedulerClient(config.scheduler, config.backend, pool, pool.num_pages, planner)
        client.start()
        try:
            yield client
        finally:
            client.close()
    finally:
        pool.stop()


def _log_plans(planner: Planner) -> None:
    log.info("Plans on the machine %r: %s", planner.machine.name, ", ".join(map(str, planner.winners)))
    if OFF in planner.winners:
        pays = next((n for n in (2**k for k in range(4, 20)) if planner.degree_for(n, 0) > 1), None)
        log.info("Sharing a prompt pays from about %s tokens", pays or "no number of")


def _load_text(config: ServerConfig) -> tuple[Tokenizer, ChatTemplate]:
    folder = config.text.tokenizer_path
    try:
        tokenizer = Tokenizer(folder)
        template = ChatTemplate.load(folder, config.text.chat_template)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise UsageError(f"--tokenizer-path {folder}: {error}") from error
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UsageError(
            f"--tokenizer-path {folder}: has {tokenizer.vocab_size} tokens, the model of --model-path only "
            f"{config.model.vocab_size}"
        )
    return tokenizer, template


def _bind(http: HttpConfig) -> socket.socket:
    """Reserves the port; nothing listens yet, so clients are refused until the workers are ready."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UsageError(f"--host {http.host} --port {http.port}: {error.strerror or error}") from error
    return listener


def _configure_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="[%(asctime)s] %(levelname)s %(message)s", force=True
    )
    for chatty in ("uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _log_capacity(config: ServerConfig, client: Client) -> None:
    stats, backend, model = client.stats(), config.backend, config.model
    tokens = stats.num_pages * backend.page_size
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * ITEMSIZE[backend.dtype]
    log.info(
        "max_total_num_tokens=%d context_len=%d longest_request=%d kv_cache=%.2f GB ranks=%d (sp %d x tp %d)",
        tokens,
        backend.context_length,
        min(backend.context_length, stats.capacity_tokens),
        tokens * token_bytes / 1e9,
        backend.world_size,
        backend.sp_size,
        backend.tp_size,
    )
    if stats.capacity_tokens < backend.context_length:
        log.warning(
            "The KV cache holds requests of at most %d tokens, less than the context length %d: see "
            "--max-total-tokens and --mem-fraction-static",
            stats.capacity_tokens,
            backend.context_length,
        )


if __name__ == "__main__":
    sys.exit(main())
