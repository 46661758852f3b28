"""Grammars: whatever the logits are, the text matches; and a request may change its rank between any two tokens."""

from __future__ import annotations

import json
import re
import struct

import pytest
import torch
from llguidance import LLMatcher

from server.arguments import DEFAULT_MODEL
from server.tokenizer import Tokenizer
from sp_backend.commands import Sampling
from sp_backend.grammars import Grammars
from sp_backend.sampling import sample

VOCAB, EOS = 4032, (1, 2)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOKENIZER = Tokenizer(DEFAULT_MODEL)


def grammars() -> Grammars:
    return Grammars(str(DEFAULT_MODEL), VOCAB, EOS)


def sampling(grammar: str, generated: list[int], **fields: object) -> Sampling:
    context = struct.pack(f"<{len(generated)}i", *generated)
    return Sampling(grammar=grammar, context=context, **fields)  # type: ignore[arg-type]


def generate(grammar: str, seed: int, ranks: list[Grammars], most: int = 400) -> list[int]:
    """Tokens up to an end-of-sequence token, from random logits, each drawn on the next of the ranks."""
    generator, tokens = torch.Generator().manual_seed(seed), list[int]()
    while len(tokens) < most and (not tokens or tokens[-1] not in EOS):
        logits = torch.randn(1, VOCAB, generator=generator) * 3
        logits[0, EOS[0]] += 12  # so that it ends where it may
        wanted = sampling(grammar, tokens, seed=seed)
        allowed = ranks[len(tokens) % len(ranks)].allowed(7, wanted)
        tokens.append(sample(logits, [wanted], [len(tokens)], [allowed])[0].token)
    return tokens


@pytest.mark.parametrize("seed", range(8))
def test_random_logits_give_text_that_matches(seed: int) -> None:
    schema = LLMatcher.grammar_from_json_schema(PERSON, defaults={"whitespace_pattern": r"[ \n]{0,3}"})
    person = json.loads(TOKENIZER.decode(generate(schema, seed, [grammars()])))
    assert set(person) == {"name", "age"} and person["age"] <= 150 and len(person["name"]) <= 12
    tokens = generate(LLMatcher.grammar_from_regex(r"[a-c]{3}-\d{2,4}"), seed, [grammars()])
    assert re.fullmatch(r"[a-c]{3}-\d{2,4}", TOKENIZER.decode(tokens))


@pytest.mark.parametrize("seed", range(3))
def test_ranks_take_turns(seed: int) -> None:
    """A rank that has not drawn for a while, or never, catches up from the step's context."""
    grammar = LLMatcher.grammar_from_json_schema(PERSON, defaults={"whitespace_pattern": ""})
    assert generate(grammar, seed, [grammars() for _ in range(3)]) == generate(grammar, seed, [grammars()])


def test_the_prompt_is_no_part_of_it() -> None:
    prompt, generated = [5, 6], [*TOKENIZER.encode("a"), *TOKENIZER.encode("b")]
    wanted = Sampling(
        grammar=LLMatcher.grammar_from_regex("abc"),
        repetition_penalty=1.5,
        context=struct.pack("<4i", *prompt, *generated),
        num_prompt=2,
    )
    allowed = grammars().allowed(0, wanted)
    assert allowed is not None and allowed.nonzero().flatten().tolist() == TOKENIZER.encode("c")


def test_a_forgotten_request_may_come_back() -> None:
    tokens, many = TOKENIZER.encode("ab"), grammars()
    grammar = LLMatcher.grammar_from_regex("abc")
    before = many.allowed(0, sampling(grammar, tokens))
    many.forget([0, 99])
    after = many.allowed(0, sampling(grammar, tokens))
    assert before is not None and after is not None and torch.equal(before, after)
    many.forget([0])
    other = many.allowed(0, sampling(LLMatcher.grammar_from_regex("x"), []))  # its id means another request now
    assert other is not None and other.nonzero().flatten().tolist() == TOKENIZER.encode("x")


def test_after_the_end_only_the_end_may_follow() -> None:
    """Also in the step that runs before the end is known, and where a stop token is banned or ignored."""
    grammar, tokens, one = LLMatcher.grammar_from_regex("ab"), TOKENIZER.encode("ab"), grammars()
    for generated in (tokens, [*tokens, EOS[0]], [*tokens, EOS[0], EOS[1]]):
        allowed = one.allowed(0, sampling(grammar, generated))
        assert allowed is not None and sorted(allowed.nonzero().flatten().tolist()) == sorted(EOS)
        for temperature in (0.0, 1.0):
            banned = sampling(grammar, generated, banned=list(EOS), temperature=temperature)
            assert sample(torch.randn(1, VOCAB), [banned], [0], [allowed])[0].token in EOS


def test_without_a_grammar_everything_is_allowed() -> None:
    assert grammars().allowed(0, Sampling()) is None


def test_logprobs_are_those_of_the_unmodified_distribution() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    wanted = sampling(LLMatcher.grammar_from_regex("x"), [], temperature=0, logprobs=0)
    drawn = sample(logits, [wanted], [0], [grammars().allowed(0, wanted)])[0]
    assert [drawn.token] == TOKENIZER.encode("x")
    assert drawn.logprob == pytest.approx(float(logits[0].log_softmax(-1)[drawn.token]))
