"""From a request's prompt to token ids, without stalling other requests.

`Tokenizer.encode` holds the GIL for as long as it runs (0.6 s for a megabyte), from any thread; the batch call
releases it. Long inputs therefore go to a thread, as a batch of one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from server.errors import invalid, invalid_json
from server.tokenizer import Tokenizer

LONG = 16_384  # bytes of input from which a thread is worth its hop


T = TypeVar("T")


async def in_thread_if_long(size: int, function: Callable[[], T]) -> T:
    """size: of its work, in bytes of a prompt to be encoded."""
    return await asyncio.to_thread(function) if size > LONG else function()


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: list[int]
    text: str | None  # as the client sent it; None if it sent ids


class PromptReader:
    """Reads the `prompt` of a completion, or another field like it: a string, token ids, or a list of either."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, field: str = "prompt") -> None:
        self._field = field
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        ids = list[Annotated[int, Meta(ge=0, lt=vocab_size)]]
        self._text = msgspec.json.Decoder(str)
        self._texts = msgspec.json.Decoder(list[str])
        self._ids = msgspec.json.Decoder(ids)
        self._id_lists = msgspec.json.Decoder(list[ids])

    async def read(self, raw: msgspec.Raw, add_special_tokens: bool = True) -> list[Prompt]:
        data = bytes(raw)
        prompts = await in_thread_if_long(len(data), lambda: self._prompts(data, add_special_tokens))
        if not prompts or not all(prompt.ids for prompt in prompts):
            raise invalid(f"{self._field.capitalize()} cannot be empty.", self._field)
        return prompts

    def _prompts(self, data: bytes, add_special_tokens: bool) -> list[Prompt]:
        value = self._decode(data)
        if isinstance(value, str):
            value = [value]
        if value and isinstance(value[0], str):
            encoded = self._tokenizer.encode_batch(value, add_special_tokens)
            return [Prompt(ids, text) for ids, text in zip(encoded, value, strict=True)]
        return [Prompt(ids, None) for ids in (value if value and isinstance(value[0], list) else [value])]

    def _decode(self, data: bytes) -> Any:
        """Picks the decoder by the first characters, so that every error names what was wrong with that kind."""
        inner = data[1:64].lstrip()[:1]
        lists: dict[bytes, msgspec.json.Decoder[Any]] = {b'"': self._texts, b"[": self._id_lists}
        decoder = lists.get(inner, self._ids) if data.startswith(b"[") else self._text
        try:
            return decoder.decode(data)
        except msgspec.ValidationError as error:
            raise invalid(self._explain(str(error), decoder), self._field) from None
        except ValueError as error:  # strings are only looked at here
            raise invalid_json(error, self._field) from None

    def _explain(self, message: str, decoder: object) -> str:
        if decoder in (self._ids, self._id_lists) and ("<=" in message or ">=" in message):
            message += f"; token id out of vocabulary (its size is {self._vocab_size})"
        return f"{self._field}: {message}"
