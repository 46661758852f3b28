"""Request bodies of the OpenAI API, as msgspec structs: typed, bounded, and a million ids decode in milliseconds.

Unknown fields are ignored and null means absent: load tools and clients send more than OpenAI documents. What
only several fields together decide (lengths, vocabulary, n against best_of) is checked in `sampling.py` and
`prompts.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from server.structured import ResponseFormat, StructuredOutputs

TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        TOKEN_IDS,
        {"type": "array", "items": TOKEN_IDS},
    ]
}
RAW_FIELDS = {"prompt", "input", "text", "input_ids"}
NonNegative = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


_STRUCTURED = "use structured_outputs, regex, ebnf or json_schema"
UNSUPPORTED = {  # field: what to do instead
    "allowed_token_ids": "logit_bias or a regex may do",
    "bad_words": "logit_bias may do",
    "chat_template": "start the server with --chat-template",
    "custom_logit_processor": "logit_bias may do",
    "guided_choice": _STRUCTURED,
    "guided_grammar": _STRUCTURED,
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "logits_processors": "logit_bias may do",
    "lora_path": "merge the adapter into the weights",
    "prompt_logprobs": "use echo with logprobs in /v1/completions, or logprob_start_len in /generate",
    "return_token_ids": "/generate answers with output_ids",
    "return_tokens_as_token_ids": "/generate answers with output_ids",
    "stop_regex": "use stop",
    "structural_tag": _STRUCTURED,
    "truncate_prompt_tokens": "cut the prompt",
    "use_beam_search": "use n with a temperature",
}


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints share."""

    model: str | None = None
    max_tokens: Positive | None = None
    min_tokens: NonNegative | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Probability | None = None
    seed: Seed | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=64)] | None = None
    stop_token_ids: list[NonNegative] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structured_outputs: StructuredOutputs | None = None
    rid: str | None = None
    user: str | None = None
    # Other servers' fields. To ignore them would answer something else than what was asked: see UNSUPPORTED.
    allowed_token_ids: Any = None
    bad_words: Any = None
    chat_template: Any = None
    custom_logit_processor: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    logits_processors: Any = None
    lora_path: Any = None
    prompt_logprobs: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    stop_regex: Any = None
    structural_tag: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    prompt: msgspec.Raw  # a string, token ids, or a list of either: see prompts.py
    max_tokens: NonNegative | None = None  # 0: the prompt alone, for its log-probabilities
    add_special_tokens: bool | None = None  # false: the prompt has its start token already
    echo: bool | None = None
    best_of: Positive | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    suffix: str | None = None


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    input: msgspec.Raw  # a string, token ids, or a list of either: see prompts.py
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    rid: str | None = None
    user: str | None = None


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    messages: list[Message]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    prompt: str | list[str] | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    tokens: list[NonNegative]
    skip_special_tokens: bool | None = None


class AbortRequest(msgspec.Struct, frozen=True, kw_only=True):
    rid: str | None = None
    abort_all: bool | None = None


def json_schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """For /openapi.json: self-contained, except that references point into `components`."""
    (schema,), components = msgspec.json.schema_components([kind], ref_template="#/components/schemas/{name}")
    assert set(schema) == {"$ref"}
    for name in RAW_FIELDS.intersection(kind.__struct_fields__):
        components[kind.__name__]["properties"][name] = PROMPT_SCHEMA
    return components
