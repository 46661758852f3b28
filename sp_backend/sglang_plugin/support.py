"""What the backends refuse, when the server starts: what would be wrong, and what was never run.

SGLang starts many combinations whose results are wrong without an error, so only what was compared with
`transformers` is let through (tests/sglang).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_parallel

from sp_backend.sglang_plugin import BACKENDS

VERSIONS = ("0.5.23",)
MODELS = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


def check(name: str, runner: Any) -> None:
    """Raises ValueError that says what is wrong and what to do.

    name: as in --attention-backend. runner: SGLang's ModelRunner with its model and KV pool.
    """
    for problem in _problems(runner):
        raise ValueError(f"--attention-backend {name}: {problem}")


def attention_layers(runner: Any) -> list[Any]:
    return [module for module in runner.model.modules() if isinstance(module, RadixAttention)]


def _problems(runner: Any) -> Iterator[str]:
    """The environment first: names of what comes later may differ in other versions."""
    if version("sglang") not in VERSIONS:
        yield f"SGLang {version('sglang')} was never tested with it; install sglang=={VERSIONS[-1]}"
    if str(runner.device).split(":")[0] != "cpu":
        yield (
            f"runs on CPUs only, not on {runner.device}: its GPU kernels do not exist yet. "
            "Take one of SGLang's own backends, such as fa3"
        )
    yield from _parallel_problems(runner)
    yield from _model_problems(runner)
    layers = attention_layers(runner)
    for layer in layers:
        yield from _layer_problems(layer)
    if len({(x.tp_q_head_num, x.tp_k_head_num, x.qk_head_dim, x.scaling) for x in layers}) != 1:
        yield "attention layers differ in their heads or scaling; one plan has to fit all"
    yield from _cache_problems(runner)


def _parallel_problems(runner: Any) -> Iterator[str]:
    parallel = get_parallel()
    if not parallel.enable_prefill_cp or parallel.attn_cp_size < 2 or parallel.cp_strategy != "zigzag":
        yield (
            "does nothing without context parallelism; add --attn-cp-size N --enable-prefill-cp --cp-strategy zigzag "
            "(N from 2; --tp-size a multiple of N)"
        )
    if runner.prefill_attention_backend_str not in BACKENDS:
        yield (
            f"does nothing for decoding alone, and prefill runs {runner.prefill_attention_backend_str}; name it in "
            "--prefill-attention-backend too"
        )
    for flag, size in {
        "--dp-size": parallel.attn_dp_size,
        "--dcp-size": parallel.attn_dcp_size,
        "--pp-size": parallel.pp_size,
    }.items():
        if size > 1:
            yield f"{flag} {size} together with context parallelism was never tested; set it to 1"
    if not runner.spec_algorithm.is_none():
        yield "speculative decoding was never tested with it; leave out --speculative-algorithm"


def _model_problems(runner: Any) -> Iterator[str]:
    config = runner.model_config
    heads = attention_layers(runner)[0].tp_q_head_num if attention_layers(runner) else 0
    size = get_parallel().attn_tp_size
    names = config.hf_config.architectures
    if heads * size != config.num_attention_heads:
        yield (
            f"SGLang's {', '.join(names)} divides attention heads by --tp-size although CP ranks hold different tokens "
            f"({heads} heads a rank, not {config.num_attention_heads // size}): its tokens are wrong under "
            "--enable-prefill-cp with any backend. Serve it without context parallelism"
        )
    if not set(names) <= set(MODELS):
        yield f"{', '.join(names)} was never compared under context parallelism; known to be right: {', '.join(MODELS)}"


def _layer_problems(layer: Any) -> Iterator[str]:
    where = f"attention layer {layer.layer_id}"
    if layer.sliding_window_size > -1:
        yield f"{where} has a sliding window, which SGLang's context parallelism was never tested with"
    if layer.logit_cap:
        yield f"{where} caps logits, which the kernels cannot do"
    if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
        yield f"{where} is not causal self-attention"
    if layer.qk_head_dim != layer.v_head_dim:
        yield f"{where} has keys of size {layer.qk_head_dim} and values of size {layer.v_head_dim}; they must be equal"


def _cache_problems(runner: Any) -> Iterator[str]:
    pool = runner.token_to_kv_pool
    if type(pool) is not MHATokenToKVPool:
        yield f"the KV cache is a {type(pool).__name__}; only plain multi-head caches were tested"
    elif pool.dtype != runner.dtype or pool.get_key_buffer(pool.start_layer).ndim != 3:
        yield (
            f"the KV cache holds {pool.dtype} and the model computes in {runner.dtype}; leave out --kv-cache-dtype and "
            "other cache layouts"
        )
