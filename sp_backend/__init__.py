"""Sequence-parallel attention: plans, their proof, the executor, kernels, models and the worker process.

The names below are the library's; they are imported when first used, so that importing the package loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sp_backend.functional import History, attention, counters, position_ids, shard, unshard
    from sp_backend.strategies import Options

__all__ = ["History", "Options", "attention", "counters", "position_ids", "shard", "unshard"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sp_backend import functional

    return getattr(functional, name)
