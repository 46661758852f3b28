"""Made-up facts to recall: a random name with a random value, and the phrases that state it and ask for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")

# Pairs of (what states a fact, what asks for it): {n} is the name, {v} the value, {q} the value as Python writes it.
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


@dataclass(frozen=True, slots=True)
class Fact:
    """A random name and its random value."""

    name: str
    value: str
    quoted: str  # the value as Python source
    told: bool  # the name is words of English rather than an identifier


class FactMaker:
    """Draws names and values; `words` are real words to build them from."""

    def __init__(self, rng: np.random.Generator, words: Sequence[str]) -> None:
        self.rng, self.words = rng, words

    def word(self) -> str:
        kind = self.rng.random()
        if kind < 0.5:
            return "".join(pick(self.rng, SYLLABLES) for _ in range(int(self.rng.integers(2, 5))))
        if kind < 0.8:
            return pick(self.rng, self.words)
        return "".join(chr(97 + int(i)) for i in self.rng.integers(0, 26, int(self.rng.integers(3, 10))))

    def number(self) -> str:
        digits = int(self.rng.integers(2, 9))
        return str(int(self.rng.integers(10 ** (digits - 1), 10**digits)))

    def identifier(self) -> str:
        words = [self.word() for _ in range(int(self.rng.integers(1, 4)))]
        kind = self.rng.random()
        if kind < 0.4:
            return "_".join(words)
        if kind < 0.75:
            return "_".join(words).upper()
        if kind < 0.9:
            return "".join(word.capitalize() for word in words)
        return f"{words[0]}_{self.number()[:3]}"

    def noun_phrase(self) -> str:
        words = [pick(self.rng, ADJECTIVES), pick(self.rng, NOUNS)]
        if self.rng.random() < 0.4:
            words += ["of", "the", self.word()]
        return " ".join(words)

    def fact(self) -> Fact:
        told = bool(self.rng.random() < 0.3)
        name = self.noun_phrase() if told else self.identifier()
        kind = self.rng.random()
        if kind < 0.4:
            value = self.number()
            quoted = value if self.rng.random() < 0.8 else f'"{value}"'
            return Fact(name, value, quoted, told)
        if kind < 0.6:
            value = self.word()
        elif kind < 0.75:
            value = self.identifier()
        elif kind < 0.85:
            value = f"{self.word()}_{self.number()}"
        elif kind < 0.92:
            value = " ".join(self.word() for _ in range(int(self.rng.integers(2, 5))))
        elif kind < 0.96:
            value = self.word().capitalize()
        else:
            value = "".join("0123456789abcdef"[int(i)] for i in self.rng.integers(0, 16, 12))
        return Fact(name, value, pick(self.rng, [f'"{value}"', f"'{value}'"]), told)


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number from `low` to `high` (never below `low`), as often in each doubling."""
    return math.exp(rng.uniform(math.log(low), math.log(max(low, high))))
