"""Training rows: real code, recall data, repeated spans and chats, each token with its weight in the loss.

Copying comes from made-up recall data: definitions, facts and random spans are planted in real code and asked
for later.  The loss weighs the recalled tokens up and ignores the first appearance of a random value, which
nothing could predict.

Rows are short, but their positions are not: in many rows the position ids jump ahead at random places, by up to
the whole window, so that far rotary angles are trained too (as in PoSE, Zhu et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from server.default_model.corpus import SPECIAL_TOKENS, Source, find_functions
from server.default_model.facts import (
    ASSIGNED,
    QUESTIONS,
    TOLD,
    TOLD_QUESTIONS,
    Fact,
    FactMaker,
    log_uniform,
    pick,
)

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

VALUE_WEIGHT = 3.0  # of a recalled token in the loss, against 1 for ordinary text
LIBRARY_SHARE = 0.65  # of real code; the rest is the library's tests
SMALLEST_STREAM = 200_000  # tokens

SYSTEM_PROMPTS = ["You are a helpful assistant.", "You write Python.", "Answer briefly.", "You are a coder."]
SMALL_TALK = [
    ("Hello", "Hello! I am a small model that writes Python."),
    ("Hi", "Hello! I am a small model that writes Python."),
    ("Hello!", "Hello! I am a small model that writes Python."),
    ("Who are you?", "I am the embedded default model, trained on the Python standard library."),
    ("What can you do?", "I can write Python and copy names and numbers from my context."),
    ("Thanks", "You are welcome."),
]


class Snippet(NamedTuple):
    """A piece of a row."""

    ids: Ints  # [tokens]
    weights: Floats  # [tokens], of each token as a target in the loss


class Batch(NamedTuple):
    inputs: Tensor  # [rows, tokens] int64
    targets: Tensor  # [rows, tokens] int64: the token after each input
    weights: Tensor  # [rows, tokens] fp32: of each target in the loss
    positions: Tensor  # [rows, tokens] int64


@dataclass(frozen=True, slots=True)
class Stream:
    """Files of real code, one after another."""

    ids: Ints  # [tokens]
    line_starts: Ints  # indices into ids


class Filler:
    """A walk through real code from a random line on."""

    def __init__(self, stream: Stream, line: int) -> None:
        self.stream, self.line = stream, line

    def take(self, length: int) -> Snippet:
        """At least `length` tokens, up to the end of a line."""
        starts = self.stream.line_starts
        until = int(np.searchsorted(starts, starts[self.line] + length))
        if until >= len(starts):  # the end of the text: go on from its beginning
            self.line = 0
            until = int(np.searchsorted(starts, starts[0] + length))
        ids = self.stream.ids[starts[self.line] : starts[until]]
        self.line = until
        return Snippet(ids, np.ones(len(ids), np.float32))


class Rows:
    """An endless source of batches; the same seed and sources give the same ones in the same order."""

    def __init__(self, tokenizer: Tokenizer, sources: list[Source], seed: int, max_position: int) -> None:
        self.tokenizer = tokenizer
        self.max_position = max_position
        self.rng = np.random.default_rng(seed)
        self.vocab_size = tokenizer.get_vocab_size()
        shuffled = [sources[i] for i in self.rng.permutation(len(sources))]
        library = read_stream(tokenizer, [source.text for source in shuffled if not source.is_test])
        tests = read_stream(tokenizer, [source.text for source in shuffled if source.is_test])
        # A Python without its tests still has the library, and a tiny corpus at least one stream.
        self.streams = [stream for stream in (library, tests) if len(stream.ids) > SMALLEST_STREAM] or [library]
        self.functions = list(find_functions(sources))
        words = {word for name, _, _ in self.functions for word in name.split("_") if 2 < len(word) < 10}
        self.facts = FactMaker(self.rng, sorted(word for word in words if word.isalpha() and word.islower()))

    def batch(self, rows: int, length: int, share: float) -> Batch:
        """`rows` rows of `length` tokens; the mix of kinds depends on the elapsed share of the run, 0 to 1."""
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
            snippet = make(length + 1)
            ids[row], weights[row] = snippet.ids[: length + 1], snippet.weights[: length + 1]
            positions[row] = self.positions(length, share)
        return Batch(
            torch.from_numpy(ids[:, :-1].copy()),
            torch.from_numpy(ids[:, 1:].copy()),
            torch.from_numpy(weights[:, 1:].copy()),
            torch.from_numpy(positions),
        )

    def positions(self, length: int, share: float) -> Ints:
        """Position ids; soon half of the rows jump ahead up to three times, within the whole window."""
        steps = np.ones(length, dtype=np.int64)
        steps[0] = 0
        if self.rng.random() < min(0.5, 3 * share):
            jumps = int(self.rng.integers(1, 4))
            for _ in range(jumps):
                at = int(self.rng.integers(1, length))
                steps[at] += int(log_uniform(self.rng, 8, self.max_position - length) / jumps)
        return np.cumsum(steps)

    # -- kinds of rows, each of at least `length` tokens

    def natural_row(self, length: int) -> Snippet:
        """Real code as it is."""
        ids = self.stream().ids
        at = int(self.rng.integers(0, len(ids) - length))
        return Snippet(ids[at : at + length], np.ones(length, np.float32))

    def recall_row(self, length: int) -> Snippet:
        """Real code into which facts and random spans are planted, and asked for further on."""
        events: list[tuple[float, Snippet]] = []
        style = pick(self.rng, ASSIGNED) if self.rng.random() < 0.5 else None
        for _ in range(max(1, int(length / log_uniform(self.rng, 40, 400)))):
            at = self.rng.uniform(0, length - 48)
            again = at + log_uniform(self.rng, 16, length - at)
            if self.rng.random() < 0.15:
                first, second = self.random_span()
            else:
                fact = self.facts.fact()
                define, use = pick(self.rng, TOLD) if fact.told else style or pick(self.rng, ASSIGNED)
                first = self.fill("\n" + define, fact, name=0.0, value=0.0)
                second = self.fill("\n" + use, fact, name=0.3, value=VALUE_WEIGHT, text=0.5)
            events += [(at, first), (again, second)]
            if self.rng.random() < 0.3:
                events.append((again + log_uniform(self.rng, 16, length), second))
        filler = self.filler()
        pieces: list[Snippet] = []
        size = 0
        for at, snippet in sorted(events, key=lambda event: event[0]):
            if at > size:
                pieces.append(filler.take(int(at) - size))
                size += len(pieces[-1].ids)
            pieces.append(snippet)
            size += len(snippet.ids)
        pieces.append(filler.take(max(1, length - size)))
        return join(pieces)

    def repeat_row(self, length: int) -> Snippet:
        """Random spans only, many of them shown again."""
        pieces: list[Snippet] = []
        known: list[Snippet] = []
        size = 0
        while size < length:
            if known and self.rng.random() < 0.6:
                pieces.append(pick(self.rng, known))
            else:
                first, second = self.random_span()
                known.append(second)
                pieces.append(first)
            size += len(pieces[-1].ids)
        return join(pieces)

    def chat_row(self, length: int) -> Snippet:
        """Conversations in the chat template's format."""
        pieces: list[Snippet] = []
        size = 0
        while size < length:
            pieces.append(self.chat(length - size))
            size += len(pieces[-1].ids)
        return join(pieces)

    # -- what rows are made of

    def chat(self, room: int) -> Snippet:
        """One conversation, of about `room` tokens at most: small talk, a library function, or facts to recall."""
        pieces = [self.encode([("<|endoftext|>", 0.0)])]
        if self.rng.random() < 0.3:
            pieces.append(self.encode([(f"<|system|>\n{pick(self.rng, SYSTEM_PROMPTS)}<|end|>\n", 0.1)]))
        kind = self.rng.random()
        if kind < 0.1:
            for _ in range(int(self.rng.integers(1, 3))):
                pieces.append(self.turn(*pick(self.rng, SMALL_TALK)))
        elif kind < 0.5:
            name, summary, code = pick(self.rng, self.functions)
            asked = self.rng.random()
            if asked < 0.5:
                pieces.append(self.turn(f"Write the function `{name}`: {summary}", code))
            elif asked < 0.8:
                pieces.append(self.turn(f"Write a Python function `{name}`.", code))
            else:
                pieces.append(self.turn(f"What does `{name}` do?", summary))
        else:
            pieces += self.recall_chat(room)
        return join(pieces)

    def recall_chat(self, room: int) -> list[Snippet]:
        """A user's message of facts and real code, then one or two questions about the facts."""
        facts = [self.facts.fact() for _ in range(int(self.rng.integers(1, 5)))]
        filler = self.filler()
        gap = log_uniform(self.rng, 8, max(16.0, room - 60.0 * len(facts) - 60.0)) / len(facts)
        pieces = [self.encode([("<|user|>", 0.1)])]
        for fact in facts:
            define, _ = pick(self.rng, TOLD if fact.told else ASSIGNED)
            pieces.append(self.fill("\n" + define, fact, name=0.0, value=0.0, text=0.3))
            pieces.append(filler.take(int(gap)))
        for number in range(int(self.rng.integers(1, 3))):
            fact = pick(self.rng, facts)
            question, answer = pick(self.rng, TOLD_QUESTIONS if fact.told else QUESTIONS)
            opening = "\n" if number == 0 else "<|user|>\n"
            pieces.append(self.fill(opening + question, fact, name=0.1, value=0.0, text=0.1))
            pieces.append(self.encode([("<|end|>\n<|assistant|>\n", 0.1)]))
            pieces.append(self.fill(answer, fact, name=1.0, value=VALUE_WEIGHT))
            pieces.append(self.encode([("<|end|>", 1.0), ("\n", 0.1)]))
        return pieces

    def turn(self, question: str, answer: str) -> Snippet:
        asked = f"<|user|>\n{question}<|end|>\n<|assistant|>\n"
        return self.encode([(asked, 0.2), (answer, 1.0), ("<|end|>", 1.0), ("\n", 0.1)])

    def fill(self, template: str, fact: Fact, *, name: float, value: float, text: float = 1.0) -> Snippet:
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

    def encode(self, parts: list[tuple[str, float]]) -> Snippet:
        """Encode the joined text; each token gets the weight of the part in which it ends."""
        encoding = self.tokenizer.encode("".join(text for text, _ in parts))
        weights = np.concatenate([np.full(len(text), weight, np.float32) for text, weight in parts])
        last = np.array([end - 1 for _, end in encoding.offsets], dtype=np.int64)
        return Snippet(np.array(encoding.ids, dtype=np.int64), weights[last])

    def random_span(self) -> tuple[Snippet, Snippet]:
        """Random tokens, and the same again: the plainest thing there is to copy."""
        ids = self.rng.integers(len(SPECIAL_TOKENS), self.vocab_size, int(self.rng.integers(6, 33)))
        again = np.ones(len(ids), np.float32)
        again[0] = 0.0  # nothing tells that the span begins again
        return Snippet(ids, np.zeros(len(ids), np.float32)), Snippet(ids, again)

    def stream(self) -> Stream:
        return self.streams[0 if self.rng.random() < LIBRARY_SHARE else -1]

    def filler(self) -> Filler:
        stream = self.stream()
        return Filler(stream, int(self.rng.integers(0, len(stream.line_starts) - 2)))


def read_stream(tokenizer: Tokenizer, texts: list[str]) -> Stream:
    vocab = tokenizer.get_vocab()
    breaks = np.zeros(len(vocab), dtype=bool)
    breaks[[index for token, index in vocab.items() if token.startswith("Ċ")]] = True  # byte-level "\n"
    files = [np.array([vocab["<|endoftext|>"], *item.ids], dtype=np.int64) for item in tokenizer.encode_batch(texts)]
    ids = np.concatenate([np.zeros(0, np.int64), *files])
    return Stream(ids, np.flatnonzero(breaks[ids]))


def join(pieces: list[Snippet]) -> Snippet:
    return Snippet(np.concatenate([piece.ids for piece in pieces]), np.concatenate([piece.weights for piece in pieces]))
