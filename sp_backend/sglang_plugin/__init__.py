"""Sequence-parallel prefill inside SGLang: attention backends that run this package's plans over its CP ranks.

SGLang shards a prompt in zigzag, and then gathers all keys and values on every rank before it attends. These backends
attend while blocks travel instead. SGLang's KV cache is the same on every CP rank, so plans keep copies (see Layout),
and decoding needs no communication. SGLang calls `register` in each of its processes (entry point group
`sglang.srt.plugins`). See docs/sglang.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from sp_backend.config import AUTO

BACKENDS = {  # --attention-backend -> strategy
    "sp_ring_pass_kv": "ring_pass_kv",
    "sp_token_ring": "token_ring",
    "sp_ring_pass_q": "ring_pass_q",
    "sp_auto": AUTO,
}


def register() -> None:
    """Makes the backends known. One that is asked for but was not registered is refused by SGLang itself."""
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    add_attention_backend_choices(list(BACKENDS))
    for name in BACKENDS:
        register_attention_backend(name)(partial(_create, name))


def _create(name: str, runner: Any) -> Any:
    """Raises ValueError, which ends the server's start, where the results would be wrong or are untested."""
    from sp_backend.sglang_plugin.support import check

    check(name, runner)
    from sp_backend.sglang_plugin.backend import SPAttentionBackend

    return SPAttentionBackend(name, runner)
