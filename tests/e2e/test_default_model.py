"""The embedded model: small, real, able to recall; and the same text on any number of ranks, layout and strategy."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from scheduler.config import SchedulerConfig
from server.arguments import DEFAULT_MODEL
from server.chat_template import ChatTemplate
from sp_backend.config import BackendConfig
from sp_backend.models.config import ModelConfig
from tests.e2e.rank_workers import Engine

MEGABYTE = 10**6
VARIANTS = [
    ("tokens", "ring_pass_kv", False),
    ("tokens", "ring_pass_kv_up", False),
    ("tokens", "token_ring", False),
    ("heads", "sharded_q", False),
    ("heads", "sharded_q", True),
]


def engine(sp: int = 1, layout: str = "tokens", strategy: str = "ring_pass_kv", redundant: bool = False) -> Engine:
    config = BackendConfig(
        model_path=str(DEFAULT_MODEL),
        dtype="float32",
        sp_size=sp,
        layout=layout,
        strategy=strategy,
        redundant_kv=redundant,
        num_pages=64,
        page_size=16,
        context_length=131072,
    )
    return Engine(config, SchedulerConfig(chunked_prefill_size=256, sp_threshold=32))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def source(tokenizer: Tokenizer) -> list[int]:
    """Some Python for the model to read."""
    return encode(tokenizer, (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text())


def test_it_ships_small_and_takes_long_prompts() -> None:
    assert sum(file.stat().st_size for file in DEFAULT_MODEL.iterdir() if file.is_file()) <= 16 * MEGABYTE
    assert ModelConfig.load(DEFAULT_MODEL).max_position_embeddings >= 131072
    template = ChatTemplate.load(DEFAULT_MODEL, None)
    assert "Hello" in template.render([{"role": "user", "content": "Hello"}])


def test_it_recalls_what_was_planted_256_tokens_back(tokenizer: Tokenizer, source: list[int]) -> None:
    chance = random.Random(5)
    prompts, values = [], []
    for i in range(10):
        if i % 2:
            value = str(chance.randrange(10**4, 10**6))
            planted, question = f"\nCACHE_LIMIT = {value}\n", "\nassert CACHE_LIMIT =="
        else:
            value = "".join(chance.choice("bdfgklmnprstv") + chance.choice("aeiou") for _ in range(3))
            planted, question = f'\nSERVER_NAME = "{value}"\n', '\nassert SERVER_NAME == "'
        at = chance.randrange(len(source) - 400)
        between = source[at + 40 : at + 296]
        prompts.append(source[at : at + 40] + encode(tokenizer, planted) + between + encode(tokenizer, question))
        values.append(value)
    answers = [tokenizer.decode(tokens).strip() for tokens in engine().complete(prompts, 10)]
    recalled = [answer.startswith(value) for answer, value in zip(answers, values, strict=True)]
    assert sum(recalled) >= 8, list(zip(values, answers, strict=True))


def test_the_same_text_on_any_ranks(tokenizer: Tokenizer, source: list[int]) -> None:
    prompts = [source[:20], source[:300], source[100:717]]
    expected = engine().complete(prompts, 16)
    for sp in (2, 3, 4):
        for variant in VARIANTS:
            assert engine(sp, *variant).complete(prompts, 16) == expected, (sp, *variant)
