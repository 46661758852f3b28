"""The real text: the Python standard library's own source, which every machine with Python has, and its tokenizer.

The text differs with the Python version, and some distributions leave out `test`.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
SPECIAL_TOKENS = ["<|endoftext|>", "<|end|>", *ROLES, "<|pad|>"]  # their ids are 0, 1, 2, ...
# Runs of letters, single digits (so that any number can be copied digit by digit), runs of other signs, and
# white space, where a line break and the indentation after it make one token.
PRE_TOKENS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

INSTALLED = {"site-packages", "dist-packages", "__pycache__"}
UNUSUAL = {"encodings", "pydoc_data", "data", "lib2to3"}  # tables, escaped text, test data, gone since Python 3.13
SHORTEST = 200  # characters; below are mostly empty __init__.py


class Source(NamedTuple):
    """One file of the standard library."""

    path: str  # relative to the library, with forward slashes
    text: str

    @property
    def is_test(self) -> bool:
        return self.path.startswith("test/")


class Function(NamedTuple):
    """A short documented function of the library."""

    name: str
    summary: str  # the first paragraph of its docstring
    code: str


def read_sources() -> tuple[list[Source], list[Source]]:
    """The standard library: a training part, and about 2 % of the files held out, chosen by a hash of the path.

    Left out: installed packages, unusual text, very short files, and what does not decode or parse.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    training: list[Source] = []
    held_out: list[Source] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - INSTALLED - UNUSUAL)
        for name in sorted(files):
            if not name.endswith(".py"):
                continue
            path = Path(folder, name)
            try:
                text = path.read_text(encoding="utf-8")
                ast.parse(text)
            except (OSError, ValueError, SyntaxError):
                continue
            if len(text) < SHORTEST:
                continue
            source = Source(path.relative_to(root).as_posix(), text)
            chosen = int(hashlib.sha256(source.path.encode()).hexdigest(), 16) % 50 == 0
            (held_out if chosen else training).append(source)
    return training, held_out


def find_functions(sources: list[Source]) -> Iterator[Function]:
    """The public module-level functions outside tests whose docstring and body are short."""
    for source in sources:
        if source.is_test or "/test" in source.path:
            continue
        for node in ast.parse(source.text).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
                code = ast.get_source_segment(source.text, node) or ""
                if 10 < len(summary) < 200 and len(code) < 1200:
                    yield Function(node.name, summary, code)


def train_tokenizer(sources: list[Source], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of the library and every fourth of its tests, which would outweigh it."""
    library = [source.text for source in sources if not source.is_test]
    tests = [source.text for source in sources if source.is_test]
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
    tokenizer.train_from_iterator(library + tests[::4], trainer)
    return tokenizer
