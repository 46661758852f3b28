"""An SGLang platform of plain torch operators on CPUs: no sgl_kernel, no triton kernels, no AMX."""

from __future__ import annotations

from typing import Any

import torch


def activate() -> str:
    return "sglang_cpu.platform:TorchCpuPlatform"


def __getattr__(name: str) -> Any:
    """SGLang activates platforms while it is still importing what this one derives from."""
    if name != "TorchCpuPlatform":
        raise AttributeError(name)
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

    class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
        _enum = PlatformEnum.OOT
        device_name = "cpu"
        device_type = "cpu"
        capabilities = PlatformCapabilities()

        def is_pin_memory_available(self, device: Any = None) -> bool:
            return False

        def get_default_attention_backend(self) -> str:
            return "torch_native"

        def get_dispatch_key_name(self) -> str:
            return "native"

        def get_compile_backend(self, mode: Any = None) -> str:
            return "eager"

        def get_torch_profiler_activity(self) -> Any:
            return torch.profiler.ProfilerActivity.CPU

        def get_torch_profiler_activity_str(self) -> str:
            return "CPU"

    globals()[name] = TorchCpuPlatform
    return TorchCpuPlatform
