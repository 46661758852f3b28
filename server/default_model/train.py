"""Train the embedded default model, a small Qwen3 checkpoint, from the Python standard library.

What it makes
    A folder in Hugging Face format (config, byte-level BPE tokenizer with a chat template, bfloat16
    safetensors) of about 9 MB.  The model writes recognisable Python and copies names and numbers out of
    its context.  It is a stand-in that lets the server start, and be tested, with no download; it is not
    an assistant.

Why it is built this way
    * The text is the standard library's own source, which every machine with Python has.
    * Copying comes from made-up recall data: definitions, facts and random spans are planted in real code
      and asked for later.  The loss weighs the recalled tokens up and ignores the first appearance of a
      random value, which nothing could predict.
    * Rows are short, but their positions are not: in many rows the position ids jump ahead at random places,
      by up to the whole 131,072 window, so that far rotary angles are trained too.
    * The rows grow towards the end of the run, since picking one token out of many has to be learned on
      many tokens.
    * The run is a time budget, not a step count; the learning rate follows the elapsed share of it.

Known limits
    * The text differs with the Python version (and some distributions leave out `test`), so a retrained
      tokenizer and weights differ from the shipped ones; `--tokenizer` keeps an existing tokenizer.
    * With a time budget the result depends on the machine's speed: the same seed gives the same rows in the
      same order, not the same weights.

    python -m server.default_model.train --out /tmp/default_model --minutes 40
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Snippet = tuple[Ints, Floats]  # token ids, and the loss weight of each

CONTEXT = 131_072
SPECIAL_TOKENS = ["<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|pad|>"]
# Runs of letters, single digits (so that any number can be copied digit by digit), runs of other signs, and
# white space, where a line break and the indentation after it make one token.
PRE_TOKENS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role not in ['system', 'developer', 'user', 'assistant', 'tool'] %}
{{- raise_exception('unknown role: ' + message.role) }}
{%- endif %}
{{- '<|' + ('system' if message.role == 'developer' else message.role) + '|>\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- elif message.content %}
{%- for part in message.content if part.type == 'text' %}{{- part.text }}{%- endfor %}
{%- endif %}
{{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- endif %}"""


@dataclass(frozen=True)
class Shape:
    """The sizes of the network; 12 query heads split evenly over 2, 3, 4 or 6 ranks."""

    vocab_size: int = 4032
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 12
    num_key_value_heads: int = 4
    head_dim: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e8


# ---------------------------------------------------------------------------------------------------------
# Text


def read_texts() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The standard library as (path, source) pairs: a training part, and about 2 % of the files held out.

    Left out: installed packages, files of character tables (`encodings`) and of escaped text (`pydoc_data`),
    test data, and what does not decode or parse.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "data", "lib2to3"}
    train: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped)
        for name in sorted(files):
            if not name.endswith(".py"):
                continue
            path = Path(folder, name)
            try:
                text = path.read_text(encoding="utf-8")
                ast.parse(text)
            except (OSError, ValueError, SyntaxError):
                continue
            if len(text) < 200:
                continue
            relative = path.relative_to(root).as_posix()
            chosen = int(hashlib.sha256(relative.encode()).hexdigest(), 16) % 50 == 0
            (held_out if chosen else train).append((relative, text))
    return train, held_out


def build_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_assets(out: Path, tokenizer: Tokenizer, shape: Shape) -> None:
    """Everything of the checkpoint but the weights."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    sizes = asdict(shape)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **sizes,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * shape.num_hidden_layers,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|end|>"],
        "pad_token_id": ids["<|pad|>"],
    }
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|pad|>"],
        "do_sample": False,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": SPECIAL_TOKENS[2:6],
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
