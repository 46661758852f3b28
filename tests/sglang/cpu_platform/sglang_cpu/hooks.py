"""What SGLang 0.5.23 lacks for context parallelism on CPUs, and faults that tests ask for."""

from __future__ import annotations

import os
from typing import Any

import torch

ALL_GATHER = "all_gather_for_tests"
GROUP = "sglang.srt.distributed.parallel_state.GroupCoordinator"


def register() -> None:
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # it asks for the current CUDA stream, on any device
    HookRegistry.register(
        "sglang.srt.model_executor.runner.eager_runner.EagerRunner._execute_extend_cp", _no_stream, HookType.BEFORE
    )
    # its collectives are custom operators, which a platform from outside gets for device PrivateUse1 only
    HookRegistry.register(f"{GROUP}.all_gather_into_tensor", _all_gather_into_tensor, HookType.REPLACE)
    HookRegistry.register(f"{GROUP}.reduce_scatter_tensor", _reduce_scatter_tensor, HookType.REPLACE)
    add_attention_backend_choices([ALL_GATHER])
    register_attention_backend(ALL_GATHER)(_all_gather)
    if os.environ.get("SGLANG_CPU_FAULT") == "merge":
        _break_merging()


def _all_gather(runner: Any) -> Any:
    from sglang_cpu.all_gather import AllGatherBackend

    return AllGatherBackend(runner)


def _no_stream(self: Any, *args: Any, **kwargs: Any) -> None:
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment]


def _all_gather_into_tensor(self: Any, output: torch.Tensor, input: torch.Tensor) -> None:
    self._all_gather_into_tensor(output, input)


def _reduce_scatter_tensor(self: Any, output: torch.Tensor, input: torch.Tensor) -> None:
    self._reduce_scatter_tensor(output, input)


def _break_merging() -> None:
    """Partial results replace each other instead of being merged."""
    from sp_backend.state import AttentionState

    def merge_(self: AttentionState, other: AttentionState) -> AttentionState:
        self.out.copy_(other.out)
        self.lse.copy_(other.lse)
        return self

    AttentionState.merge_ = merge_  # type: ignore[method-assign]
