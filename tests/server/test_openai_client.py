"""The official client against a real server: what most users' programs do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from scheduler.request import GenerateRequest
from server.arguments import DEFAULT_MODEL
from server.tokenizer import Tokenizer
from tests.server.fake_client import FakeClient
from tests.server.live import Live, live_server

TOKENIZER = Tokenizer(DEFAULT_MODEL)
PROMPT = "def hello(world): return 'caf\u00e9'"
ANSWER = TOKENIZER.encode("The answer is \U0001f600 42.\n")


def say(request: GenerateRequest, position: int) -> int:
    """The answer, then the end of the text."""
    return ANSWER[position] if position < len(ANSWER) else 1


@pytest.fixture(scope="module")
def api(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def talker() -> Iterator[openai.OpenAI]:
    """Says ANSWER and stops."""
    with live_server(FakeClient(next_token=say, cached_tokens=2)) as live:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            yield client


def test_completion(api: openai.OpenAI, live: Live) -> None:
    answer = api.completions.create(model="default", prompt=PROMPT, max_tokens=100)
    ids = TOKENIZER.encode(PROMPT)
    (choice,) = answer.choices
    assert choice.text.startswith(PROMPT + PROMPT) and choice.finish_reason == "length"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 100)
    assert answer.usage.total_tokens == len(ids) + 100
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert live.client.requests[-1].prompt == ids


def test_streamed_completion_is_the_same_text(api: openai.OpenAI) -> None:
    chunks = list(api.completions.create(model="default", prompt=PROMPT, max_tokens=9, stream=True))
    whole = api.completions.create(model="default", prompt=PROMPT, max_tokens=9)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert sum(chunk.choices[0].finish_reason is not None for chunk in chunks) == 1
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_default_length_is_sixteen(api: openai.OpenAI) -> None:
    usage = api.completions.create(model="default", prompt="x = 1").usage
    assert usage is not None and usage.completion_tokens == 16


def test_usage_only_when_asked(api: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(
        api.completions.create(model="", prompt="x", max_tokens=3, stream=True, stream_options=options)  # type: ignore[call-overload]
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_usage_in_every_chunk(api: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        api.completions.create(model="", prompt="x", max_tokens=3, stream=True, stream_options=options)  # type: ignore[call-overload]
    )
    assert [chunk.usage.completion_tokens for chunk in chunks] == [1, 2, 3, 3]


def test_many_prompts_and_choices(api: openai.OpenAI) -> None:
    prompts = ["a b c", "d e f"]
    answer = api.completions.create(model="default", prompt=prompts, n=2, max_tokens=2, extra_body={"best_of": 2})
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["a b", "a b", "d e", "d e"]
    assert answer.usage is not None and answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens == sum(len(TOKENIZER.encode(prompt)) for prompt in prompts)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4  # 2 for each prompt
    chunks = list(api.completions.create(model="default", prompt=prompts, n=2, max_tokens=2, stream=True))
    texts = ["", "", "", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["a b", "a b", "d e", "d e"]


def test_choices_have_their_own_seeds(api: openai.OpenAI, live: Live) -> None:
    for _ in range(2):
        api.completions.create(model="default", prompt="x", n=3, seed=11, max_tokens=1)
    assert [request.sampling.seed for request in live.client.requests[-6:]] == [11, 12, 13] * 2


def test_prompts_of_ids(api: openai.OpenAI, live: Live) -> None:
    api.completions.create(model="default", prompt=[50, 60, 70], max_tokens=1)
    assert live.client.requests[-1].prompt == [50, 60, 70]
    answer = api.completions.create(model="default", prompt=[[50, 60], [70]], max_tokens=1)
    assert [request.prompt for request in live.client.requests[-2:]] == [[50, 60], [70]]
    assert len(answer.choices) == 2


def test_echo(api: openai.OpenAI) -> None:
    assert api.completions.create(model="default", prompt="a b", echo=True, max_tokens=1).choices[0].text == "a ba"
    ids = TOKENIZER.encode("a b")
    assert api.completions.create(model="default", prompt=ids, echo=True, max_tokens=1).choices[0].text == "a ba"
    chunks = list(api.completions.create(model="default", prompt="a b", echo=True, max_tokens=1, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a ba"


@pytest.mark.parametrize("n", [1, 2])
def test_echoed_logprobs(api: openai.OpenAI, n: int) -> None:
    """What evaluation harnesses read: the prompt's log-probabilities, then those of the generated token."""
    ids = TOKENIZER.encode(PROMPT)
    for prompt in (PROMPT, ids):
        answer = api.completions.create(model="default", prompt=prompt, echo=True, logprobs=1, max_tokens=1, n=n)
        for choice in answer.choices:
            logprobs = choice.logprobs
            assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
            assert logprobs.token_logprobs == [None, *(float(-i) for i in range(1, len(ids))), -0.5]
            assert logprobs.top_logprobs is not None and logprobs.top_logprobs[0] is None
            assert [list(top)[0] for top in logprobs.top_logprobs[1:]] == logprobs.tokens[1:]
            ends = [*logprobs.text_offset[1:], len(choice.text)]
            pieces = [choice.text[begin:end] for begin, end in zip(logprobs.text_offset, ends, strict=True)]
            assert "".join(pieces) == choice.text
            assert all(
                piece == token for piece, token in zip(pieces, logprobs.tokens, strict=True) if "\ufffd" not in token
            )


def test_a_stop_token_has_its_log_probability(api: openai.OpenAI) -> None:
    """Evaluation harnesses take the last entry for the one generated token, and must not find the prompt's last."""
    ids = TOKENIZER.encode("a b c")
    answer = api.completions.create(
        model="default", prompt=ids, echo=True, logprobs=1, max_tokens=1, extra_body={"stop_token_ids": ids[:1]}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and answer.choices[0].finish_reason == "stop"
    assert logprobs.token_logprobs == [None, -1, -2, -0.5] and logprobs.text_offset == [0, 1, 3, 5]
    assert logprobs.tokens == ["a", " b", " c", "a"] and answer.choices[0].text == "a b c"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_may_be_scored_without_generating(api: openai.OpenAI, stream: bool) -> None:
    fields: dict[str, Any] = {"model": "default", "prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 0}
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = api.completions.create(**fields, **options)
    *parts, last = answer if stream else [answer, answer]
    logprobs = [logprob for part in parts for logprob in part.choices[0].logprobs.token_logprobs]
    num_tokens = len(TOKENIZER.encode(PROMPT))
    assert logprobs == [None, *(float(-i) for i in range(1, num_tokens))]
    assert "".join(part.choices[0].text for part in parts) == PROMPT
    assert parts[-1].choices[0].finish_reason == "length"
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (num_tokens, 0)


def test_streamed_echo_has_the_same_logprobs(api: openai.OpenAI) -> None:
    fields = {"model": "default", "prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 3}
    whole = api.completions.create(**fields).choices[0].logprobs
    parts = [chunk.choices[0].logprobs for chunk in api.completions.create(**fields, stream=True)]
    assert whole is not None and whole.token_logprobs is not None
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [entry for part in parts for entry in getattr(part, name)] == getattr(whole, name)


def test_completion_logprobs(api: openai.OpenAI) -> None:
    logprobs = api.completions.create(model="default", prompt=PROMPT, max_tokens=4, logprobs=2).choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == ["def", " hel", "lo", "("]
    assert logprobs.text_offset == [0, 3, 7, 9]
    assert logprobs.token_logprobs == [-0.5] * 4
    assert logprobs.top_logprobs is not None and [len(top) for top in logprobs.top_logprobs] == [2] * 4
    zero = api.completions.create(model="default", prompt=PROMPT, max_tokens=1, logprobs=0).choices[0].logprobs
    assert zero is not None and zero.top_logprobs == [{"def": -0.5}]


def test_chat(talker: openai.OpenAI) -> None:
    answer = talker.chat.completions.create(model="default", messages=[{"role": "user", "content": "hi"}])
    (choice,) = answer.choices
    assert choice.message.content == "The answer is \U0001f600 42.\n" and choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == len(ANSWER) + 1
    assert answer.usage.prompt_tokens_details is not None and answer.usage.prompt_tokens_details.cached_tokens == 2


def test_streamed_chat(talker: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    chunks = list(talker.chat.completions.create(model="default", messages=messages, stream=True))  # type: ignore[call-overload]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The answer is \U0001f600 42.\n"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)


def test_chat_logprobs_have_exact_bytes(talker: openai.OpenAI) -> None:
    choice = talker.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=1
    ).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    data = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert data.decode() == choice.message.content
    assert all(len(entry.top_logprobs) == 1 for entry in choice.logprobs.content)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(talker: openai.OpenAI, stream: bool) -> None:
    messages = [{"role": "user", "content": "hi"}]
    answer = talker.chat.completions.create(model="default", messages=messages, stop=["4", "xyz"], stream=stream)  # type: ignore[call-overload]
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        last = chunks[-1].choices[0]
    else:
        last = answer.choices[0]
        text = last.message.content
    assert text == "The answer is \U0001f600 "
    assert last.finish_reason == "stop"
    assert last.model_extra["stop_reason"] == "4" and last.model_extra["matched_stop"] == "4"


def test_a_stop_string_ends_the_work(live: Live, api: openai.OpenAI) -> None:
    api.completions.create(model="default", prompt="a b c d", max_tokens=500, stop=" c")
    assert live.client.aborted[-1] == live.client.requests[-1].request_id
    assert not live.client.running


def test_fields_reach_the_scheduler(live: Live, api: openai.OpenAI) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 3, "stop_token_ids": [9]}
    api.completions.create(
        model="default",
        prompt="x y",
        max_tokens=4,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"60": -5},
        seed=-1,
        extra_body=extra,
    )
    request = live.client.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.9, 5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.2)
    assert sampling.logit_bias == {60: -5.0} and sampling.seed == 2**63 - 1 and sampling.logprobs is None
    assert (request.min_tokens, request.max_tokens) == (3, 4)
    assert request.stop_token_ids == {9, *live.service.config.model.eos_ids}
    api.completions.create(model="default", prompt="x y", max_tokens=4, extra_body={"ignore_eos": True})
    assert live.client.requests[-1].stop_token_ids == frozenset()
    assert live.client.requests[-1].sampling.temperature == 0.0  # the model's generation_config.json


def test_chat_may_use_the_rest_of_the_context(talker: openai.OpenAI, live: Live, api: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "<|end|>"}]
    api.chat.completions.create(model="default", messages=messages)  # type: ignore[arg-type]
    request = live.client.requests[-1]
    assert request.max_tokens + len(request.prompt) == live.service.config.backend.context_length
    api.chat.completions.create(model="default", messages=messages, max_completion_tokens=2, max_tokens=5)  # type: ignore[arg-type]
    assert live.client.requests[-1].max_tokens == 2


def test_parts_of_a_message_are_one_text_whatever_the_template_expects(tmp_path: Path) -> None:
    template = tmp_path / "strings_only.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] | trim }}{% endfor %}")
    parts = [{"type": "text", "text": "a b"}, {"type": "text", "text": "c"}]
    with live_server(FakeClient(), "--chat-template", str(template)) as live:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as api:
            api.chat.completions.create(model="default", messages=[{"role": "user", "content": parts}], max_tokens=1)  # type: ignore[list-item, misc]
    assert TOKENIZER.decode(live.client.requests[0].prompt) == "a b\nc"


def test_models(api: openai.OpenAI) -> None:
    (model,) = api.models.list().data
    assert model.id == "default" and isinstance((model.model_extra or {})["max_model_len"], int)
    assert api.models.retrieve("default").id == "default"
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("gpt/5")
    assert caught.value.code == "model_not_found"


def test_unknown_model(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        api.completions.create(model="gpt-5", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "`gpt-5` does not exist" in caught.value.message


def test_keys() -> None:
    with live_server(FakeClient(), "--api-key", "secret") as live:
        for key, allowed in (("wrong", False), ("secret", True)):
            client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)
            if allowed:
                assert client.models.list().data
            else:
                with pytest.raises(openai.AuthenticationError) as caught:
                    client.models.list()
                assert caught.value.code == "invalid_api_key"


def test_the_tokenizers_own_start_token(tmp_path: Path) -> None:
    """Added to a completion's prompt; in a chat the template writes it."""
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(DEFAULT_MODEL / name, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json"))
    start = "<|endoftext|>"
    tokenizer.post_processor = TemplateProcessing(f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with live_server(FakeClient(), "--model", str(tmp_path), "--served-model-name", "bos") as live:
        api = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
        api.completions.create(model="bos", prompt="x", max_tokens=1)
        api.completions.create(model="bos", prompt="x", max_tokens=1, extra_body={"add_special_tokens": False})
        api.chat.completions.create(model="bos", messages=[{"role": "user", "content": "x"}], max_tokens=1)
        completion, bare, chat = (request.prompt for request in live.client.requests)
    assert completion == [0, *TOKENIZER.encode("x")]
    assert bare == TOKENIZER.encode("x")
    assert TOKENIZER.decode(chat, skip_special_tokens=False) == "<|user|>\nx<|end|>\n<|assistant|>\n"
