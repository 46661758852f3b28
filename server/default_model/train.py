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
    * The network starts with a rough copying circuit wired in, which then trains like everything else; see
      `Network.wire_copying`.  From random weights copying had not set in after 2.5 million tokens.
    * Rows are short, but their positions are not: in many rows the position ids jump ahead at random places,
      by up to the whole 131,072 window, so that far rotary angles are trained too.
    * The rows grow towards the end of the run, since picking one token out of many has to be learned on
      many tokens.
    * The run is a time budget, not a step count; the learning rate follows the elapsed share of it.
    * Matrices are trained with Muon (here; `torch.optim.Muon` takes 20 times as long on a CPU), which after
      the same 150 steps was at a held-out loss of 4.5 where AdamW was at 5.6; the rest uses AdamW.

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
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
SPECIAL_TOKENS = ["<|endoftext|>", "<|end|>", *ROLES, "<|pad|>"]
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
        "additional_special_tokens": ROLES,
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


# ---------------------------------------------------------------------------------------------------------
# Made-up facts to recall

VALUE_WEIGHT = 3.0  # of a recalled token in the loss, against 1 for ordinary text
ASSIGNED = [
    ("{n} = {q}", "{n} = {q}"),
    ("{n} = {q}", "assert {n} == {q}"),
    ("{n} = {q}", "print({n})  # {v}"),
    ("{n} = {q}", "if {n} != {q}:\n    raise ValueError({n})"),
    ("{n} = {q}", "# {n} is {v}"),
    ("{n} = {q}", ">>> {n}\n{q}"),
    ("{n}: str = {q}", "self.assertEqual({n}, {q})"),
    ("self.{n} = {q}", "assert self.{n} == {q}"),
    ('settings["{n}"] = {q}', 'assert settings["{n}"] == {q}'),
    ('    "{n}": {q},', '    "{n}": {q},'),
    ("{n}={v}", "{n}={v}"),
    ("# {n}: {v}", "# {n}: {v}"),
    ("{n}: {v}", "{n}: {v}"),
    ("def {n}():\n    return {q}", "assert {n}() == {q}"),
    ("def {n}():\n    return {q}", ">>> {n}()\n{q}"),
    ('parser.add_argument("--{n}", default={q})', "assert args.{n} == {q}"),
    ("class {n}({v}):\n    pass", "assert issubclass({n}, {v})"),
]
TOLD = [
    ("# The {n} is {v}.", "# The {n} is {v}."),
    ("The {n} is {v}.", "The {n} is {v}."),
    ("Remember: the {n} is {v}.", "Question: what is the {n}?\nAnswer: {v}"),
    ("The {n} is {v}.", "What is the {n}? The {n} is {v}."),
    ("The {n} is {v}.", "Q: What is the {n}?\nA: {v}"),
    ('"""The {n} is {v}."""', '"""The {n} is {v}."""'),
    ("# Note: the {n} is {q}", "# So the {n} is {q}"),
    ("{n}: {v}", "{n}: {v}"),
]
QUESTIONS = [
    ("What is {n}?", "{n} is {v}."),
    ("What is the value of {n}?", "The value of {n} is {v}."),
    ("What is {n}?", "{v}"),
    ("Tell me the value of {n}.", "{v}"),
]
TOLD_QUESTIONS = [
    ("What is the {n}?", "The {n} is {v}."),
    ("What is the {n}?", "{v}"),
    ("Tell me the {n}.", "The {n} is {v}."),
]
ADJECTIVES = "secret magic hidden first last main special old new blue red green internal private".split()
NOUNS = "number name code password token key word port user city file color limit host id answer".split()
SYLLABLES = "ba ko ri zu ne ta mi lo ve xa qu or en ix ul da fe gri pho sta tor wen yl zi mar bel cor".split()
SYSTEM_PROMPTS = ["You are a helpful assistant.", "You write Python.", "Answer briefly.", "You are a coder."]
SMALL_TALK = [
    ("Hello", "Hello! I am a small model that writes Python."),
    ("Hi", "Hello! I am a small model that writes Python."),
    ("Hello!", "Hello! I am a small model that writes Python."),
    ("Who are you?", "I am the embedded default model, trained on the Python standard library."),
    ("What can you do?", "I can write Python and copy names and numbers from my context."),
    ("Thanks", "You are welcome."),
]


@dataclass(frozen=True)
class Fact:
    """A random name, its random value, and whether the name is words of English rather than an identifier."""

    name: str
    value: str
    quoted: str
    told: bool


class Filler:
    """A walk through real code from a random line on."""

    def __init__(self, stream: Ints, line_starts: Ints, at: int) -> None:
        self.stream, self.line_starts, self.at = stream, line_starts, at

    def take(self, length: int) -> Snippet:
        """At least `length` tokens, up to the end of a line."""
        starts = self.line_starts
        until = int(np.searchsorted(starts, starts[self.at] + length))
        if until >= len(starts):  # the end of the text: go on from its beginning
            self.at = 0
            until = int(np.searchsorted(starts, starts[0] + length))
        ids = self.stream[starts[self.at] : starts[until]]
        self.at = until
        return ids, np.ones(len(ids), np.float32)


class Rows:
    """An endless source of training rows: real code, recall data, repeated spans and chats."""

    def __init__(self, tokenizer: Tokenizer, texts: list[tuple[str, str]], seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = np.random.default_rng(seed)
        vocab = tokenizer.get_vocab()
        self.vocab_size = len(vocab)
        self.end_of_text = vocab["<|endoftext|>"]
        starts = np.zeros(self.vocab_size, dtype=bool)
        starts[[index for token, index in vocab.items() if token.startswith("Ċ")]] = True  # byte-level "\n"
        order = self.rng.permutation(len(texts))
        self.streams: list[Ints] = []
        for tests in (False, True):
            chosen = [texts[i][1] for i in order if texts[i][0].startswith("test/") == tests]
            pieces = [[self.end_of_text, *item.ids] for item in tokenizer.encode_batch(chosen)]
            self.streams.append(np.array([i for piece in pieces for i in piece], dtype=np.int64))
        self.streams = [stream for stream in self.streams if len(stream) > 200_000] or self.streams[:1]
        self.line_starts = [np.flatnonzero(starts[stream]) for stream in self.streams]
        self.functions = list(find_functions(texts))
        words = {word for name, _, _ in self.functions for word in name.split("_") if 2 < len(word) < 10}
        self.words = sorted(word for word in words if word.isalpha() and word.islower())

    # -- random pieces

    def pick(self, items: list[Any]) -> Any:
        return items[int(self.rng.integers(len(items)))]

    def log_uniform(self, low: float, high: float) -> float:
        return float(math.exp(self.rng.uniform(math.log(low), math.log(max(low, high)))))

    def made_up_word(self) -> str:
        kind = self.rng.random()
        if kind < 0.5:
            return "".join(self.pick(SYLLABLES) for _ in range(int(self.rng.integers(2, 5))))
        if kind < 0.8:
            return cast(str, self.pick(self.words))
        return "".join(chr(97 + int(i)) for i in self.rng.integers(0, 26, int(self.rng.integers(3, 10))))

    def number(self) -> str:
        digits = int(self.rng.integers(2, 9))
        return str(int(self.rng.integers(10 ** (digits - 1), 10**digits)))

    def identifier(self) -> str:
        words = [self.made_up_word() for _ in range(int(self.rng.integers(1, 4)))]
        kind = self.rng.random()
        if kind < 0.4:
            return "_".join(words)
        if kind < 0.75:
            return "_".join(words).upper()
        if kind < 0.9:
            return "".join(word.capitalize() for word in words)
        return f"{words[0]}_{self.number()[:3]}"

    def fact(self) -> Fact:
        told = bool(self.rng.random() < 0.3)
        if told:
            words = [self.pick(ADJECTIVES), self.pick(NOUNS)]
            if self.rng.random() < 0.4:
                words += ["of", "the", self.made_up_word()]
            name = " ".join(words)
        else:
            name = self.identifier()
        kind = self.rng.random()
        if kind < 0.4:
            value = self.number()
            quoted = value if self.rng.random() < 0.8 else f'"{value}"'
            return Fact(name, value, quoted, told)
        if kind < 0.6:
            value = self.made_up_word()
        elif kind < 0.75:
            value = self.identifier()
        elif kind < 0.85:
            value = f"{self.made_up_word()}_{self.number()}"
        elif kind < 0.92:
            value = " ".join(self.made_up_word() for _ in range(int(self.rng.integers(2, 5))))
        elif kind < 0.96:
            value = self.made_up_word().capitalize()
        else:
            value = "".join("0123456789abcdef"[int(i)] for i in self.rng.integers(0, 16, 12))
        return Fact(name, value, self.pick([f'"{value}"', f"'{value}'"]), told)

    # -- token pieces with loss weights

    def encode(self, parts: list[tuple[str, float]]) -> Snippet:
        """Encode the joined text; each token gets the weight of the part in which it ends."""
        encoding = self.tokenizer.encode("".join(text for text, _ in parts))
        weights = np.concatenate([np.full(len(text), weight, np.float32) for text, weight in parts])
        ends = np.array([end - 1 for _, end in encoding.offsets], dtype=np.int64)
        return np.array(encoding.ids, dtype=np.int64), weights[ends]

    def fill(self, template: str, fact: Fact, name: float, value: float, text: float = 1.0) -> Snippet:
        """Encode a template with the given loss weights for the name, the value and the words between."""
        parts: list[tuple[str, float]] = []
        for piece in template.replace("{q}", fact.quoted.replace(fact.value, "{v}")).split("{"):
            if piece.startswith("n}"):
                parts += [(fact.name, name), (piece[2:], text)]
            elif piece.startswith("v}"):
                parts += [(fact.value, value), (piece[2:], text)]
            else:
                parts.append((piece, text))
        return self.encode([part for part in parts if part[0]])

    def random_span(self) -> tuple[Snippet, Snippet]:
        """Random tokens, and the same again: the plainest thing there is to copy."""
        ids = self.rng.integers(len(SPECIAL_TOKENS), self.vocab_size, int(self.rng.integers(6, 33)))
        again = np.ones(len(ids), np.float32)
        again[0] = 0.0
        return (ids, np.zeros(len(ids), np.float32)), (ids, again)

    def filler(self) -> Filler:
        which = 0 if self.rng.random() < 0.65 else len(self.streams) - 1
        starts = self.line_starts[which]
        return Filler(self.streams[which], starts, int(self.rng.integers(0, len(starts) - 2)))

    # -- rows

    def recall_row(self, length: int) -> Snippet:
        """Real code into which facts and random spans are planted, and asked for further on."""
        events: list[tuple[float, Snippet]] = []
        style = self.pick(ASSIGNED) if self.rng.random() < 0.5 else None
        for _ in range(max(1, int(length / self.log_uniform(40, 400)))):
            at = self.rng.uniform(0, length - 48)
            again = at + self.log_uniform(16, length - at)
            if self.rng.random() < 0.15:
                first, second = self.random_span()
            else:
                fact = self.fact()
                define, use = self.pick(TOLD) if fact.told else style or self.pick(ASSIGNED)
                first = self.fill("\n" + define, fact, 0.0, 0.0)
                second = self.fill("\n" + use, fact, 0.3, VALUE_WEIGHT, 0.5)
            events += [(at, first), (again, second)]
            if self.rng.random() < 0.3:
                events.append((again + self.log_uniform(16, length), second))
        filler = self.filler()
        pieces: list[Snippet] = []
        size = 0
        for at, snippet in sorted(events, key=lambda event: event[0]):
            if at > size:
                pieces.append(filler.take(int(at) - size))
                size += len(pieces[-1][0])
            pieces.append(snippet)
            size += len(snippet[0])
        pieces.append(filler.take(max(1, length - size)))
        return join(pieces)

    def repeat_row(self, length: int) -> Snippet:
        """Random spans only, each of them shown twice or more."""
        pieces: list[Snippet] = []
        known: list[Snippet] = []
        size = 0
        while size < length:
            if known and self.rng.random() < 0.6:
                pieces.append(self.pick(known))
            else:
                first, second = self.random_span()
                known.append(second)
                pieces.append(first)
            size += len(pieces[-1][0])
        return join(pieces)

    def natural_row(self, length: int) -> Snippet:
        stream = self.streams[0 if self.rng.random() < 0.65 else len(self.streams) - 1]
        at = int(self.rng.integers(0, len(stream) - length))
        return stream[at : at + length], np.ones(length, np.float32)

    def chat(self, room: int) -> Snippet:
        """One conversation in the chat template's format, of about `room` tokens at most."""
        pieces: list[Snippet] = [self.encode([("<|endoftext|>", 0.0)])]
        if self.rng.random() < 0.3:
            pieces.append(self.encode([(f"<|system|>\n{self.pick(SYSTEM_PROMPTS)}<|end|>\n", 0.1)]))
        kind = self.rng.random()
        if kind < 0.1:
            for _ in range(int(self.rng.integers(1, 3))):
                question, answer = self.pick(SMALL_TALK)
                pieces.append(self.encode(turn(question, answer)))
        elif kind < 0.5:
            name, summary, code = self.pick(self.functions)
            asked = self.rng.random()
            if asked < 0.5:
                question = f"Write the function `{name}`: {summary}"
            elif asked < 0.8:
                question = f"Write a Python function `{name}`."
            else:
                question, code = f"What does `{name}` do?", summary
            pieces.append(self.encode(turn(question, code)))
        else:
            facts = [self.fact() for _ in range(int(self.rng.integers(1, 5)))]
            filler = self.filler()
            gap = self.log_uniform(8, max(16.0, room - 60.0 * len(facts) - 60.0)) / len(facts)
            pieces.append(self.encode([("<|user|>", 0.1)]))
            for fact in facts:
                define = self.pick(TOLD if fact.told else ASSIGNED)[0]
                pieces.append(self.fill("\n" + define, fact, 0.0, 0.0, 0.3))
                pieces.append(filler.take(int(gap)))
            for number in range(int(self.rng.integers(1, 3))):
                fact = self.pick(facts)
                question, answer = self.pick(TOLD_QUESTIONS if fact.told else QUESTIONS)
                opening = "\n" if number == 0 else "<|user|>\n"
                pieces.append(self.fill(opening + question, fact, 0.1, 0.0, 0.1))
                pieces.append(self.encode([("<|end|>\n<|assistant|>\n", 0.1)]))
                pieces.append(self.fill(answer, fact, 1.0, VALUE_WEIGHT))
                pieces.append(self.encode([("<|end|>", 1.0), ("\n", 0.1)]))
        return join(pieces)

    def chat_row(self, length: int) -> Snippet:
        pieces: list[Snippet] = []
        size = 0
        while size < length:
            pieces.append(self.chat(length - size))
            size += len(pieces[-1][0])
        return join(pieces)

    def positions(self, length: int, share: float) -> Ints:
        """Position ids; soon half of the rows jump ahead up to three times, within the whole window."""
        steps = np.ones(length, dtype=np.int64)
        steps[0] = 0
        if self.rng.random() < min(0.5, 3 * share):
            jumps = int(self.rng.integers(1, 4))
            for _ in range(jumps):
                steps[int(self.rng.integers(1, length))] += int(self.log_uniform(8, CONTEXT - length) / jumps)
        return np.cumsum(steps)

    def batch(self, rows: int, length: int, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs, targets, target weights and positions; the mix depends on the elapsed share of the run."""
        repeated = max(0.03, 0.12 - share)
        ids = np.zeros((rows, length + 1), np.int64)
        weights = np.zeros((rows, length + 1), np.float32)
        positions = np.zeros((rows, length), np.int64)
        for row in range(rows):
            kind = self.rng.random()
            if kind < repeated:
                make = self.repeat_row
            elif kind < repeated + 0.15:
                make = self.chat_row
            elif kind < repeated + 0.45:
                make = self.natural_row
            else:
                make = self.recall_row
            row_ids, row_weights = make(length + 1)
            ids[row], weights[row] = row_ids[: length + 1], row_weights[: length + 1]
            positions[row] = self.positions(length, share)
        return (
            torch.from_numpy(ids[:, :-1].copy()),
            torch.from_numpy(ids[:, 1:].copy()),
            torch.from_numpy(weights[:, 1:].copy()),
            torch.from_numpy(positions),
        )


def join(pieces: list[Snippet]) -> Snippet:
    return np.concatenate([ids for ids, _ in pieces]), np.concatenate([weights for _, weights in pieces])


def turn(question: str, answer: str) -> list[tuple[str, float]]:
    asked = f"<|user|>\n{question}<|end|>\n<|assistant|>\n"
    return [(asked, 0.2), (answer, 1.0), ("<|end|>", 1.0), ("\n", 0.1)]


def find_functions(texts: list[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Short documented functions of the library: name, first line of the docstring, source."""
    for path, text in texts:
        if path.startswith("test/") or "/test" in path:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
                code = ast.get_source_segment(text, node) or ""
                if 10 < len(summary) < 200 and len(code) < 1200:
                    yield node.name, summary, code


# ---------------------------------------------------------------------------------------------------------
# Network: Qwen3 with its Hugging Face parameter names, so that exporting it is a plain copy


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)
        self.q_norm = Norm(shape.head_dim, shape.rms_norm_eps)
        self.k_norm = Norm(shape.head_dim, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(rows, length, -1, self.shape.head_dim)

        value = heads(self.v_proj(x)).transpose(1, 2)
        query = rotate(self.q_norm(heads(self.q_proj(x))), cos, sin).to(value.dtype).transpose(1, 2)
        key = rotate(self.k_norm(heads(self.k_proj(x))), cos, sin).to(value.dtype).transpose(1, 2)
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        mixed = attend(query, key, value)
        return cast(Tensor, self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1)))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention.

    Short rows go block by block of queries, with only the keys that a block can see: compiled, this is about
    twice as fast on a CPU as the fused operator.  The norms of queries and keys bound the scores, so that
    no maximum has to be subtracted before the exponential; the clamp is a guard.
    """
    length, size, block = query.shape[2], query.shape[3], 64
    if length > 512 or length % block or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    query = query * size**-0.5
    blocks: list[Tensor] = []
    for start in range(0, length, block):
        end = start + block
        scores = query[:, :, start:end] @ key[:, :, :end].transpose(-1, -2)
        seen = torch.arange(start, end)[:, None] >= torch.arange(end)[None]
        powers = torch.where(seen, scores.float().clamp(max=60.0).exp(), 0.0)
        blocks.append((powers.to(value.dtype) @ value[:, :, :end]) / powers.sum(-1, keepdim=True))
    return torch.cat(blocks, dim=2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = Mlp(shape)
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)))


class Head(nn.Module):
    """The last norm and the loss of each target, with the embedding as output matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor, embedding: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(self.norm(x), embedding).float().flatten(0, 1)
        targets = targets.flatten()
        return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets


class Network(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.head = Head(shape)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                deep = "o_proj" in name or "down_proj" in name
                nn.init.normal_(weight, std=0.0 if deep else 0.02)
        self.wire_copying()

    @torch.no_grad()
    def wire_copying(self) -> None:
        """Start from a rough copying circuit ("induction heads") instead of waiting for one to form.

        Left alone it takes a network of this size more tokens than this budget has.  Of the residual stream,
        dimension 0 starts as a constant, 1 to 32 as a note of the token before, the rest as the token.  In
        layer 0 the heads of the first key group look one, two and three tokens back, and the first of them
        writes the note.  In layers 1 and 2 the heads of the first two groups look for a place whose note is
        like the present token, and put the token of that place forward.  Everything trains from there.
        """
        shape = self.shape
        size, half, group = (
            shape.head_dim,
            shape.head_dim // 2,
            shape.num_attention_heads // shape.num_key_value_heads,
        )
        rates = shape.rope_theta ** (-torch.arange(half) / half)
        token = slice(1 + size, shape.hidden_size)

        def mixing(rows: int, columns: int) -> Tensor:
            return cast(Tensor, torch.linalg.qr(torch.randn(columns, rows)).Q.T)

        self.embed_tokens.weight[:, : 1 + size] = 0.0
        self.embed_tokens.weight[:, 0] = 0.08
        note = mixing(size, shape.hidden_size - 1 - size)

        first = cast(Layer, self.layers[0]).self_attn
        power = torch.zeros(half)
        power[:5] = torch.tensor([0.40, 0.22, 0.16, 0.12, 0.10]).sqrt()
        first.k_proj.weight[:size] = 0.0
        first.k_proj.weight[:half, 0] = power
        for head in range(group):
            angles = rates * (head + 1)
            first.q_proj.weight[head * size : (head + 1) * size] = 0.0
            first.q_proj.weight[head * size : (head + 1) * size, 0] = torch.cat(
                (power * angles.cos(), -power * angles.sin())
            )
        first.v_proj.weight[:size] = 0.0
        first.v_proj.weight[:size, token] = note
        first.o_proj.weight[:, :size] = 0.0
        first.o_proj.weight[1 : 1 + size, :size] = 0.03 * torch.eye(size)
        for norm in (first.q_norm, first.k_norm):
            norm.weight[:5] = norm.weight[half : half + 5] = 2.2

        slow = torch.cat((torch.arange(9, half), torch.arange(half + 9, size)))  # hardly turned by distance
        for layer in self.layers[1:3]:
            later = cast(Layer, layer).self_attn
            for norm in (later.q_norm, later.k_norm):
                norm.weight[slow] = 1.6
            for key in range(2):
                rows = slice(key * size, (key + 1) * size)
                matching = mixing(len(slow), size)
                later.k_proj.weight[rows] = 0.0
                later.k_proj.weight[key * size + slow, 1 : 1 + size] = matching
                forward = mixing(size, shape.hidden_size - 1 - size)
                later.v_proj.weight[rows] = 0.0
                later.v_proj.weight[rows, token] = forward
                for head in range(key * group, (key + 1) * group):
                    columns = slice(head * size, (head + 1) * size)
                    later.q_proj.weight[columns] = 0.0
                    later.q_proj.weight[head * size + slow, token] = matching @ note
                    later.o_proj.weight[:, columns] = 0.0
                    later.o_proj.weight[token, columns] = 0.1 / group * forward.T

    def forward(self, ids: Tensor, targets: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each target, and whether it was the likeliest token."""
        half = self.shape.head_dim // 2
        rates = self.shape.rope_theta ** (-torch.arange(half, device=ids.device) / half)
        angles = positions[:, :, None, None].float() * rates
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        loss, hit = self.head(x, self.embed_tokens.weight, targets)
        return loss, hit

    def exported(self) -> dict[str, Tensor]:
        names = {name: "model." + name.removeprefix("head.") for name in self.state_dict()}
        return {
            names[name]: weight.detach().to("cpu", torch.bfloat16).contiguous()
            for name, weight in self.state_dict().items()
        }


# ---------------------------------------------------------------------------------------------------------
# Training

PHASES = [  # (until this share of the run, rows in a batch, tokens in a row)
    (0.30, 32, 256),
    (0.62, 16, 512),
    (0.80, 8, 1024),
    (0.93, 4, 2048),
    (1.00, 2, 4096),
]
MATRIX_RATE = 0.02
OTHER_RATE = 4e-3


class Muon:
    """Momentum whose update is made near-orthogonal by five Newton-Schulz steps, for hidden matrices."""

    def __init__(self, weights: list[nn.Parameter], momentum: float = 0.95, decay: float = 0.01) -> None:
        self.weights, self.momentum, self.decay = weights, momentum, decay
        self.moments = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for weight, moment in zip(self.weights, self.moments, strict=True):
            if weight.grad is None:
                continue
            moment.lerp_(weight.grad, 1 - self.momentum)
            update = weight.grad.lerp(moment, self.momentum).bfloat16()
            update /= update.norm() + 1e-7
            tall = update.shape[0] > update.shape[1]
            update = update.T if tall else update
            for _ in range(5):
                square = update @ update.T
                update = 3.4445 * update + (2.0315 * (square @ square) - 4.775 * square) @ update
            update = update.T if tall else update
            weight.mul_(1 - rate * self.decay)
            weight.add_(update.float(), alpha=-rate * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)
            weight.grad = None


def pace(share: float) -> float:
    """The learning rate's factor: a short warm-up, level, and from half of the run on down to nearly none."""
    return min(1.0, share / 0.01 + 0.02, 2 * (1 - share) + 0.01)


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    texts, _ = read_texts()
    shape = Shape()
    if options.tokenizer:
        tokenizer = Tokenizer.from_file(options.tokenizer)
    else:
        library = [text for path, text in texts if not path.startswith("test/")]
        tests = [text for path, text in texts if path.startswith("test/")]
        tokenizer = build_tokenizer(library + tests[::4], shape.vocab_size)
    write_assets(options.out, tokenizer, shape)
    rows = Rows(tokenizer, texts, options.seed)

    network = Network(shape).to(device)
    matrices = [weight for name, weight in network.named_parameters() if name.endswith("_proj.weight")]
    others = [weight for name, weight in network.named_parameters() if not name.endswith("_proj.weight")]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    done = {"wall": 0.0, "cpu": 0.0, "steps": 0.0, "tokens": 0.0}
    state_file = options.out / "training_state.pt"
    if options.resume:
        state = torch.load(state_file, map_location=device, weights_only=False)
        network.load_state_dict(state["network"])
        adam.load_state_dict(state["adam"])
        muon.moments = state["moments"]
        rows.rng.bit_generator.state = state["rng"]
        done = state["done"]
    if options.compile:
        for part in (*network.layers, network.head):
            part.compile(dynamic=False)

    def save() -> None:
        state = {"network": network.state_dict(), "adam": adam.state_dict(), "moments": muon.moments}
        torch.save({**state, "rng": rows.rng.bit_generator.state, "done": done}, state_file)
        save_file(network.exported(), options.out / "model.safetensors", metadata={"format": "pt"})

    budget = 60.0 * options.minutes
    saved = logged = time.monotonic()
    means: dict[str, float] = {}
    length = 0
    bar = tqdm(total=round(budget), unit="s", initial=0, smoothing=0)
    wall, cpu = time.monotonic(), time.process_time()
    while True:
        now, now_cpu = time.monotonic(), time.process_time()
        done["wall"] += now - wall
        done["cpu"] += now_cpu - cpu
        wall, cpu = now, now_cpu
        spent = done["wall"] if options.clock == "wall" else done["cpu"] / torch.get_num_threads()
        share = spent / budget
        bar.n = min(round(spent), bar.total)
        if now - saved > 120 or share >= 1:
            saved = now
            save()
        if means and (now - logged > 15 or share >= 1):
            logged = now
            record = {**{key: round(value, 4) for key, value in {**done, **means}.items()}, "length": length}
            with open(options.out / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
            bar.set_postfix_str(", ".join(f"{key} {value:.3f}" for key, value in means.items()))
        if share >= 1:
            break
        count, length = next((rows, length) for until, rows, length in PHASES if share < until)
        ids, targets, weights, positions = (part.to(device) for part in rows.batch(count, length, share))
        with torch.autocast(device.type, torch.bfloat16):
            losses, hits = network(ids, targets, positions)
        weights = weights.flatten()
        ((losses * weights).sum() / weights.sum()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = OTHER_RATE * pace(share)
        adam.step()
        adam.zero_grad()
        muon.step(MATRIX_RATE * pace(share))
        done["steps"] += 1
        done["tokens"] += ids.numel()
        plain, copied = weights == 1.0, weights == VALUE_WEIGHT
        fresh = {"loss": losses[plain].mean().item()}
        if copied.any():
            fresh |= {"copy": losses[copied].mean().item(), "recall": hits[copied].float().mean().item()}
        for key, value in fresh.items():
            means[key] = means.get(key, value) * 0.95 + value * 0.05
    bar.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded default model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the log")
    parser.add_argument("--minutes", type=float, default=40.0, help="time budget (default: %(default)s)")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="what the budget counts: time, or processor time over threads, for a machine with other work",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch decides)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", help="an existing tokenizer.json to use instead of building one")
    parser.add_argument("--resume", action="store_true", help="go on from the state saved in --out")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do not use torch.compile")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
