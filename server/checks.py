"""Refuses wrong combinations of flags, in one line that names them, before any worker or port exists."""

from __future__ import annotations

import argparse
import ssl

from server import machine
from server.arguments import OFF, STRATEGIES, UsageError
from sp_backend.config import AUTO
from sp_backend.layout import CAUSAL, FULL
from sp_backend.models.config import ModelConfig, check_parallel
from sp_backend.native import choose_kernel
from sp_backend.presets import load_machine
from sp_backend.strategies import FLAGS, Options, Variant, plan_for
from sp_backend.strategies.mapping import read_cycles


def check(args: argparse.Namespace, model: ModelConfig) -> None:
    """Raises UsageError."""
    _check_numbers(args)
    _check_tls(args)
    _check_context(args, model)
    _check_parallel(args, model)
    _check_kernel(args)
    _check_topology(args)


def _check_numbers(args: argparse.Namespace) -> None:
    at_least_one = "sp_size tp_size page_size threads_per_rank max_running_requests max_total_tokens context_length "
    at_least_one += "decode_log_interval"
    for name in at_least_one.split():
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    not_negative = "sp_threshold max_queued_requests drain_timeout sse_keepalive_interval random_seed"
    for name in not_negative.split():
        value = getattr(args, name)
        if value is not None and not value >= 0:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must not be negative")
    for name in ("watchdog_timeout", "dist_timeout", "max_prefill_seconds"):
        if not getattr(args, name) > 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be positive")
    if not 0 < args.mem_fraction_static < 1:
        raise UsageError(f"--mem-fraction-static {args.mem_fraction_static}: must lie between 0 and 1")
    if not 0 <= args.port < 65536:
        raise UsageError(f"--port {args.port}: must lie between 0 and 65535")
    if args.chunked_prefill_size != -1 and args.chunked_prefill_size < args.page_size:
        raise UsageError(
            f"--chunked-prefill-size {args.chunked_prefill_size}: -1 (off) or at least "
            f"--page-size {args.page_size} is needed"
        )


def _check_tls(args: argparse.Namespace) -> None:
    if args.ssl_certfile is None:
        if args.ssl_keyfile is not None:
            raise UsageError("--ssl-keyfile needs --ssl-certfile")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            args.ssl_certfile,
            args.ssl_keyfile,
            password=lambda: "",  # else OpenSSL asks the terminal for it
        )
    except OSError as error:  # SSLError is one
        key = "" if args.ssl_keyfile is None else f" --ssl-keyfile {args.ssl_keyfile}"
        raise UsageError(f"--ssl-certfile {args.ssl_certfile}{key}: {error.strerror or error}") from error


def _check_context(args: argparse.Namespace, model: ModelConfig) -> None:
    if args.context_length is not None and args.context_length > model.max_position_embeddings:
        raise UsageError(
            f"--context-length {args.context_length} is longer than the {model.max_position_embeddings} positions "
            f"the model was made for"
        )


def _check_parallel(args: argparse.Namespace, model: ModelConfig) -> None:
    if args.device not in ("auto", "cpu"):
        raise UsageError(f"--device {args.device} is not supported; this version runs on cpu")
    world, cores = args.sp_size * args.tp_size, machine.num_cores()
    if world > cores and not args.oversubscribe:
        raise UsageError(
            f"--sp-size {args.sp_size} x --tp-size {args.tp_size} needs {world} cores, this machine has {cores} "
            f"(--oversubscribe runs it nevertheless, slowly)"
        )
    fitting = (AUTO, *STRATEGIES[args.sp_layout], *([OFF] if args.sp_layout == "tokens" else []))
    if args.sp_strategy not in fitting:
        raise UsageError(
            f"--sp-strategy {args.sp_strategy} does not run with --sp-layout {args.sp_layout}; "
            f"that layout has: {', '.join(fitting)}"
        )
    if args.sp_redundant_kv and args.sp_layout != "heads":
        raise UsageError("--sp-redundant-kv needs --sp-layout heads")
    check_parallel(model, args.tp_size, args.sp_size, args.sp_layout)
    _check_mask(args, model)
    _check_strategy(args, model)


def is_causal(args: argparse.Namespace, model: ModelConfig) -> bool:
    return model.causal if args.sp_mask == AUTO else args.sp_mask == CAUSAL


def _check_mask(args: argparse.Namespace, model: ModelConfig) -> None:
    windows = [window for window in model.windows if window is not None]
    if windows and not is_causal(args, model):
        asked = "--sp-mask full" if args.sp_mask == FULL else "is_causal: false in config.json"
        raise UsageError(
            f"{asked}: {len(windows)} of the model's layers have a sliding window (sliding_window: {windows[0]}), "
            f"which is supported with a causal mask alone; use --sp-mask causal, or a checkpoint without windows"
        )


def _check_strategy(args: argparse.Namespace, model: ModelConfig) -> None:
    """Builds and proves the named plan: whatever does not fit is known before a worker starts."""
    options = strategy_options(args)
    if args.sp_strategy in (AUTO, OFF):
        for name in options.given():
            raise UsageError(f"{FLAGS[name]} needs a --sp-strategy that takes it, not {args.sp_strategy}")
        if args.sp_strategy == OFF and args.sp_threshold is not None:
            raise UsageError("--sp-threshold has no meaning with --sp-strategy off: no prompt is shared")
    elif args.sp_size > 1:
        try:
            plan_for(
                Variant(args.sp_strategy, options),
                num_ranks=args.sp_size,
                num_heads=model.num_heads // args.tp_size,
                num_kv_heads=model.num_kv_heads // args.tp_size,
                causal=is_causal(args, model),
                redundant_kv=args.sp_redundant_kv,
            )
        except ValueError as error:
            raise UsageError(f"--sp-strategy {args.sp_strategy} --sp-size {args.sp_size}: {error}") from error


def _check_kernel(args: argparse.Namespace) -> None:
    if args.attention_backend == "native" and choose_kernel()[0] != "native":
        raise UsageError(f"--attention-backend native: {choose_kernel()[1]}")


def _check_topology(args: argparse.Namespace) -> None:
    if args.sp_topology is None:
        return
    try:
        load_machine(args.sp_topology, args.sp_size)
    except ValueError as error:
        raise UsageError(f"--sp-topology {args.sp_topology}: {error}") from error


def strategy_options(args: argparse.Namespace) -> Options:
    return Options(
        window_size=args.sp_window_size,
        ulysses_degree=args.sp_ulysses_degree,
        num_rings=args.sp_num_rings,
        cycles=None if args.sp_mapping is None else read_cycles(args.sp_mapping),
    )


def warnings_of(args: argparse.Namespace) -> list[str]:
    result = []
    if args.attention_backend == AUTO and choose_kernel()[0] != "native":
        result.append(f"--attention-backend auto: torch_cpu, which is slower: {choose_kernel()[1]}")
    if args.sp_size == 1:
        unused = {
            "--sp-strategy": args.sp_strategy != AUTO,
            "--sp-redundant-kv": args.sp_redundant_kv,
            "--sp-overlap": args.sp_overlap != AUTO,
            "--sp-topology": args.sp_topology is not None,
        }
        result += [f"{flag} has no effect with --sp-size 1" for flag, given in unused.items() if given]
    return result
