"""From a decoded request body to a job for the scheduler: every check that needs the model is here."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import msgspec

from server.chat_template import ChatTemplate
from server.completion import ChatFormat, CompletionFormat, Echo, Format, Writer
from server.config import ServerConfig
from server.errors import ApiError, invalid, model_not_found, too_long
from server.generate import DEFAULT_MAX_NEW_TOKENS, GenerateBody, GenerateWriter, SamplingParams, in_its_words
from server.generation import Job
from server.openai_types import ChatRequest, CompletionRequest, Message, SamplingFields
from server.prompts import PromptReader, in_thread_if_long
from server.sampling import Decoding, SamplingReader
from server.structured import read_grammar
from server.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI's
MAX_CHOICES = 1024  # prompts x n of one request


class JobReader:
    def __init__(
        self,
        config: ServerConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_request_tokens: int,
    ) -> None:
        self._names = config.http.served_model_names
        self._no_generation = config.why_no_generation
        self._tokenizer = tokenizer
        self._template = template
        self._max_request_tokens = max_request_tokens
        vocab_size = config.model.vocab_size
        self._has_eos = bool(config.model.eos_ids)
        self._prompts = {field: PromptReader(tokenizer, vocab_size, field) for field in ("prompt", "text", "input_ids")}
        self._sampling = SamplingReader(vocab_size, config.model.eos_ids, config.text.sampling_defaults)

    async def completion(self, body: CompletionRequest, explain: bool = False) -> Writer:
        self._check_generates(body.model)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise invalid("best_of must equal n: candidates are not ranked.", "best_of")
        if body.suffix:
            raise invalid("suffix is not supported.", "suffix")
        decoding = await self._decoding(body, body.logprobs, body.max_tokens)
        prompts = await self._prompts["prompt"].read(body.prompt, body.add_special_tokens is not False)
        default = max(DEFAULT_MAX_TOKENS, decoding.min_tokens)
        job = self._job("cmpl", body.rid, [prompt.ids for prompt in prompts], decoding, default, explain)
        echoes: list[Echo] = []
        if body.echo:
            job = replace(job, prompt_logprobs=body.logprobs)
            echoes = [Echo(prompt.ids, prompt.text or self._tokenizer.decode(prompt.ids)) for prompt in prompts]
        style = CompletionFormat(self._tokenizer, echoes, decoding.n, body.logprobs is not None)
        return self._writer(job, body, style)

    async def generate(self, body: GenerateBody, explain: bool = False) -> GenerateWriter:
        self._check_generates(None)
        field = body.prompt_field
        prompts = await self._prompts[field].read(getattr(body, field))
        params = (body.sampling_params or SamplingParams()).fields()
        try:
            decoding = await self._decoding(params, body.num_top, params.max_tokens)
            default = max(DEFAULT_MAX_NEW_TOKENS, decoding.min_tokens)
            ids = [prompt.ids for prompt in prompts]
            job = self._job("gen", body.rid, ids, decoding, default, explain)
        except ApiError as error:
            raise in_its_words(error) from None
        if body.scored_from is not None:
            job = replace(job, prompt_logprobs=body.num_top)
        text = replace(decoding.text, logprobs=body.num_top or 0)  # the answer has the ids of all tokens
        job = replace(job, decoding=replace(decoding, text=text))
        names = bool(body.return_text_in_logprobs)
        return GenerateWriter(job, self._tokenizer, bool(body.return_logprob), body.scored_from, names)

    async def chat(self, body: ChatRequest, explain: bool = False) -> Writer:
        self._check_generates(body.model)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
        if body.tools and body.tool_choice != "none":
            raise invalid("tools are not supported: the answer would not be parsed for calls.", "tools")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        decoding = await self._decoding(body, logprobs, body.max_completion_tokens or body.max_tokens)
        ids = await self.chat_ids(
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            variables=body.chat_template_kwargs,
        )
        job = self._job("chatcmpl", body.rid, [ids], decoding, None, explain)
        return self._writer(job, body, ChatFormat(self._tokenizer, bool(body.logprobs)))

    async def chat_ids(self, messages: list[Message], **options: Any) -> list[int]:
        if not messages:
            raise invalid("messages cannot be empty.", "messages")
        _refuse_images(messages)
        size = sum(map(_num_characters, messages))

        def render() -> list[int]:
            text = self._template.render(list(map(_for_template, messages)), **options)
            return self._tokenizer.encode(text, add_special_tokens=False)  # the template wrote them

        ids = await in_thread_if_long(size, render)
        if not ids:
            raise invalid("messages cannot be empty.", "messages")
        return ids

    async def _decoding(self, body: SamplingFields, logprobs: int | None, max_tokens: int | None) -> Decoding:
        grammar = await read_grammar(body, self._has_eos)
        return self._sampling.read(body, logprobs, max_tokens, grammar)

    def check_model(self, name: str | None) -> None:
        if name and name != "default" and name not in self._names:
            raise model_not_found(name)

    def _check_generates(self, name: str | None) -> None:
        self.check_model(name)
        if self._no_generation is not None:
            raise invalid(self._no_generation, "model", "generation_not_supported")

    def _job(
        self,
        kind: str,
        rid: str | None,
        prompts: list[list[int]],
        decoding: Decoding,
        default: int | None,
        explain: bool,
    ) -> Job:
        if len(prompts) * decoding.n > MAX_CHOICES:
            raise invalid(f"{len(prompts)} prompts x n {decoding.n}: at most {MAX_CHOICES} together.", "n")
        fits = self._max_request_tokens
        return Job(
            id=f"{kind}-{uuid.uuid4().hex}",
            prompts=prompts,
            decoding=decoding,
            max_tokens=[_max_tokens(len(prompt), decoding, default, fits) for prompt in prompts],
            rid=rid,
            explain=explain,
        )

    def _writer(self, job: Job, body: SamplingFields, style: Format) -> Writer:
        options = body.stream_options
        include = options is not None and bool(options.include_usage)
        return Writer(
            job=job,
            model=body.model or self._names[0],
            format=style,
            include_usage=include,
            usage_in_every_chunk=options is not None and include and bool(options.continuous_usage_stats),
        )


def _max_tokens(prompt: int, decoding: Decoding, default: int | None, fits: int) -> int:
    rest, asked = fits - prompt, decoding.max_tokens
    least = 0 if asked == 0 else 1
    if rest < least:
        raise too_long(prompt, fits)
    if asked is None:
        return rest if default is None else min(default, rest)
    if asked > rest:
        raise invalid(
            f"Requested token count exceeds the model's maximum context length of {fits} tokens. You requested a "
            f"total of {prompt + asked} tokens: {prompt} of input and {asked} for the completion.",
            "max_tokens",
            "context_length_exceeded",
        )
    return asked


def _num_characters(message: Message) -> int:
    parts = message.content if isinstance(message.content, list) else []
    return len(message.content or "") + sum(len(part.text or "") for part in parts)


def _for_template(message: Message) -> dict[str, Any]:
    """Parts become one text, joined as vLLM joins them: most templates of text models expect a string, and write a list
    as Python does, or leave it out.
    """
    fields: dict[str, Any] = msgspec.to_builtins(message)
    if isinstance(message.content, list):
        fields["content"] = "\n".join(part.text or "" for part in message.content)
    return fields


def _refuse_images(messages: list[Message]) -> None:
    for at, message in enumerate(messages):
        parts = message.content if isinstance(message.content, list) else []
        for part in parts:
            if part.type != "text" or part.text is None:
                raise invalid(f"messages[{at}]: content parts of type {part.type!r} are not supported.", "messages")
