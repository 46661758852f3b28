"""The decoder against transformers: every family, every way of splitting it, and errors that must not pass.

Attention is dense here, on one rank or on threads in lockstep; sequence parallelism has its own tests.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sp_backend.models import decoder as decoder_module
from sp_backend.models.config import ModelConfig
from sp_backend.models.decoder import Decoder
from sp_backend.parallel import Collectives, NoCollectives, Shard
from tests.checkpoints import FAMILIES, VOCAB_SIZE, WINDOW, make_checkpoint, oracle_greedy, oracle_logits
from tests.sp_backend.dense import DenseAttention, Lockstep, LockstepCollectives

torch.set_num_threads(1)

TOLERANCE = 1e-4  # absolute; logits have a standard deviation of 1 to 5
NUM_TOKENS = 100
TOKENS = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))


def load(
    folder: Path,
    config: ModelConfig | None = None,
    shard: Shard | None = None,
    collectives: Collectives | None = None,
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    config = config or ModelConfig.load(folder)
    decoder = Decoder(config, shard or Shard(), dtype, "cpu", collectives or NoCollectives())
    decoder.load(folder)
    return decoder


def dense_logits(decoder: Decoder, attention: DenseAttention | None = None) -> Tensor:
    attention = attention or DenseAttention(decoder.config, decoder.shard)
    return decoder.logits(decoder.forward(TOKENS, torch.arange(NUM_TOKENS), attention))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes each checkpoint once."""
    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = repr((family, options))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return make


@pytest.fixture(scope="module")
def expected() -> Callable[[Path], Tensor]:
    """transformers' logits of TOKENS."""
    known: dict[Path, Tensor] = {}

    def compute(folder: Path) -> Tensor:
        if folder not in known:
            known[folder] = oracle_logits(folder, TOKENS.tolist())
        return known[folder]

    return compute


def error(actual: Tensor, wanted: Tensor) -> float:
    return float((actual - wanted).abs().max())


HEADS = [{}, {"num_heads": 8, "num_kv_heads": 1}]


@pytest.mark.parametrize("heads", HEADS, ids=["12:4", "8:1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_at_every_position(family, heads, checkpoint, expected):
    folder = checkpoint(family, **heads)
    assert error(dense_logits(load(folder)), expected(folder)) < TOLERANCE


@pytest.mark.parametrize("heads", HEADS, ids=["12:4", "8:1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_would_show_errors(family, heads, checkpoint, expected):
    """Uneven attention and clear winners: without them the comparisons here would prove little."""
    folder = checkpoint(family, **heads)
    decoder = load(folder)
    attention = DenseAttention(decoder.config, decoder.shard)
    dense_logits(decoder, attention)
    assert min(attention.score_deviations) >= 2
    best, second = expected(folder).topk(2).values.unbind(-1)
    assert float((best - second).min()) >= 1e-3
    assert float(expected(folder).std()) >= 1
    assert len(set(expected(folder).argmax(-1).tolist())) > NUM_TOKENS / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family, checkpoint):
    """Token by token after the prompt, over keys of earlier calls."""
    folder = checkpoint(family)
    decoder = load(folder)
    attention = DenseAttention(decoder.config, decoder.shard)
    new, positions, tokens = TOKENS[:60], torch.arange(60), []
    for _ in range(20):
        hidden = decoder.forward(new, positions, attention)
        tokens.append(int(decoder.logits(hidden[-1:]).argmax()))
        new, positions = torch.tensor(tokens[-1:]), positions[-1:] + 1
    assert tokens == oracle_greedy(folder, TOKENS[:60].tolist(), 20)


@pytest.mark.parametrize("wanted", [1, 7])
def test_the_last_layer_of_some_rows_alone(wanted, checkpoint, expected):
    """... and of all others its keys, which a later call sees."""
    folder = checkpoint("qwen3")
    decoder = load(folder)
    attention = DenseAttention(decoder.config, decoder.shard, last_rows=torch.arange(60 - wanted, 60))
    hidden = decoder.forward(TOKENS[:60], torch.arange(60), attention)
    assert error(decoder.logits(hidden), expected(folder)[60 - wanted : 60]) < TOLERANCE
    attention.last_rows = None
    hidden = decoder.forward(TOKENS[60:], torch.arange(60, NUM_TOKENS), attention)
    assert error(decoder.logits(hidden), expected(folder)[60:]) < TOLERANCE


def rope(kind: str, **fields: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear rope": ("llama2", rope("linear", factor=4.0)),
    "yarn rope": ("qwen3", rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "yarn rope, untruncated": (
        "qwen2",
        rope("yarn", factor=8.0, original_max_position_embeddings=64, attention_factor=1.3, truncate=False),
    ),
    "rope theta": (
        "llama2",
        rope("default") | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "all biases": ("llama2", {"attention_bias": True, "mlp_bias": True}),
    "attention biases": ("qwen3", {"attention_bias": True}),
    "head_dim apart from hidden size": ("mistral", {"head_dim": 32}),
    "large eps": ("llama2", {"rms_norm_eps": 0.05}),
    "window in the last layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "window in listed layers": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "no window": ("mistral", {"sliding_window": None}),
    "tied": ("llama2", {"tie_word_embeddings": True}),
    "untied": ("qwen2", {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_families_equal_transformers(variant, checkpoint, expected):
    family, fields = VARIANTS[variant]
    folder = checkpoint(family, **fields)
    assert error(dense_logits(load(folder)), expected(folder)) < TOLERANCE


MISTAKES: dict[str, tuple[str, Callable[[ModelConfig], ModelConfig]]] = {
    "rope factor": ("llama3", lambda c: replace(c, rope=replace(c.rope, factor=7.0))),
    "rope low frequencies": ("llama3", lambda c: replace(c, rope=replace(c.rope, low_freq_factor=1.1))),
    "rope original length": (
        "llama3",
        lambda c: replace(c, rope=replace(c.rope, original_max_positions=200)),
    ),
    "no rope scaling": ("llama3", lambda c: replace(c, rope=replace(c.rope, kind="default"))),
    "rope theta": ("qwen3", lambda c: replace(c, rope=replace(c.rope, theta=10100.0))),
    "window one too long": ("mistral", lambda c: replace(c, windows=(WINDOW + 1,) * 3)),
    "window of one layer": ("mistral", lambda c: replace(c, windows=(WINDOW, None, WINDOW))),
    "eps": ("llama2", lambda c: replace(c, rms_norm_eps=1e-3)),
    "no biases": ("qwen2", lambda c: replace(c, qkv_bias=False)),
    "no norms of q and k": ("qwen3", lambda c: replace(c, qk_norm=False)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_config_is_noticed(mistake, checkpoint, expected):
    """The comparison must fail by a wide margin, or it proves nothing when it holds."""
    family, spoil = MISTAKES[mistake]
    folder = checkpoint(family)
    logits = dense_logits(load(folder, spoil(ModelConfig.load(folder))))
    assert error(logits, expected(folder)) > 20 * TOLERANCE


def test_a_window_changes_only_what_lies_beyond_it(checkpoint, expected):
    folder = checkpoint("mistral")
    config = ModelConfig.load(folder)
    unlimited = dense_logits(load(folder, replace(config, windows=(None,) * config.num_layers)))
    assert error(unlimited[:WINDOW], expected(folder)[:WINDOW]) < TOLERANCE
    assert (unlimited - expected(folder))[WINDOW:].abs().amax(-1).min() > TOLERANCE


def split_logits(folder: Path, tp_size: int, sp_size: int, layout: str, share_kv: bool = False) -> list[Tensor]:
    """Every rank's logits; with `share_kv` each SP rank projects the keys of some rows and gets the rest."""
    config, world = ModelConfig.load(folder), tp_size * sp_size
    shards = [Shard.of_rank(rank, tp_size, sp_size, layout) for rank in range(world)]
    groups = {tuple(shard.group_ranks()): Lockstep(shard.group_size) for shard in shards}
    kv_groups = [Lockstep(sp_size) for _ in range(tp_size)]

    def run(shard: Shard) -> Tensor:
        group, kv_group = groups[tuple(shard.group_ranks())], kv_groups[shard.tp_rank]
        kv_rows, exchange = slice(None), lambda kv: kv
        if share_kv:
            kv_rows = slice(NUM_TOKENS * shard.sp_rank // sp_size, NUM_TOKENS * (shard.sp_rank + 1) // sp_size)
            exchange = lambda kv: torch.cat(kv_group.exchange(shard.sp_rank, kv))  # noqa: E731
        try:
            decoder = load(folder, config, shard, LockstepCollectives(group, shard.group_rank))
            return dense_logits(decoder, DenseAttention(config, shard, kv_rows, exchange))
        except BaseException:
            group.barrier.abort()
            kv_group.barrier.abort()
            raise

    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(run, shards))


SPLITS = [
    (2, 1, "tokens"),
    (4, 1, "tokens"),
    (2, 2, "tokens"),
    (2, 2, "heads"),
    (1, 6, "heads"),
    (4, 3, "heads"),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tp_size", "sp_size", "layout"), SPLITS)
def test_split_weights_give_the_same_logits_on_every_rank(family, tp_size, sp_size, layout, checkpoint, expected):
    folder = checkpoint(family)
    for logits in split_logits(folder, tp_size, sp_size, layout):
        assert error(logits, expected(folder)) < TOLERANCE


@pytest.mark.parametrize("block_rows", [7, 4096])
def test_ranks_may_project_keys_of_some_rows_only(block_rows, checkpoint, expected, monkeypatch):
    monkeypatch.setattr(decoder_module, "BLOCK_ROWS", block_rows)
    folder = checkpoint("qwen2")
    for logits in split_logits(folder, 2, 3, "heads", share_kv=True):
        assert error(logits, expected(folder)) < TOLERANCE


def test_biases_of_split_projections_count_once(checkpoint, expected):
    folder = checkpoint("llama2", attention_bias=True, mlp_bias=True)
    for logits in split_logits(folder, 2, 2, "heads"):
        assert error(logits, expected(folder)) < TOLERANCE


def test_blocks_of_rows_change_nothing(checkpoint, expected, monkeypatch):
    monkeypatch.setattr(decoder_module, "BLOCK_ROWS", 33)
    folder = checkpoint("qwen3")
    assert error(dense_logits(load(folder)), expected(folder)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_is_as_close_to_fp32_as_transformers(family, dtype, checkpoint, expected):
    folder = checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.inference_mode():
        theirs = model(TOKENS[None]).logits[0].float()
    ours = dense_logits(load(folder, dtype=dtype))
    assert ours.dtype == torch.float32
    assert (ours - expected(folder)).square().mean() < 1.5 * (theirs - expected(folder)).square().mean()


def test_a_rank_without_tokens_still_attends(checkpoint):
    """Its peers in sequence parallelism wait for it in every layer."""
    decoder = load(checkpoint("llama2"))
    calls = []

    class Recorder:
        kv_rows = slice(0, 0)
        last_rows = None

        def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
            calls.append((layer, tuple(q.shape), tuple(kv.shape)))
            return q

    hidden = decoder.forward(TOKENS[:0], TOKENS[:0], Recorder())
    assert hidden.shape == (0, 192)
    assert calls == [(layer, (0, 12, 16), (0, 2, 4, 16)) for layer in range(3)]
