"""Measure the embedded default model: held-out loss, and how far back it still recalls a name or a number.

The text is the part of the standard library that `corpus.py` holds out.  Every try plants a random name or
number that the model cannot know, puts held-out code after it, asks for it and compares the greedy answer.
Prints a table and writes `recall.json`.

    code   KEY = "value"  ...  assert KEY == "
    prose  # The secret number is 12345.  ...  # The secret number is
    chat   the code as a user's message with the question "What is KEY?" at its end

A distance is the least number of tokens between the planted line and the question.  Where several facts are
planted side by side, each one is asked for; their keys end alike, so that picking the right one is harder.

    python -m server.default_model.evaluate --threads 2
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from server.default_model.corpus import read_sources

TESTS = [  # (distance, tries, facts planted side by side)
    (64, 50, 1),
    (256, 50, 1),
    (256, 50, 5),
    (1000, 50, 1),
    (1000, 50, 5),
    (2000, 20, 1),
    (4000, 10, 1),
    (8000, 10, 1),
    (16000, 10, 1),
    (32000, 10, 1),
    (64000, 10, 1),
    (128000, 10, 1),
]
KINDS = [(form, value) for form in ("code", "prose", "chat") for value in ("name", "number")]
PROMPTS = [
    "import os\n\n\ndef read_file(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "def fibonacci(n):\n",
]
CHATS = ["Hello", "Write a Python function `indent`.", "PORT_LIMIT = 48213\n\nWhat is PORT_LIMIT?"]


class Subject:
    """The model under test, with a prefix cache so that several questions share one text."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model.train(False)
        self.ends = set(self.model.generation_config.eos_token_id)

    def encode(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer.encode(text, add_special_tokens=False))

    def read(self, ids: list[int], cache: DynamicCache, chunk: int = 2048) -> Tensor:
        """Run ids on top of the cache; the logits of the last one."""
        for start in range(0, len(ids), chunk):
            piece = torch.tensor([ids[start : start + chunk]])
            output = self.model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cast(Tensor, output.logits[0, -1])

    def answer(self, prompt: list[int], cache: DynamicCache, limit: int) -> str:
        """The greedy continuation; the cache is left as it was."""
        length = cache.get_seq_length()
        logits = self.read(prompt, cache)
        answer: list[int] = []
        while True:
            token = int(logits.argmax())
            if token in self.ends or len(answer) == limit:
                break
            answer.append(token)
            logits = self.read([token], cache)
        cache.crop(length - cache.get_seq_length())
        return cast(str, self.tokenizer.decode(answer))


def held_out_loss(subject: Subject, ids: list[int], length: int = 1024) -> float:
    """The mean loss per token, each one with 0 to 1,023 tokens of text before it."""
    total, count = 0.0, 0
    for start in tqdm(range(0, len(ids) - length, length), desc="held-out loss"):
        piece = torch.tensor([ids[start : start + length]])
        logits = subject.model(input_ids=piece, use_cache=False).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, piece[0, 1:], reduction="sum"))
        count += length - 1
    return total / count


def random_word(rng: random.Random) -> str:
    return "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(3, 4)))


def fact(rng: random.Random, form: str, kind: str) -> tuple[str, str, str]:
    """The planted line, the question, and the value to answer."""
    value = random_word(rng) if kind == "name" else str(rng.randrange(10**4, 10**6))
    quote = '"' if kind == "name" else ""
    if form == "prose":
        key = f"secret {kind} of the {random_word(rng)}"
        return f"\n# The {key} is {value}.", f"\n# The {key} is", value
    key = f"{random_word(rng)}_{kind}".upper()
    planted = f"\n{key} = {quote}{value}{quote}"
    if form == "code":
        return planted, f"\nassert {key} == {quote}" if quote else f"\nassert {key} ==", value
    return planted, f"\nWhat is {key}?<|end|>\n<|assistant|>\n", value


@dataclass(frozen=True, slots=True)
class Trial:
    """What to plant, and how far from its question."""

    form: str  # code, prose or chat
    kind: str  # of value: name or number
    distance: int  # tokens, at least
    tries: int
    together: int  # facts planted side by side
    seed: int


def recall(subject: Subject, text: list[int], line_starts: list[int], trial: Trial) -> int:
    """How many of the tries give back the planted value."""
    chat = trial.form == "chat"
    rng = random.Random(f"{trial.form} {trial.kind} {trial.distance} {trial.seed}")

    def line_after(place: int) -> int:
        return line_starts[bisect.bisect_left(line_starts, place)]

    places = [start for start in line_starts if start + trial.distance + 1000 < len(text)]
    right = 0
    for _ in range(trial.tries // trial.together):
        facts = [fact(rng, trial.form, trial.kind) for _ in range(trial.together)]
        at = rng.choice(places)
        middle = line_after(at + 32)
        end = line_after(middle + trial.distance)
        opening = subject.encode("<|endoftext|><|user|>" if chat else "<|endoftext|>") + text[at:middle]
        planted = [token for line, _, _ in facts for token in subject.encode(line)]
        cache = DynamicCache(config=subject.model.config)
        subject.read(opening + planted + text[middle:end], cache)
        for _, question, value in facts:
            limit = 32 if chat else len(subject.encode(value)) + 2
            answer = subject.answer(subject.encode(question), cache, limit)
            found = rf"(?<!\w){value}(?!\w)" if chat else rf"^\s*{value}(?!\w)"
            right += re.search(found, answer) is not None
    return right


def show_samples(subject: Subject) -> list[dict[str, str]]:
    """Greedy continuations of a few prompts, printed for a person to read."""
    samples = []
    for prompt in PROMPTS + [f"<|user|>\n{text}<|end|>\n<|assistant|>\n" for text in CHATS]:
        cache = DynamicCache(config=subject.model.config)
        answer = subject.answer(subject.encode("<|endoftext|>" + prompt), cache, 96)
        samples.append({"prompt": prompt, "answer": answer})
        print("-" * 60 + f"\n{prompt}\x1b[1m{answer}\x1b[0m")
    return samples


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the embedded default model.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, help="where to write (default: recall.json in --model)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch decides)")
    parser.add_argument("--longest", type=int, default=16000, help="longest distance (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    out = options.out or options.model / "recall.json"
    started = time.monotonic()
    subject = Subject(options.model, options.dtype)
    _, held_out = read_sources()
    source = "".join(text for _, text in held_out)
    ids = subject.encode(source)
    starts = [index for index, token in enumerate(ids) if subject.tokenizer.decode([token])[:1] == "\n"]
    loss = held_out_loss(subject, ids)
    report: dict[str, Any] = {
        "held_out": {
            "files": len(held_out),
            "tokens": len(ids),
            "loss": round(loss, 4),
            "perplexity": round(math.exp(loss), 3),
            "bits_per_byte": round(loss * len(ids) / math.log(2) / len(source.encode()), 4),
        },
        "dtype": options.dtype,
        "seed": options.seed,
        "recall": [],
    }

    def save() -> None:
        report["minutes"] = round((time.monotonic() - started) / 60, 2)
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    print(json.dumps(report["held_out"]))
    report["samples"] = show_samples(subject)
    save()
    print("distance | facts | " + " | ".join(f"{form} {kind}" for form, kind in KINDS))
    for distance, tries, together in TESTS:
        if distance > options.longest:
            continue
        row: dict[str, Any] = {"distance": distance, "facts": together, "tries": tries}
        for form, kind in tqdm(KINDS, desc=f"recall at {distance}", leave=False):
            trial = Trial(form, kind, distance, tries, together, options.seed)
            row[f"{form} {kind}"] = recall(subject, ids, starts, trial)
        report["recall"].append(row)
        save()
        counts = " | ".join(f"{row[f'{form} {kind}']}/{tries}" for form, kind in KINDS)
        print(f"{distance} | {together} | {counts}", flush=True)


if __name__ == "__main__":
    main()
