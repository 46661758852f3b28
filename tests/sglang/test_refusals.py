"""What the plugin refuses when a server starts, and how it says so."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.plugins import load_plugins

from sp_backend.sglang_plugin import support
from tests.sglang.pools import HEAD_DIM, HEADS, KV_HEADS, Memory, parallel, runner_of

NAME = "sp_ring_pass_kv"


def refusal(*, parallel_changes: dict[str, Any] | None = None, heads: int = HEADS, **changes: Any) -> str:
    """The error of making a backend; changes: of the model runner, or, if it has no such attribute, of a layer."""
    load_plugins()
    memory = Memory.make([4], 1, torch.Generator())
    layer = RadixAttention(heads, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, layer_id=0)
    runner = runner_of(memory, [layer], NAME)
    for name, value in changes.items():
        setattr(runner if hasattr(runner, name) else layer, name, value)
    with parallel(0, 2, **(parallel_changes or {})), pytest.raises(ValueError) as error:
        ATTENTION_BACKENDS[NAME](runner)
    return str(error.value)


def model(architecture: str) -> Any:
    return SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]), num_attention_heads=HEADS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda:0"}, "runs on CPUs only, not on cuda:0: its GPU kernels do not exist yet"),
        ({"prefill_attention_backend_str": "fa3"}, "does nothing for decoding alone, and prefill runs fa3"),
        ({"spec_algorithm": SimpleNamespace(is_none=lambda: False)}, "leave out --speculative-algorithm"),
        ({"model_config": model("Qwen2ForCausalLM")}, "Qwen2ForCausalLM was never compared"),
        ({"sliding_window_size": 128}, "attention layer 0 has a sliding window"),
        ({"logit_cap": 30.0}, "attention layer 0 caps logits"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention layer 0 is not causal self-attention"),
        ({"v_head_dim": 16}, "keys of size 32 and values of size 16"),
        ({"dtype": torch.bfloat16}, "leave out --kv-cache-dtype"),
    ],
)
def test_what_would_be_wrong_or_was_never_run_is_refused(changes: dict[str, Any], message: str) -> None:
    error = refusal(**changes)
    assert error.startswith(f"--attention-backend {NAME}: ") and message in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_prefill_cp": False}, "--attn-cp-size N --enable-prefill-cp --cp-strategy zigzag"),
        ({"cp_strategy": "interleave"}, "--cp-strategy zigzag"),
        ({"attn_dcp_size": 2}, "--dcp-size 2 together with context parallelism"),
        ({"pp_size": 2}, "--pp-size 2 together with context parallelism"),
    ],
)
def test_without_the_right_parallelism_it_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(parallel_changes=changes)


def test_a_model_that_divides_heads_over_context_parallel_ranks_is_refused() -> None:
    """As SGLang's Llama does: half of its heads on each of two ranks that hold different tokens."""
    error = refusal(heads=HEADS // 2, model_config=model("LlamaForCausalLM"))
    assert "LlamaForCausalLM divides attention heads by --tp-size" in error
    assert "Serve it without context parallelism" in error


def test_other_versions_of_sglang_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "version", lambda name: "0.5.24")
    assert "SGLang 0.5.24 was never tested with it; install sglang==0.5.23" in refusal()


def test_other_caches_are_refused() -> None:
    class SlidingPool(MHATokenToKVPool):
        pass

    pool = SlidingPool(8, 1, torch.float32, KV_HEADS, HEAD_DIM, 1, "cpu", enable_memory_saver=False)
    assert "the KV cache is a SlidingPool" in refusal(token_to_kv_pool=pool)


def test_sglang_refuses_a_backend_whose_plugin_is_not_active() -> None:
    """SGLang only logs a plugin that does not load; without it the name is none of its choices."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", "none", "--attention-backend", NAME]
    env = os.environ | {"SGLANG_PLUGINS": "torch_cpu"}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert ran.returncode != 0 and f"invalid choice: '{NAME}'" in ran.stderr
