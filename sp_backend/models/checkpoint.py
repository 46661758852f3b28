"""Reads slices of tensors from a Hugging Face folder: one safetensors file or several with an index.

Files are memory-mapped, so a rank touches only the bytes that it keeps; what it has touched counts as its memory until
the file is closed, which is why files are opened again now and then. Embedding models are often saved without the
head, from the inner model: their tensors then lack the prefix "model.". Pure: no torch until a tensor is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
PREFIX = "model."
MOST_MAPPED = 64 << 20  # bytes


def is_bare(folder: str | Path) -> bool:
    """Whether the tensors lack the prefix. False where the weights cannot be read: loading them tells why."""
    try:
        index = _read_index(Path(folder))
        names = set(index or _open(Path(folder) / SINGLE, "np").keys())
    except ValueError:
        return False
    return "embed_tokens.weight" in names


class Checkpoint:
    """The weights of a folder. Every failure is a ValueError that names the file and the tensor."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._index = _read_index(self._folder)  # tensor -> file name; None: all in SINGLE
        self._open: dict[str, Any] = {}
        self._mapped_bytes = 0  # at least, of what was read since files were last opened
        self._bare = is_bare(folder)

    def read(self, name: str, shape: tuple[int, ...], slices: tuple[slice, ...]) -> Tensor:
        """`slices` of the tensor `name`, in the file's dtype; the whole of it must have `shape`.

        What it gives is the file's own memory: copy it and let go of it.
        """
        name = name.removeprefix(PREFIX) if self._bare else name
        file = self._file_of(name)
        try:
            stored = self._handle(file).get_slice(name)
            found, dtype = tuple(stored.get_shape()), stored.get_dtype()
        except SafetensorError as error:
            raise ValueError(f'{self._folder / file}: tensor "{name}" is missing') from error
        if found != shape:
            raise ValueError(
                f'{self._folder / file}: tensor "{name}" has shape {list(found)}, but config.json implies {list(shape)}'
            )
        if dtype not in DTYPES:
            raise ValueError(
                f'{self._folder / file}: tensor "{name}" has dtype {dtype}; supported: {", ".join(DTYPES)}'
            )
        tensor: Tensor = stored[slices]
        self._mapped_bytes += tensor.nbytes
        return tensor

    def _file_of(self, name: str) -> str:
        if self._index is None:
            return SINGLE
        if name not in self._index:
            raise ValueError(f'{self._folder / INDEX}: tensor "{name}" is missing')
        return self._index[name]

    def _handle(self, file: str) -> Any:
        if self._mapped_bytes > MOST_MAPPED:
            self._open.clear()
            self._mapped_bytes = 0
        if file not in self._open:
            self._open[file] = _open(self._folder / file, "pt")
        return self._open[file]


def _open(path: Path, framework: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: weight file is missing")
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from error


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX
    if not path.exists():
        if not (folder / SINGLE).exists():
            raise ValueError(f"{folder}: no weights: neither {SINGLE} nor {INDEX} is there")
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        assert isinstance(index, dict) and all(isinstance(file, str) for file in index.values())
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f'{path}: unreadable: expected a JSON object with a "weight_map" of file names') from error
    return index
