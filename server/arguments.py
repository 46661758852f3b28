"""The command line of the server: one argparse parser, SGLang's names first, vLLM's as aliases.

argparse accepts any unambiguous prefix, and users rely on it (`--tp 2`). A prefix that several options share needs
an alias of its own: `--sp` is declared because `--sp-size` is not the only option that starts so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

from scheduler.config import SchedulerConfig
from server.version import VERSION
from sp_backend import strategies
from sp_backend.commands import Pooling
from sp_backend.config import AUTO, LAYOUTS
from sp_backend.layout import CAUSAL, FULL

DEFAULT_MODEL = Path(__file__).parent / "default_model"
SCHEDULER = SchedulerConfig()  # its defaults are ours
OFF = "off"
STRATEGIES = {  # by layout
    layout: tuple(name for name, strategy in strategies.STRATEGIES.items() if strategy.layout == layout)
    for layout in LAYOUTS
}
LOG_LEVELS = ("debug", "info", "warning", "error")


ELSEWHERE = {  # flags of SGLang and vLLM that people bring along: what to do here
    "--attn-cp-size": "use --sp-size",
    "--decode-context-parallel-size": "use --sp-size, for decode too",
    "--dp-size": "start a server for each replica",
    "--enable-cache-report": "leave it out: usage always tells cached tokens",
    "--enable-chunked-prefill": "leave it out: --chunked-prefill-size is always obeyed",
    "--enable-metrics": "leave it out: /metrics is always there",
    "--enable-prefix-caching": "leave it out: prefixes are cached unless --disable-radix-cache",
    "--kv-cache-dtype": "keys and values have the --dtype of the model",
    "--pp-size": "use --sp-size or --tp-size",
    "--prefill-context-parallel-size": "use --sp-size",
    "--quantization": "quantised weights are not supported",
    "--revision": "models are local folders: give the one of that revision",
    "--trust-remote-code": "leave it out: no code comes from model folders",
}


class UsageError(ValueError):
    """The command line asks for something impossible. One line; exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hints = [f"{flag}: {hint}" for flag, hint in ELSEWHERE.items() if flag in message.replace("=", " ").split()]
        raise UsageError("; ".join([message, *hints]))


def token_count(text: str) -> int:
    """`128k` is 128,000 and `128K` is 131,072."""
    scale = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}.get(text[-1:], 1)
    try:
        return int(float(text[:-1]) * scale) if scale > 1 else int(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, such as 4096 or 128k") from None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    given = list(sys.argv[1:] if argv is None else argv)
    return parser().parse_args([_dashes(word) for word in given])


def _dashes(word: str) -> str:
    """`--tp_size=2` is `--tp-size=2`. Values are left alone."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def parser() -> argparse.ArgumentParser:
    result = _Parser(prog="sp-serve", description="OpenAI-compatible server with sequence-parallel attention.")
    result.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    _add_model(result.add_argument_group("model"))
    _add_http(result.add_argument_group("HTTP"))
    _add_parallel(result.add_argument_group("parallelism"))
    _add_memory(result.add_argument_group("memory and batching"))
    _add_operation(result.add_argument_group("operation"))
    return result


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model-path", "--model", "-m", metavar="FOLDER", help="Hugging Face folder (default: the embedded model)")
    add("--tokenizer-path", metavar="FOLDER", help="folder of tokenizer.json (default: the model's)")
    add("--chat-template", metavar="FILE", help="Jinja file instead of the model's own template")
    add("--served-model-name", nargs="+", metavar="NAME", help="names that requests may use (default: the path)")
    add("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--context-length", "--max-model-len", type=token_count, metavar="N", help="default: the model's")
    add(
        "--sampling-defaults",
        choices=("model", "openai"),
        default="model",
        help="where omitted sampling parameters come from: generation_config.json, or OpenAI's defaults",
    )
    add(
        "--pooling",
        choices=(AUTO, *get_args(Pooling)),
        default=AUTO,
        help="embeddings: the last token's hidden state, or the mean (default: the folder's modules.json, else last)",
    )
    add("--random-seed", "--seed", type=int, default=0, help="of dummy weights")


def _add_http(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=30000, help="0: any free port")
    add("--api-key", metavar="KEY", help="required as `Authorization: Bearer KEY`")
    add("--ssl-certfile", metavar="FILE", help="serve HTTPS with this certificate chain (PEM)")
    add("--ssl-keyfile", metavar="FILE", help="its private key, if that is in another file")
    add("--queue-full-status", type=int, choices=(429, 503), default=429, help="HTTP status when the queue is full")
    add(
        "--sse-keepalive-interval",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="SSE comments while a prefill runs; some clients cannot parse them (default: 0, none)",
    )


def _add_parallel(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--sp-size",
        "--sp",
        "--sequence-parallel-size",
        "--context-parallel-size",
        "--cp-size",
        "--cp",
        type=int,
        default=1,
        metavar="N",
        help="ranks that share the tokens of a sequence",
    )
    add("--tp-size", "--tp", "--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks that share heads")
    _add_strategy(group)
    add("--device", default="auto", metavar="{auto,cpu}")
    add(
        "--attention-backend",
        choices=(AUTO, "native", "torch_cpu", "reference"),
        default=AUTO,
        help="attention kernel (default: auto, the native one where this CPU and a C++ compiler allow, else torch_cpu)",
    )
    add("--threads-per-rank", type=int, metavar="N", help="default: cores / ranks")
    add("--oversubscribe", action="store_true", help="allow more ranks than cores (slow; for tests)")
    add("--dist-timeout", type=float, default=300.0, metavar="SECONDS", help="limit of one transfer between ranks")


def _add_strategy(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--sp-layout", choices=tuple(STRATEGIES), default="tokens", help="what SP ranks split outside attention")
    names = tuple(name for of_layout in STRATEGIES.values() for name in of_layout)
    add(
        "--sp-strategy",
        "--cp-strategy",
        choices=(AUTO, OFF, *names),
        default=AUTO,
        help="plan of long prefills (default: auto, the fastest one predicted for each step); off: no prompt is shared",
    )
    _add_strategy_options(group)
    add(
        "--sp-mask",
        choices=(AUTO, CAUSAL, FULL),
        default=AUTO,
        help="which tokens a token sees: those before it, or all (for embeddings only; default: what config.json says)",
    )
    add("--sp-redundant-kv", action="store_true", help="layout heads: each rank computes the new keys of all tokens")
    add(
        "--sp-threshold",
        type=token_count,
        default=SCHEDULER.sp_threshold,
        metavar="TOKENS",
        help="shorter prompts stay on one rank (default: where spreading is predicted to pay)",
    )


def _add_strategy_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--sp-window-size", type=int, metavar="N", help="double_ring: ranks of an inner ring")
    add("--sp-ulysses-degree", type=int, metavar="N", help="hybrid: ranks that trade heads for tokens")
    add("--sp-num-rings", type=int, metavar="N", help="hamilton: rings that each carry a piece of the keys")
    add("--sp-mapping", metavar="FILE", help="hamilton: rings of your own (JSON: path_num, in_mapping, out_mapping)")
    add("--sp-overlap", choices=(AUTO, "on", "off"), default=AUTO, help="attend while blocks travel (auto: on)")
    add("--sp-topology", metavar="FILE", help="links and rates, as a file or a preset's name (default: measured)")


def _add_memory(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--page-size", "--block-size", type=int, default=64, metavar="TOKENS")
    add("--max-total-tokens", type=token_count, metavar="N", help="KV cache size over all ranks; accepts 128k")
    add(
        "--mem-fraction-static",
        "--gpu-memory-utilization",
        type=float,
        default=0.5,
        metavar="F",
        help="share of the available memory for weights and KV cache of all ranks",
    )
    add("--max-running-requests", "--max-num-seqs", type=int, default=SCHEDULER.max_running_requests, metavar="N")
    add("--max-queued-requests", type=int, metavar="N", help="more are refused (default: unlimited)")
    add(
        "--chunked-prefill-size",
        "--max-num-batched-tokens",
        type=token_count,
        default=SCHEDULER.chunked_prefill_size,
        metavar="TOKENS",
        help="new ones in a step; -1: no limit in tokens",
    )
    add(
        "--max-prefill-seconds",
        type=float,
        default=SCHEDULER.max_prefill_seconds,
        metavar="S",
        help="of one prefill step while others decode",
    )
    add("--disable-radix-cache", "--no-enable-prefix-caching", action="store_true", help="no prefix cache")


def _add_operation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--watchdog-timeout",
        type=float,
        default=SCHEDULER.watchdog_timeout,
        metavar="SECONDS",
        help="a step without answer is fatal",
    )
    add(
        "--drain-timeout",
        "--shutdown-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long SIGTERM lets running requests finish",
    )
    add(
        "--decode-log-interval",
        type=int,
        default=SCHEDULER.decode_log_interval,
        metavar="STEPS",
        help="decode steps between two lines of the log",
    )
    add("--log-level", choices=LOG_LEVELS, default="info", type=str.lower)
    add("--log-requests", "--enable-log-requests", action="store_true", help="one line for each request")
    add("--skip-server-warmup", action="store_true", help="report ready without a first request")
