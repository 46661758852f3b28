"""Typed reading of a JSON object, with errors that name the file and the field. Pure: no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object of `file`. A null field counts as absent; absent without a default is an error."""

    file: Path
    values: dict[str, Any]
    prefix: str = ""  # of a nested object, for messages

    @classmethod
    def load(cls, file: Path) -> Fields:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{file}: is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file}: expected a JSON object, found {type(values).__name__}")
        return cls(file, values)

    def error(self, name: str, found: object, expected: str) -> ValueError:
        return ValueError(f'{self.file}: field "{self.prefix}{name}" is {found!r}; expected {expected}')

    def present(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(name, value, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.error(name, value, "a string")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings; empty if absent."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, value, "a list of strings")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """One token id or several; empty if absent."""
        value = self._get(name, [])
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in found):
            raise self.error(name, value, "a token id or a list of them")
        return tuple(found)

    def section(self, name: str) -> Fields | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return Fields(self.file, value, f"{self.prefix}{name}.")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise ValueError(f'{self.file}: field "{self.prefix}{name}" is missing')
        return default
