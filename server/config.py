"""What the command line means: frozen values, every `auto` decided once, wrong combinations refused (checks.py)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from scheduler.config import SchedulerConfig
from server import checks, machine
from server.arguments import DEFAULT_MODEL, OFF, UsageError, parse
from sp_backend.catalog import ITEMSIZE
from sp_backend.commands import Pooling
from sp_backend.config import AUTO, BackendConfig
from sp_backend.models.config import ModelConfig
from sp_backend.models.pooling_config import read_pooling
from sp_backend.native import choose_kernel


@dataclass(frozen=True, slots=True)
class HttpConfig:
    host: str
    port: int
    api_key: str | None
    ssl_certfile: str | None  # None: plain HTTP
    ssl_keyfile: str | None  # None: the key is in ssl_certfile
    served_model_names: tuple[str, ...]  # the first is the one that /v1/models lists
    queue_full_status: int
    sse_keepalive_interval: float  # seconds; 0: none
    log_level: str
    log_requests: bool


@dataclass(frozen=True, slots=True)
class TextConfig:
    tokenizer_path: Path
    chat_template: Path | None  # instead of the tokenizer folder's own
    sampling_defaults: dict[str, float]  # used where a request is silent


@dataclass(frozen=True, slots=True)
class ServerConfig:
    http: HttpConfig
    text: TextConfig
    model: ModelConfig
    backend: BackendConfig
    scheduler: SchedulerConfig
    pooling: Pooling  # of embeddings
    drain_timeout: float
    warmup: bool
    warnings: tuple[str, ...]  # options given that have no effect

    @property
    def why_no_generation(self) -> str | None:
        """None, or why the model can only embed and what to do about it: for clients and operators."""
        if not self.model.has_head:
            return (
                f"This model has no language model head ({self.model.architecture} without lm_head.weight), so it "
                "generates no tokens. Use POST /v1/embeddings, or serve a checkpoint with a head."
            )
        if not self.backend.causal:
            return (
                "This model runs under a full mask (--sp-mask full, or is_causal: false in its config.json): every "
                "token sees those after it, so there is no next token to generate. Use POST /v1/embeddings, or start "
                "the server with --sp-mask causal."
            )
        return None

    def summary(self) -> dict[str, Any]:
        """The resolved values, for the log and /server_info. Secrets are left out."""
        backend = msgspec.to_builtins(self.backend)
        scheduler = {name: getattr(self.scheduler, name) for name in self.scheduler.__dataclass_fields__}
        return {
            **backend,
            **scheduler,
            "host": self.http.host,
            "port": self.http.port,
            "served_model_name": self.http.served_model_names[0],
            "tokenizer_path": str(self.text.tokenizer_path),
            "pooling": self.pooling,
            "sampling_defaults": self.text.sampling_defaults,
            "drain_timeout": self.drain_timeout,
        }


def load(argv: Sequence[str] | None = None) -> ServerConfig:
    """Raises UsageError; `--help` exits."""
    try:
        return resolve(parse(argv))
    except UsageError:
        raise
    except ValueError as error:  # from a configuration of another package
        raise UsageError(str(error)) from error


def resolve(args: argparse.Namespace) -> ServerConfig:
    folder = Path(args.model_path) if args.model_path else DEFAULT_MODEL
    if not folder.is_dir():
        raise UsageError(f"--model-path {args.model_path}: no such folder (models are local Hugging Face folders)")
    model = ModelConfig.load(folder)
    checks.check(args, model)
    context_length = args.context_length or model.max_position_embeddings
    return ServerConfig(
        http=_http(args, folder),
        text=_text(args, folder),
        model=model,
        backend=_backend(args, model, folder, context_length),
        scheduler=_scheduler(args, context_length),
        pooling=(read_pooling(folder) or "last") if args.pooling == AUTO else args.pooling,
        drain_timeout=args.drain_timeout,
        warmup=not args.skip_server_warmup,
        warnings=tuple(checks.warnings_of(args)),
    )


def _http(args: argparse.Namespace, folder: Path) -> HttpConfig:
    names = args.served_model_name or ([args.model_path, folder.resolve().name] if args.model_path else ["default"])
    return HttpConfig(
        host=args.host,
        port=args.port,
        api_key=args.api_key,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        served_model_names=tuple(dict.fromkeys(names)),
        queue_full_status=args.queue_full_status,
        sse_keepalive_interval=args.sse_keepalive_interval,
        log_level=args.log_level,
        log_requests=args.log_requests,
    )


def _text(args: argparse.Namespace, folder: Path) -> TextConfig:
    tokenizer = Path(args.tokenizer_path) if args.tokenizer_path else folder
    if not (tokenizer / "tokenizer.json").is_file():
        raise UsageError(f"--tokenizer-path {tokenizer}: holds no tokenizer.json")
    template = Path(args.chat_template) if args.chat_template else None
    if template is not None and not template.is_file():
        raise UsageError(f"--chat-template {template}: no such file")
    defaults = _sampling_defaults(folder) if args.sampling_defaults == "model" else {}
    return TextConfig(tokenizer, template, defaults)


def _sampling_defaults(folder: Path) -> dict[str, float]:
    """Numbers of generation_config.json; an explicit `do_sample: false` means greedy."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file}: is not valid JSON: {error}") from error
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    defaults = {name: values[name] for name in names if isinstance(values.get(name), int | float)}
    if values.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults


def _backend(args: argparse.Namespace, model: ModelConfig, folder: Path, context_length: int) -> BackendConfig:
    world = args.sp_size * args.tp_size
    num_threads = args.threads_per_rank or max(1, machine.num_cores() // world)
    dtype = _dtype(args.dtype, model.dtype)
    num_pages = kv_memory = None
    if args.max_total_tokens is None:
        kv_memory = _kv_memory(args, model, ITEMSIZE[dtype])
    else:
        num_pages = -(-args.max_total_tokens // (args.page_size * args.sp_size))
    return BackendConfig(
        model_path=str(folder),
        tokenizer_path=args.tokenizer_path,
        dtype=dtype,
        load_format=args.load_format,
        tp_size=args.tp_size,
        sp_size=args.sp_size,
        layout=args.sp_layout,
        strategy=AUTO if args.sp_strategy == OFF else args.sp_strategy,
        options=checks.strategy_options(args),
        overlap=args.sp_overlap != "off",
        topology=args.sp_topology,
        causal=checks.is_causal(args, model),
        redundant_kv=args.sp_redundant_kv,
        kernel=_kernel(args.attention_backend),
        page_size=args.page_size,
        num_pages=num_pages,
        kv_memory_bytes=kv_memory,
        context_length=context_length,
        num_threads=num_threads,
        takes_all_cores=world * num_threads >= machine.num_cores(),
        seed=args.random_seed,
        dist_timeout=args.dist_timeout,
    )


def _scheduler(args: argparse.Namespace, context_length: int) -> SchedulerConfig:
    return SchedulerConfig(
        max_running_requests=args.max_running_requests,
        max_queued_requests=args.max_queued_requests,
        chunked_prefill_size=args.chunked_prefill_size,
        max_prefill_seconds=args.max_prefill_seconds,
        sp_threshold=context_length + 1 if args.sp_strategy == OFF else args.sp_threshold,
        prefix_cache=not args.disable_radix_cache,
        watchdog_timeout=args.watchdog_timeout,
        decode_log_interval=args.decode_log_interval,
    )


def _kernel(asked: str) -> str:
    return choose_kernel()[0] if asked in (AUTO, "native") else asked


def _dtype(asked: str, of_checkpoint: str) -> str:
    """auto: bfloat16 only where the CPU multiplies it; elsewhere float32 is faster and exact."""
    if asked != "auto":
        return asked
    return "bfloat16" if of_checkpoint == "bfloat16" and machine.has_bfloat16() else "float32"


def _kv_memory(args: argparse.Namespace, model: ModelConfig, dtype_bytes: int) -> int:
    """Bytes for the KV pages of one rank: its share of the allowed memory after weights."""
    world: int = args.sp_size * args.tp_size
    copies = args.sp_size if args.sp_layout == "tokens" else 1
    weights = model.num_parameters * dtype_bytes * copies
    allowed = int(machine.available_memory() * args.mem_fraction_static)
    if allowed <= weights:
        raise UsageError(
            f"--mem-fraction-static {args.mem_fraction_static} allows {allowed / 2**30:.2f} GiB; the weights of "
            f"--sp-size {args.sp_size} x --tp-size {args.tp_size} ranks take {weights / 2**30:.2f} GiB"
        )
    return (allowed - weights) // world
