"""What a worker needs to know to build itself. Pure: no torch."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from sp_backend.strategies import Options, Variant

LAYOUTS = ("tokens", "heads")
AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")


class BackendConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Resolved values only: every `auto` was decided before this is made.

    World = tp_size x sp_size ranks; rank = tp_rank * sp_size + sp_rank, so an SP group is a run of neighbours.
    """

    model_path: str
    tokenizer_path: str | None = None  # folder of tokenizer.json, for grammars; None: model_path
    dtype: str  # one of DTYPES
    device: str = "cpu"
    load_format: str = "auto"  # auto | dummy
    tp_size: int = 1
    sp_size: int = 1
    layout: str = "tokens"  # one of LAYOUTS
    strategy: str = "ring_pass_kv"  # the plan of spread prefills; AUTO: chosen for each step by prediction
    options: Options = Options()  # of that strategy
    overlap: bool = True  # attend while blocks travel
    topology: str | None = None  # a file or preset with links and rates; None: measured at start
    causal: bool = True  # False: every token sees all others, as in bidirectional embedding models
    redundant_kv: bool = False  # layout heads: every rank computes K/V of all new tokens
    kernel: str = "torch_cpu"
    page_size: int = 64
    num_pages: int | None = None  # per rank; None: from kv_memory_bytes
    kv_memory_bytes: int | None = None  # per rank
    context_length: int
    num_threads: int = 1
    takes_all_cores: bool = False  # the ranks: the server process has none of its own
    seed: int = 0  # dummy weights
    dist_timeout: float = 300.0  # seconds any collective or transfer may take

    @property
    def variant(self) -> Variant:
        """What spread prefills run if nothing is chosen."""
        default = "sharded_q" if self.layout == "heads" else "ring_pass_kv"
        return Variant(default if self.strategy == AUTO else self.strategy, self.options)

    @property
    def world_size(self) -> int:
        return self.tp_size * self.sp_size


def cache_folder() -> Path:
    """Where what was measured or compiled on this machine is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sp-serve"
