"""Text to ids and back: whole characters, stop strings that never show, log-probabilities that match the text."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from scheduler.request import FinishReason, GeneratedToken, Output
from server.arguments import DEFAULT_MODEL
from server.chat_template import ChatTemplate
from server.choice import Choice, Delta, TextOptions
from server.errors import ApiError
from server.stopping import StopStrings
from server.tokenizer import Detokenizer, Tokenizer

TOKENIZER = Tokenizer(DEFAULT_MODEL)
TEXTS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40)


def sentencepiece_like(folder: Path) -> Tokenizer:
    """As Llama 2: words carry their leading space, unknown characters fall back to bytes."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581hello",
        "\u2581world",
        "lo",
        "\u2581",
    ]
    model = models.BPE(
        vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True, unk_token="<unk>"
    )
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@given(TEXTS, TEXTS)
@settings(max_examples=150, deadline=None)
def test_streamed_text_is_the_whole_text(prompt: str, text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER, TOKENIZER.encode(prompt), skip_special_tokens=False)
    pieces = [detokenizer.add(token) for token in TOKENIZER.encode(text)]
    assert "".join(pieces) + detokenizer.finish() == text


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_give_text_at_once_or_later(seed: int) -> None:
    """Untrained models write parts of characters: nothing may raise or be held for ever."""
    generator = random.Random(seed)
    ids = [generator.randrange(TOKENIZER.vocab_size) for _ in range(200)]
    detokenizer = Detokenizer(TOKENIZER, TOKENIZER.encode("x = 1"), skip_special_tokens=True)
    text = "".join(map(detokenizer.add, ids)) + detokenizer.finish()
    assert text.replace("\ufffd", "") == TOKENIZER.decode(ids).replace("\ufffd", "")


def test_broken_characters_are_not_held_for_ever() -> None:
    (first, *_) = TOKENIZER.encode("\U0001f600")
    detokenizer = Detokenizer(TOKENIZER, [], skip_special_tokens=True)
    assert "".join(detokenizer.add(first) for _ in range(100)).count("\ufffd") >= 80


def test_a_prompt_that_ends_inside_a_character() -> None:
    """Its text must not come out as if it had been generated."""
    first, *rest = TOKENIZER.encode("\U0001f600")
    detokenizer = Detokenizer(TOKENIZER, [*TOKENIZER.encode("secret = 5 "), first], skip_special_tokens=True)
    text = "".join(map(detokenizer.add, [*rest, *TOKENIZER.encode(" ok")])) + detokenizer.finish()
    assert text.replace("\ufffd", "") == " ok"


def test_leading_spaces_and_byte_fallback(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(tmp_path)
    hello, world, space = (tokenizer.id_of(name) for name in ("\u2581hello", "\u2581world", "\u2581"))
    assert hello is not None and world is not None and space is not None
    detokenizer = Detokenizer(tokenizer, [hello], skip_special_tokens=True)
    euro = [tokenizer.id_of(f"<0x{byte:02X}>") or 0 for byte in "\u20ac".encode()]
    assert [detokenizer.add(token) for token in [world, space, *euro, world]] == [
        " world",
        " ",
        "",
        "",
        "\u20ac",
        " world",
    ]
    assert tokenizer.token_bytes(euro[0]) == b"\xe2"


@pytest.mark.parametrize("seed", range(10))
def test_words_between_random_bytes_are_not_lost(tmp_path: Path, seed: int) -> None:
    tokenizer = sentencepiece_like(tmp_path)
    generator = random.Random(seed)
    words = {tokenizer.id_of(f"\u2581{word}"): word for word in ("hello", "world")}
    detokenizer = Detokenizer(tokenizer, [1], skip_special_tokens=True)
    ids = [generator.choice([*words, generator.randrange(tokenizer.vocab_size)]) for _ in range(300)]
    text = "".join(detokenizer.add(token or 0) for token in ids) + detokenizer.finish()
    assert re.findall("hello|world", text) == [words[token] for token in ids if token in words]


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_token_bytes_are_exact(text: str) -> None:
    assert b"".join(map(TOKENIZER.token_bytes, TOKENIZER.encode(text))) == text.encode()


def test_encoding_releases_the_gil() -> None:
    """One encode of a megabyte in a thread must let this thread run: see server/prompts.py."""
    text = "the quick brown fox = jumps(over) the_lazy_dog\n" * 20_000
    thread = threading.Thread(target=TOKENIZER.encode, args=(text,))
    thread.start()
    longest, last = 0.0, (started := time.perf_counter())
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert longest < 0.5 * (last - started)


@given(
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=3), max_size=12),
)
@settings(max_examples=500)
def test_stop_strings_never_show_however_text_is_cut(stops: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    finder, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += finder.add(piece)
        assert not any(stop in shown for stop in stops)
        if finder.found is not None:
            break
    else:
        shown += finder.finish()
    ends = [at for stop in stops if (at := whole.find(stop)) >= 0]
    if not ends:
        assert finder.found is None and shown == whole
    else:
        assert finder.found in stops and whole.startswith(shown + finder.found)
        assert not any(stop in shown for stop in stops)


def test_text_is_held_back_no_longer_than_needed() -> None:
    finder = StopStrings(["</answer>"])
    assert [finder.add(piece) for piece in ("a <", "/ans", "x", " b")] == ["a ", "", "</ansx", " b"]


def test_stop_string_can_be_included() -> None:
    finder = StopStrings(["END"], include=True)
    assert finder.add("abc E") + finder.add("NDxyz") == "abc END"


def run_choice(text: str, options: TextOptions) -> list[Delta]:
    choice = Choice(0, TOKENIZER, [50], options)
    ids = TOKENIZER.encode(text)
    deltas = []
    for at, token in enumerate(ids):
        last = FinishReason.LENGTH if at == len(ids) - 1 else None
        deltas.append(choice.add(Output("r", [GeneratedToken(token, -1.0)], last, cached_tokens=3)))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def test_log_probabilities_follow_the_text_that_is_shown() -> None:
    deltas = run_choice("def hello(world): return 3", TextOptions(stops=["world"], logprobs=0))
    tokens = [token for delta in deltas for token in delta.tokens]
    text = "".join(delta.text for delta in deltas)
    assert text == "def hello("
    assert "".join(TOKENIZER.token_text(token.generated.token) for token in tokens) == text
    assert [token.offset for token in tokens] == [0, 3, 7, 9]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "world")


def test_log_probabilities_wait_for_their_text() -> None:
    deltas = run_choice("abc def", TextOptions(stops=["zzz", "c de!"], logprobs=0))
    for delta in deltas[:-1]:
        ends = [token.offset + len(TOKENIZER.token_text(token.generated.token)) for token in delta.tokens]
        assert bool(delta.tokens) == bool(ends) and (not delta.tokens or delta.text)
    assert sum(len(delta.tokens) for delta in deltas) == deltas[-1].num_tokens


def test_no_stop_string_before_min_tokens() -> None:
    deltas = run_choice("a b a b a b", TextOptions(stops=["b"], min_tokens=4))
    assert "".join(delta.text for delta in deltas).count("b") >= 1
    assert deltas[-1].finish_reason == "stop" and deltas[-1].num_tokens > 4


def test_template_of_the_embedded_model() -> None:
    template = ChatTemplate.load(DEFAULT_MODEL)
    text = template.render([{"role": "user", "content": "hi"}])
    assert text == "<|user|>\nhi<|end|>\n<|assistant|>\n"
    for final in ("he", "end", "assistant", ""):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": final}]
        text = template.render(messages, continue_final_message=True)
        assert text == f"<|user|>\nhi<|end|>\n<|assistant|>\n{final}"


def test_template_functions(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ messages | tojson }}{{ strftime_now('%Y') | length }}{{ eos_token }}{{ thinking }}"
    )
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "unused"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = ChatTemplate.load(tmp_path).render([{"a": "<\u00e9>"}], variables={"thinking": True})
    assert text == '<s>[{"a": "<\u00e9>"}]4</s>True'


def test_what_templates_for_training_and_for_transformers_say() -> None:
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    messages = [{"content": "\u00e9"}, {"content": "b"}]
    assert ChatTemplate(marked, {}).render(messages) == "\u00e9;b;"
    written = "{{ messages[0] | tojson(ensure_ascii=False) }} {{ messages[0] | tojson(ensure_ascii=True, indent=1) }}"
    assert ChatTemplate(written, {}).render(messages) == '{"content": "\u00e9"} {\n "content": "\\u00e9"\n}'


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 3 }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ 1 // 0 }}", "refuses"),
        (None, "no chat template"),
    ],
)
def test_template_errors_are_the_clients(source: str | None, part: str) -> None:
    with pytest.raises(ApiError, match=part) as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    assert caught.value.status == 400


def test_broken_templates_are_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match="chat_template.jinja"):
        ChatTemplate.load(tmp_path)
