"""Text to token ids and back. Reads tokenizer.json directly; transformers is not needed."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

MAX_PENDING = 16  # tokens without text: no character has as many bytes
PROMPT_TAIL = 8  # prompt tokens that tell a decoder whether the first new word starts with a space


class Tokenizer:
    def __init__(self, folder: Path) -> None:
        self.backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        self._special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Thread-safe. The batch call is the one that releases the GIL, and the faster one."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def token_text(self, token: int) -> str:
        """As shown in logprobs: special tokens by name, part of a character as U+FFFD."""
        return self.decode([token], skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """What the token stands for, exactly, even if that is a part of a character."""
        name = self.backend.id_to_token(token)
        if name is None or token in self._special:
            return (name or "").encode()
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        text = self.token_text(token)
        if "\ufffd" in text and all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return text.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: itself, or the next free one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


class Detokenizer:
    """Text of a growing sequence. A character appears when its last byte does; `finish` gives what never did."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._pending: list[int] = []
        tail = prompt[-PROMPT_TAIL:]
        # a tail that ends inside a character would come out again as text
        whole = not tokenizer.decode(tail, skip_special_tokens).endswith("\ufffd")
        self._stream = self._start(tail if whole else [])

    def _start(self, context: list[int]) -> DecodeStream:
        return DecodeStream(ids=context, skip_special_tokens=self._skip)

    def add(self, token: int) -> str:
        self._pending.append(token)
        text = self._step(token)
        if text is not None:
            self._pending.clear()
            return text
        return self.finish() if len(self._pending) >= MAX_PENDING else ""

    def _step(self, token: int) -> str | None:
        try:
            text: str | None = self._stream.step(self._tokenizer.backend, token)
        except Exception as error:  # the library's own class is not exported
            if "prefix" not in str(error):
                raise
            self._stream = self._start([])  # a token changed the text before it: go on without that text
            text = self._stream.step(self._tokenizer.backend, token)
        return text

    def finish(self) -> str:
        """The text of tokens that form no whole character (yet)."""
        text = self._tokenizer.decode(self._pending, self._skip)
        self._pending.clear()
        self._stream = self._start([])
        return text
