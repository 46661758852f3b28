"""Renders chat messages to the model's prompt with the Jinja template that ships with it. No transformers."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import invalid

MARKER = "\ue000end of the final message\ue000"  # private use: in no real message


class _Generation(Extension):
    """`{% generation %}` marks for trainers what the model says. To render it is to render what is in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    def __init__(self, source: str | None, special_tokens: dict[str, str]) -> None:
        """`source` None: the model has no template, and every chat request is refused."""
        self.source = source
        self.special_tokens = special_tokens
        self._template = None if source is None else _environment().from_string(source)

    @classmethod
    def load(cls, folder: Path, override: Path | None = None) -> ChatTemplate:
        """From `override`, chat_template.jinja or tokenizer_config.json. ValueError names a broken file."""
        config_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = _read_json(config_file) if config_file.is_file() else {}
        file = override or (template_file if template_file.is_file() else None)
        source = file.read_text(encoding="utf-8") if file else _default_template(config.get("chat_template"))
        special = {name: _content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            return cls(source, {name: token for name, token in special.items() if token is not None})
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{file or config_file}: chat template, line {error.lineno}: {error}") from error

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> str:
        if self._template is None:
            raise invalid(
                "This model has no chat template: use /v1/completions, or start the server with --chat-template.",
                "messages",
            )
        given = {
            **self.special_tokens,
            "tools": None,
            "documents": None,
            **(variables or {}),
            "messages": _marked(messages) if continue_final_message else messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(given)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise invalid(f"The chat template refuses these messages: {error}", "messages") from None
        if not continue_final_message:
            return text
        head, found, _ = text.rpartition(MARKER)
        if not found:
            raise invalid("The chat template does not show the last message", "continue_final_message")
        return head


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes <, > and &, which models never saw. Arguments in the order of transformers' filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _marked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last message with a mark at its end, to find where it ends among what the template writes after it."""
    content = messages[-1].get("content")
    if not isinstance(content, str):
        raise invalid("continue_final_message needs a last message with text.", "continue_final_message")
    return [*messages[:-1], {**messages[-1], "content": content + MARKER}]


def _default_template(value: Any) -> str | None:
    """A string, or a list of named ones."""
    if isinstance(value, list):
        value = next((item.get("template") for item in value if item.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}
