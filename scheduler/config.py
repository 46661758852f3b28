"""How the controller batches, caches and waits."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 4096  # new tokens


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_running_requests: int = 64  # prefilling and decoding ones together
    max_queued_requests: int | None = None  # beyond those that a free slot awaits; None: unlimited
    chunked_prefill_size: int = CHUNK  # new tokens of one prefill step; -1: whole prompts
    max_prefill_seconds: float = 0.5  # predicted time of one prefill step while streams run
    sp_threshold: int | None = None  # prompts with fewer new tokens live on one rank; None: where it pays
    prefix_cache: bool = True
    watchdog_timeout: float = 300.0  # seconds one step may take, for each chunk that a prompt would be cut into
    decode_log_interval: int = 40  # decode steps between two log lines

    def __post_init__(self) -> None:
        if self.max_running_requests < 1:
            raise ValueError(f"max_running_requests must be at least 1, not {self.max_running_requests}")
        if self.max_queued_requests is not None and self.max_queued_requests < 0:
            raise ValueError(f"max_queued_requests must not be negative, but is {self.max_queued_requests}")
        if self.chunked_prefill_size != -1 and self.chunked_prefill_size < 1:
            raise ValueError(f"chunked_prefill_size must be positive or -1, not {self.chunked_prefill_size}")
        if self.sp_threshold is not None and self.sp_threshold < 0:
            raise ValueError(f"sp_threshold must not be negative, but is {self.sp_threshold}")
        if self.decode_log_interval < 1:
            raise ValueError(f"decode_log_interval must be at least 1, not {self.decode_log_interval}")
        for name in ("max_prefill_seconds", "watchdog_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
